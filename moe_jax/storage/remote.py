"""Folders in Google Cloud Storage, gs://BUCKET/FOLDER: what differs from a folder on a disk.

An object is written whole or not at all, so it needs no other name and no renaming. But nothing can
be added to it: a file that grows has a copy on this machine, which is uploaded now and then. A path
here is an etils.epath.Path, which has the methods of pathlib.Path but absolute() and resolve().
Imports no jax.
"""

import atexit
import contextlib
import importlib.util
import logging
import os
import pathlib
import re
import shutil
import tempfile
import time
import typing
from collections.abc import Iterator

from moe_jax.errors import StorageError, UserError, is_storage, short

UPLOAD_EVERY = 30.0  # seconds between uploads of a file that grows
_NOT_AGAIN = 10.0  # seconds after a failure
_NO_ACCESS = ("401", "Forbidden", "403")  # in what gcsfs says where an account has no rights
_LOG_IN = (
  "log in with `gcloud auth application-default login`, or name the key file of an account that "
  "may read and write there in GOOGLE_APPLICATION_CREDENTIALS"
)


def open_path(folder: str | os.PathLike[str]) -> pathlib.Path:
  """Returns the path of a folder, local or gs://BUCKET/FOLDER.

  Raises:
    UserError: there is no such bucket, or no way to it from here.
    StorageError: the store does not answer.
  """
  text = os.fspath(folder)
  if "://" not in text:
    return pathlib.Path(text)
  if not re.match("gs://[^/]", text):
    raise UserError(
      f"{text}: a run is kept in a folder or in Google Cloud Storage, gs://BUCKET/FOLDER; mount "
      "another store as a folder"
    )
  if importlib.util.find_spec("gcsfs") is None:
    raise UserError(f"{text}: gs:// needs the package gcsfs: pip install gcsfs")
  os.environ.setdefault("EPATH_USE_TF", "false")  # else epath would take TensorFlow if it is there
  logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it tells every try with its traceback
  from etils import epath  # takes a moment

  path = epath.Path(text.rstrip("/"))
  bucket = epath.Path(*path.parts[:3])  # /, gs, BUCKET
  try:
    if bucket.exists():
      return typing.cast(pathlib.Path, path)
  except Exception as error:
    if any(word in str(error) for word in _NO_ACCESS):
      raise UserError(f"{text}: no access ({short(error)}); {_LOG_IN}") from None
    raise unreachable(path, error) from error
  raise UserError(f"{text}: there is no bucket {bucket}; make it, or name another one")


def is_remote(path: pathlib.Path) -> bool:
  return not isinstance(path, pathlib.Path)


def resolved(path: pathlib.Path) -> pathlib.Path:
  """Returns the path from the root on, without symbolic links."""
  return path if is_remote(path) else path.resolve()


@contextlib.contextmanager
def errors(path: pathlib.Path) -> Iterator[None]:
  """Turns errors of the store into one line that names the file.

  The clients try for half a minute. So a program that ends because the store does not answer does
  not try again for the next file.
  """
  if _STATE.failure and time.monotonic() - _STATE.failed_at < _NOT_AGAIN:
    raise unreachable(path, _STATE.failure)
  try:
    yield
  except Exception as error:  # of four libraries
    if not (is_storage(error) or isinstance(error, OSError)):
      raise
    _STATE.failure, _STATE.failed_at = error, time.monotonic()
    raise unreachable(path, error) from error


def unreachable(path: pathlib.Path, error: Exception, what: str = "cannot reach") -> StorageError:
  """Returns the error to raise for one of the store's, which says what could not be done."""
  return StorageError(
    f"{what} {path} ({short(error)}); what was saved before is intact, and the same command goes "
    "on once the store answers"
  )


def read(path: pathlib.Path) -> bytes:
  """Returns the contents of an object, of a file that grows with what is not yet uploaded.

  Raises a FileNotFoundError where there is none.
  """
  copy = _STATE.copies.get(path)
  if copy and copy.is_file():
    return copy.read_bytes()
  with errors(path):
    try:
      return path.read_bytes()
    except FileNotFoundError as error:
      missing = error
  raise missing


def exists(path: pathlib.Path) -> bool:
  """Returns whether there is an object, or a file that grows and is not yet uploaded."""
  copy = _STATE.copies.get(path)
  with errors(path):
    return bool(copy and copy.exists()) or path.exists()


def write(path: pathlib.Path, data: bytes) -> None:
  """Writes an object; the copy of a file that grows begins anew with it."""
  _STATE.copies.pop(path, None)
  with errors(path):
    path.write_bytes(data)


def create(path: pathlib.Path, data: bytes) -> bool:
  """Writes an object that is not there yet, which one process alone can do; returns whether."""
  import fsspec  # type: ignore[import-untyped]

  store, name = fsspec.core.url_to_fs(os.fspath(path))  # epath opens no file for creation alone
  with errors(path):
    try:
      with store.open(name, "xb") as file:
        file.write(data)
    except FileExistsError:
      return False
  return True


def move(folder: pathlib.Path, target: pathlib.Path) -> None:
  """Moves the objects below a folder one by one; a kill may leave some of them in each place."""
  with errors(folder):
    (target.parent / ".keep").write_bytes(b"")  # a folder exists while an object is below it
    folder.rename(target)


def local_copy(path: pathlib.Path) -> pathlib.Path:
  """Returns the copy on this machine of a file or folder that grows.

  The copy of a file begins with what the object has; of a folder it begins empty.
  """
  if path not in _STATE.copies:
    folder = pathlib.Path(tempfile.mkdtemp(prefix="moe_jax_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    copy = folder / path.name
    with errors(path):
      if path.is_file():  # reading a folder would give b""
        copy.write_bytes(path.read_bytes())
        _STATE.uploaded[copy] = _stamp(copy)
    _STATE.copies[path] = copy
  return _STATE.copies[path]


def upload(every: float = 0.0) -> None:
  """Uploads the copies that have changed, if the last time is `every` seconds ago."""
  if time.monotonic() - _STATE.uploaded_at < every:
    return
  for path, copy in _STATE.copies.items():
    for file in [copy] if copy.is_file() else filter(pathlib.Path.is_file, copy.rglob("*")):
      if _STATE.uploaded.get(file) == (stamp := _stamp(file)):
        continue
      target = path if file == copy else path / file.relative_to(copy).as_posix()
      with errors(target):
        target.write_bytes(file.read_bytes())
      _STATE.uploaded[file] = stamp
  _STATE.uploaded_at = time.monotonic()


def _stamp(file: pathlib.Path) -> tuple[int, int]:
  stat = file.stat()
  return stat.st_size, stat.st_mtime_ns


class _State:
  """The copies of this process, and the store's last failure."""

  def __init__(self) -> None:
    self.copies: dict[pathlib.Path, pathlib.Path] = {}
    self.uploaded: dict[pathlib.Path, tuple[int, int]] = {}  # {file: size and time of change}
    self.uploaded_at = time.monotonic()
    self.failure: Exception | None = None
    self.failed_at = 0.0


_STATE = _State()
