"""A lock on a workdir, so that two trainings cannot write to it at once. Imports no jax."""

import contextlib
import datetime
import fcntl
import json
import os
import pathlib
import socket
import threading
from collections.abc import Iterator

from moe_jax import files
from moe_jax import workdir as workdir_lib
from moe_jax.errors import BusyError

_BEAT = 10.0  # seconds between signs of life, for processes on other hosts
_SILENT = 3 * _BEAT  # seconds without one, after which a process on another host counts as dead


@contextlib.contextmanager
def held(workdir: pathlib.Path) -> Iterator[None]:
  """Holds the lock of a workdir, which has to exist.

  The system frees the lock when this process ends, however it ends. On a file system that several
  hosts share and that has no locks, the file's time of change shows whether its owner is alive.

  Raises:
    BusyError: another process holds it; the message names it.
    StorageError: the file cannot be written.
  """
  path = workdir / workdir_lib.LOCK
  with files.storage_errors(path):
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
  try:
    _take(descriptor, workdir)
    ended = threading.Event()
    beat = threading.Thread(target=_beat, args=(descriptor, ended), daemon=True)
    beat.start()
    try:
      yield
    finally:
      ended.set()
      beat.join()
      with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
  finally:
    os.close(descriptor)


def _take(descriptor: int, workdir: pathlib.Path) -> None:
  """Takes the lock and writes this process into the file."""
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    raise _busy(descriptor, workdir) from None
  except OSError:  # a file system without locks
    pass
  owner = _owner(descriptor)
  host = socket.gethostname()
  if owner and owner.get("host") != host and _is_alive(descriptor, owner):
    raise _busy(descriptor, workdir)
  started = datetime.datetime.now().isoformat(" ", "seconds")
  text = json.dumps({"host": host, "pid": os.getpid(), "started": started})
  with files.storage_errors(workdir / workdir_lib.LOCK):
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, text.encode(), 0)


def _is_alive(descriptor: int, owner: dict[str, str]) -> bool:
  """Returns whether a process of another host shows a sign of life while this one waits."""
  before = os.fstat(descriptor).st_mtime_ns
  files.notice(
    f"waiting {_SILENT:.0f} s for a sign of life of process {owner.get('pid')} on "
    f"{owner.get('host')}, which did not end this run"
  )
  threading.Event().wait(_SILENT)
  return os.fstat(descriptor).st_mtime_ns != before


def _beat(descriptor: int, ended: threading.Event) -> None:
  while not ended.wait(_BEAT):
    with contextlib.suppress(OSError):
      os.utime(descriptor)


def _owner(descriptor: int) -> dict[str, str]:
  with contextlib.suppress(ValueError):
    value = json.loads(os.pread(descriptor, 4096, 0))
    return value if isinstance(value, dict) else {}
  return {}


def _busy(descriptor: int, workdir: pathlib.Path) -> BusyError:
  owner = _owner(descriptor)
  who = f"process {owner.get('pid')} on {owner.get('host')}, since {owner.get('started')}"
  return BusyError(
    f"--workdir={workdir}: another training runs there ({who if owner else 'it just began'}); "
    "wait for its end, end it, or name another workdir"
  )
