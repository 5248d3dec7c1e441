"""The cache folder, and folders in it that only the first of several processes builds."""

import contextlib
import fcntl
import hashlib
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterator

from moe_jax.config import Data, UserError


def directory(config: Data) -> pathlib.Path:
  """Returns the cache folder: config.cache_dir, MOE_JAX_CACHE, or the user's cache folder."""
  default = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "moe_jax")
  path = config.cache_dir or os.environ.get("MOE_JAX_CACHE") or default
  return pathlib.Path(path).expanduser().absolute()


def key(*parts: str) -> str:
  """Returns a short hash of `parts` for a folder's name."""
  return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def notice(text: str) -> None:
  """Prints one line for the user about work that a second run does not repeat."""
  print(text, file=sys.stderr, flush=True)


def build_once(path: pathlib.Path, build: Callable[[pathlib.Path], None]) -> pathlib.Path:
  """Returns `path`, after `build(empty folder)` has made its contents if `path` did not exist.

  The folder appears under its name only when it is complete. Other processes wait for the process
  that builds it.

  Raises:
    UserError: the cache folder cannot be written.
  """
  if path.exists():
    return path
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with _lock(path.with_name(path.name + ".lock")):
      if not path.exists():
        partial = path.with_name(path.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
        try:
          partial.mkdir()
          build(partial)
          os.replace(partial, path)
        finally:
          shutil.rmtree(partial, ignore_errors=True)
  except OSError as error:
    raise UserError(
      f"config.data.cache_dir: cannot write {path.parent} ({error.strerror or error}); "
      "set --config.data.cache_dir or MOE_JAX_CACHE to a local folder with space"
    ) from error
  return path


@contextlib.contextmanager
def _lock(path: pathlib.Path) -> Iterator[None]:
  with open(path, "w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)  # the system unlocks when the process ends, even if killed
    yield
