"""Reads and writes small files so that a kill, a full disk or a symbolic link loses nothing.

A file is written under another name and renamed, so a reader sees the old contents or the new ones.
Nothing is written through a symbolic link. A path in an object store (remote.py) is written whole
by the store itself. Imports no jax.
"""

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import stat
from collections.abc import Iterator
from typing import Any

from moe_jax.errors import DamagedError, StorageError, UserError, short, why_unread
from moe_jax.storage import remote


def write(path: pathlib.Path, content: str | bytes) -> None:
  """Writes a whole file; or leaves the old one as it was, and raises a StorageError."""
  data = content.encode() if isinstance(content, str) else content
  if remote.is_remote(path):
    return remote.write(path, data)
  new = path.with_name(path.name + ".new")
  with storage_errors(path):
    with contextlib.suppress(FileNotFoundError):
      new.unlink()  # of a process that was killed; or a link, which must not be followed
    try:
      with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())  # otherwise a crash can leave the new name with no contents
      os.replace(new, path)
    except OSError:
      with contextlib.suppress(OSError):
        new.unlink()
      raise


def move(folder: pathlib.Path, target: pathlib.Path) -> None:
  """Gives a folder another name on the same disk, or in the same object store."""
  if remote.is_remote(folder):
    return remote.move(folder, target)
  with storage_errors(target):
    folder.rename(target)


def write_json(path: pathlib.Path, values: dict[str, Any], indent: int | None = 2) -> None:
  """Writes an object; arrays become lists."""
  write(path, json.dumps(values, indent=indent, default=lambda array: array.tolist()) + "\n")


def read_json(path: pathlib.Path, remedy: str) -> dict[str, Any]:
  """Returns the object of a .json file; {} where there is no file.

  Raises:
    DamagedError: the file holds no JSON object; the message ends with `remedy`.
  """
  try:
    value = json.loads(read_bytes(path, remedy).decode())
  except FileNotFoundError:
    return {}
  except UserError:
    raise
  except (ValueError, RecursionError) as error:
    why = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else short(error)
    raise DamagedError(f"{path} is damaged ({why}); {remedy}") from None
  if not isinstance(value, dict):
    raise DamagedError(
      f"{path} is damaged (it holds a {type(value).__name__}, not an object); {remedy}"
    )
  if "digest" in value and value["digest"] != digest(value):
    raise DamagedError(f"{path} is damaged (if you changed it, remove its digest); {remedy}")
  return value


def sealed(values: dict[str, Any]) -> dict[str, Any]:
  """Returns the values with their digest, by which who reads them knows of a change."""
  return values | {"digest": digest(values)}


def digest(values: dict[str, Any]) -> str:
  """Returns the digest of what an object has under "about", else of all but its own digest."""
  values = values.get("about") or {k: v for k, v in values.items() if k != "digest"}
  return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def unread(path: pathlib.Path, why: str) -> StorageError:
  """Returns the error to raise for a file that may be whole, but cannot be read now."""
  return StorageError(f"cannot read {path}: {why}; the same command goes on once this can be read")


def exists(path: pathlib.Path) -> bool:
  if remote.is_remote(path):
    return remote.exists(path)
  return os.path.exists(path)  # False, too, where no path can be so long


def read_bytes(path: pathlib.Path, remedy: str = "make it a readable file, or remove it") -> bytes:
  """Returns what is in a file; a pipe or a device, which it may wait for, is a DamagedError."""
  if remote.is_remote(path):
    return remote.read(path)
  try:
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
      if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        raise OSError(errno.EINVAL, "it is no file")
      return file.read()
  except FileNotFoundError:
    raise
  except OSError as error:
    if why := why_unread(error):
      raise unread(path, why) from error
    raise DamagedError(f"{path} cannot be read ({error.strerror}); {remedy}") from None


def read_lines(path: pathlib.Path) -> tuple[list[dict[str, Any]], list[int]]:
  """Returns the objects of a .jsonl file, and the numbers of the lines that are damaged.

  An incomplete last line is neither: a run is writing it, or was killed while it did.
  """
  try:
    raw = read_bytes(path)
  except FileNotFoundError:
    return [], []
  *whole, _ = raw.split(b"\n")
  objects, damaged = [], []
  for number, line in enumerate(whole, 1):
    value = None
    with contextlib.suppress(ValueError, RecursionError):
      value = json.loads(line)
    if isinstance(value, dict) and ("digest" not in value or value["digest"] == digest(value)):
      objects.append(value)
    else:
      damaged.append(number)
  return objects, damaged


def append_line(path: pathlib.Path, values: dict[str, Any]) -> None:
  """Adds an object to a .jsonl file, which may be no symbolic link.

  In an object store it is there after `flush`, or after some time.
  """
  line = (json.dumps(values) + "\n").encode()
  flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
  with storage_errors(path), open(os.open(growing(path), flags, 0o666), "ab") as file:
    file.write(line)
  if remote.is_remote(path):
    remote.upload(every=remote.UPLOAD_EVERY)


def growing(path: pathlib.Path) -> pathlib.Path:
  """Returns where to write a file or folder that grows: a copy, where it is in an object store."""
  return remote.local_copy(path) if remote.is_remote(path) else path


def flush() -> None:
  """Writes to the object store what has grown."""
  remote.upload()


@contextlib.contextmanager
def storage_errors(path: pathlib.Path) -> Iterator[None]:
  """Turns errors of the operating system into one line that names the file."""
  try:
    yield
  except OSError as error:
    raise StorageError(
      f"cannot write {path}: {error.strerror or error}; what was saved before is intact, and the "
      "same command goes on once this can be written"
    ) from error
