"""A disk of a given size, to fill it."""

import contextlib
import os
import pathlib
import subprocess
from collections.abc import Iterator

import pytest


@contextlib.contextmanager
def small_disk(path: pathlib.Path, size: str) -> Iterator[pathlib.Path]:
  """Mounts a disk in memory; skips the test where this process may not."""
  path.mkdir()
  command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
  try:
    mounted = subprocess.run(command, capture_output=True, text=True)
  except FileNotFoundError:
    pytest.skip("there is no mount on this machine")
  if mounted.returncode:
    pytest.skip(f"a disk of its own needs root: {mounted.stderr.strip()}")
  try:
    yield path
  finally:
    # Lazily, because a process of the test may still have a file open there.
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def fill(disk: pathlib.Path) -> pathlib.Path:
  """Fills a disk to the last byte, and returns the file that does."""
  path = disk / "filler"
  with path.open("ab", buffering=0) as file, contextlib.suppress(OSError):
    while True:
      file.write(b"\0" * (1 << 16))
  with path.open("ab", buffering=0) as file, contextlib.suppress(OSError):
    while True:
      file.write(b"\0")
  assert not os.statvfs(disk).f_bfree
  return path
