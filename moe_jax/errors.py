"""The errors that end a program with one line, and its exit codes (docs/reliability.md)."""

import atexit
import errno
import os
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

# Errors of the operating system that mean "this disk cannot be written (or read) now".
_STORAGE = {
  errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG, errno.ESTALE, errno.ENOTCONN,
}  # fmt: skip
# What an object store's clients raise, by module, or say in a general error (gcsfs, tensorstore).
_CLIENTS = ("aiohttp", "gcsfs", "requests", "google.auth", "google.api_core", "google.cloud")
_STORE_SAYS = re.compile(r"^Forbidden: |curl_code|http_response_code='(401|403|408|429|5..)'")
# Of a file that is missing or is no file; with another error the file may be whole.
_NO_FILE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EINVAL}
_TENSORSTORE_SAYS = re.compile(r"OS error (\d+)")


class UserError(ValueError):
  """A mistake that one line explains: the field, its value, and the remedy."""

  code = 2  # the exit code


class StorageError(UserError):
  """A disk is full, read-only or gone, or an object store does not answer.

  The same command goes on once it can be written again.
  """

  code = 3


class DamagedError(UserError):
  """A file of a run is not what was written, and nothing whole can take its place."""

  code = 4


class BusyError(UserError):
  """Another process is training in this workdir."""

  code = 5


class HangError(UserError):
  """No step ends any more; the same command goes on from the newest checkpoint."""

  code = 7


def few(names: Sequence[object], most: int = 3) -> str:
  """Lists the first names as they print: "a, b, c and 9 more"."""
  first = ", ".join(shown(str(name)) for name in names[:most])
  return first + (f" and {len(names) - most:,} more" if len(names) > most else "")


def shown(text: str) -> str:
  """Returns a text in one line, in which nothing is left that a terminal would act upon."""
  return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split()))


def si(number: float) -> str:
  """Formats a number with a suffix, B for a billion: 46702792704 -> '46.7B'."""
  for letter, size in (("P", 1e15), ("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
    if abs(number) >= size:
      return f"{number / size:.4g}{letter}"
  return f"{number:.4g}"


def notice(text: str) -> None:
  """Prints one line on stderr."""
  print(shown(text), file=sys.stderr, flush=True)


def short(error: Exception) -> str:
  """Returns the beginning of what an error says, in one line."""
  return " ".join(str(error).split())[:140] or type(error).__name__


def end(code: int) -> NoReturn:
  """Ends the program after its last line: a library's threads are not waited for, nor heard."""
  if sys.stderr is sys.__stderr__:  # and not a caller's, who goes on in this process
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    atexit._run_exitfuncs()
    os._exit(code)
  sys.exit(code)


def is_storage(error: BaseException) -> bool:
  """Returns whether the error means that a disk or an object store cannot be used now."""
  if isinstance(error, OSError) and error.errno in _STORAGE:
    return True
  if type(error).__module__.startswith(_CLIENTS) or _STORE_SAYS.search(str(error)):
    return True
  return error.__cause__ is not None and is_storage(error.__cause__)


def why_unread(error: BaseException | None) -> str:
  """Returns why the system did not let a file be read, which says nothing of the file; or "".

  As with too many open files, no permission, no memory, or a file server that does not answer.
  """
  if error is None:
    return ""
  found = _TENSORSTORE_SAYS.search(str(error))
  number = error.errno if isinstance(error, OSError) else int(found[1]) if found else 0
  if isinstance(error, MemoryError):
    number = errno.ENOMEM
  if number and number not in _NO_FILE:
    return os.strerror(number)
  return why_unread(error.__cause__ or error.__context__)
