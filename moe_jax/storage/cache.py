"""The cache folder, and folders in it that only the first of several processes builds."""

import contextlib
import hashlib
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import TypeVar

import filelock

from moe_jax.errors import DamagedError, StorageError, UserError, is_storage, notice

Contents = TypeVar("Contents")
_REMEDY = "--cache_dir or $MOE_JAX_CACHE can name another folder"


def directory() -> pathlib.Path:
  """Returns the cache folder: $MOE_JAX_CACHE, which --cache_dir sets, or the user's cache folder.

  Nothing in a run's folder names it, because compiled programs in the cache are run.
  """
  default = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "moe_jax")
  path = os.path.expanduser(os.environ.get("MOE_JAX_CACHE") or default)
  if path.startswith("~"):
    raise UserError(f"the cache {path} has no place: there is no home folder; {_REMEDY}")
  return pathlib.Path(path).absolute()


def make(path: pathlib.Path) -> None:
  """Makes a folder of the cache. What of the cache does not exist is made for this user alone."""
  directory().mkdir(0o700, parents=True, exist_ok=True)
  path.mkdir(0o700, exist_ok=True)


def programs() -> pathlib.Path | None:
  """Returns the folder of compiled programs.

  Returns None, and says why in one line, where it cannot be made or where another user could put
  programs into it; then each process compiles its own.
  """
  path = directory() / "xla"
  try:
    make(path)
    for part in (path.parent, path):
      stat = part.stat()
      stranger = stat.st_uid not in (0, os.geteuid()) and os.geteuid() != 0
      if stranger or stat.st_mode & 0o002:
        notice(
          f"note: compiled programs are not stored: other users can write to {part}; {_REMEDY}"
        )
        return None
  except OSError as error:
    notice(f"note: compiled programs are not stored: {path}: {error.strerror}; {_REMEDY}")
    return None
  return path


def key(*parts: str) -> str:
  """Returns a short hash of `parts` for a folder's name."""
  return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def build_once(
  path: pathlib.Path,
  build: Callable[[pathlib.Path], None],
  read: Callable[[pathlib.Path], Contents],
) -> Contents:
  """Returns `read(path)`, after `build(folder)` has made the folder if it did not exist.

  The folder appears under its name only when it is complete. Other processes wait for the process
  that builds it. If `read(path)` raises a DamagedError, the folder is removed and built again.
  Where a process was stopped that built it, `build` is given what it left.

  Raises:
    UserError: the cache folder cannot be written.
  """
  try:
    with contextlib.suppress(DamagedError):  # looked at again below, behind the lock
      if path.exists():
        return read(path)
    make(path.parent)
    with filelock.FileLock(f"{path}.lock"):
      try:
        if path.exists():
          return read(path)
      except DamagedError as error:
        notice(f"{error}; it is removed and made again")
        shutil.rmtree(path, ignore_errors=True)
      partial = path.with_name(path.name + ".partial")
      try:
        partial.mkdir(exist_ok=True)
        build(partial)
        os.replace(partial, path)
      except Exception:
        shutil.rmtree(partial, ignore_errors=True)
        raise
      return read(path)
  except OSError as error:
    kind = StorageError if is_storage(error) else UserError
    why = error.strerror or str(error)
    raise kind(f"cannot use the cache {path}: {why}; {_REMEDY}") from error
