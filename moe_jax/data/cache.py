"""The cache folder, and folders in it that only the first of several processes builds."""

import contextlib
import fcntl
import hashlib
import os
import pathlib
import shutil
import zlib
from collections.abc import Callable, Iterator

from moe_jax.errors import DamagedError, StorageError, UserError, is_storage, notice
from moe_jax.storage import files

SEAL = "checksums.json"  # {"files": {name: [size, CRC-32 or null]}, "digest": of the former}
SUSPECT = "suspect"  # an empty file, where a reader has found damage in a large file
_LARGE = 2**32  # bytes; a larger file is not read whole to check it, unless it is suspect
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
  check: Callable[[pathlib.Path], None] = lambda path: None,
) -> pathlib.Path:
  """Returns `path`, after `build(empty folder)` has made its contents if `path` did not exist.

  The folder appears under its name only when it is complete. Other processes wait for the process
  that builds it. If `check(path)` raises a DamagedError, the folder is removed and built again.

  Raises:
    UserError: the cache folder cannot be written.
  """
  try:
    with contextlib.suppress(DamagedError):  # looked at again below, behind the lock
      if path.exists():
        check(path)
        return path
    make(path.parent)
    with _lock(path):
      try:
        if path.exists():
          check(path)
          return path
      except DamagedError as error:
        _remove(path, str(error))
      partial = path.with_name(path.name + ".partial")
      shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
      try:
        partial.mkdir()
        build(partial)
        os.replace(partial, path)
      finally:
        shutil.rmtree(partial, ignore_errors=True)
  except OSError as error:
    kind = StorageError if is_storage(error) else UserError
    raise failed(path, error.strerror or str(error), kind) from error
  return path


def failed(path: pathlib.Path, why: str, kind: type[UserError] = StorageError) -> UserError:
  """Returns the error for a folder of the cache that cannot be read or written."""
  return kind(f"cannot use the cache {path}: {why}; {_REMEDY}")


def remove(path: pathlib.Path, inode: int, why: str) -> None:
  """Removes a damaged folder and says so, unless another process has built it again by now.

  `inode` is the st_ino of the folder that is damaged.
  """
  with _lock(path):
    if path.exists() and path.stat().st_ino == inode:
      _remove(path, why)


def _remove(path: pathlib.Path, why: str) -> None:
  notice(f"{why}; it is removed and made again")
  for _ in range(2):  # a reader may call a file suspect meanwhile
    shutil.rmtree(path, ignore_errors=True)


def seal(folder: pathlib.Path, without: str = "") -> None:
  """Writes the sizes and checksums of all files in a folder into it, for `check`.

  Files that match the pattern `without` get no checksum, because what reads them has its own.
  """
  sums = {}
  for path in sorted(folder.rglob("*")):
    if path.is_file():
      crc = None if without and path.match(without) else _crc32(path)
      sums[path.relative_to(folder).as_posix()] = [path.stat().st_size, crc]
  files.write_json(folder / SEAL, files.sealed({"files": sums}), indent=None)


def check(folder: pathlib.Path) -> None:
  """Compares the files of a folder with what `seal` wrote.

  Of a file over 4 GiB only the size is compared, unless something called it suspect.

  Raises:
    DamagedError: a file is not what was written, or is missing; no remedy is named.
  """
  try:
    sums = files.read_json(folder / SEAL, "")["files"]
  except (DamagedError, KeyError):
    raise DamagedError(f"{folder / SEAL} is damaged") from None
  suspect = folder / SUSPECT
  for name, (size, crc) in sums.items():
    path = folder / name
    try:
      real_size = path.stat().st_size
    except OSError as error:
      raise DamagedError(f"{path} is damaged: {error.strerror}") from None
    if real_size != size:
      raise DamagedError(f"{path} is damaged: it has {real_size:,} bytes, not {size:,}")
    if crc is not None and (size <= _LARGE or suspect.exists()) and _crc32(path) != crc:
      raise DamagedError(f"{path} is damaged: its checksum is another one")
  if suspect.exists():
    suspect.unlink(missing_ok=True)


def _crc32(path: pathlib.Path) -> int:
  crc = 0
  with open(path, "rb") as file:  # not a memory map, where a disk's error ends the process
    while block := file.read(2**20):
      crc = zlib.crc32(block, crc)
  return crc


@contextlib.contextmanager
def _lock(path: pathlib.Path) -> Iterator[None]:
  with open(path.with_name(path.name + ".lock"), "w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)  # the system unlocks when the process ends, even if killed
    yield
