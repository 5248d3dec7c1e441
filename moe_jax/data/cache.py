"""The cache folder, and folders in it that are built once however many processes ask for them."""

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
  usual = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "moe_jax")
  chosen = config.cache_dir or os.environ.get("MOE_JAX_CACHE") or usual
  return pathlib.Path(chosen).expanduser().absolute()


def key(*parts: str) -> str:
  """A short hash of `parts` for a folder's name."""
  return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def notice(text: str) -> None:
  """One line for the user; said only when work was done, so a second run is silent."""
  print(text, file=sys.stderr, flush=True)


def build_once(path: pathlib.Path, build: Callable[[pathlib.Path], None]) -> pathlib.Path:
  """Returns `path` after `build(empty folder)` has filled it, if it was not there before.

  The folder appears whole or not at all. Other processes wait for the one that builds.
  """
  if path.exists():
    return path
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with _lock(path.with_name(path.name + ".lock")):
      if not path.exists():
        partial = path.with_name(path.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
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
    fcntl.flock(file, fcntl.LOCK_EX)  # the system lets go when the process ends, however it ends
    yield
