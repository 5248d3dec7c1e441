"""A lock on a workdir, so that two trainings cannot write to it at once. Imports no jax."""

import contextlib
import datetime
import fcntl
import json
import os
import pathlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from moe_jax.errors import BusyError, notice
from moe_jax.storage import files, remote
from moe_jax.storage import workdir as workdir_lib

_BEAT = 10.0  # seconds between signs of life, for processes on other hosts
_SILENT = 3 * _BEAT  # seconds without one, after which a process on another host counts as dead
_SETTLE = 2.0  # seconds after which two that have written to an object store see who came later


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
  if remote.is_remote(workdir):
    with _held_object(path, workdir):
      yield
    return
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
    raise _busy(workdir, _owner(descriptor)) from None
  except OSError:  # a file system without locks
    pass
  owner = _owner(descriptor)
  if owner and owner.get("host") != socket.gethostname():
    before = os.fstat(descriptor).st_mtime_ns
    _wait_for(owner)
    if os.fstat(descriptor).st_mtime_ns != before:
      raise _busy(workdir, _owner(descriptor))
  text = json.dumps(_this_process())
  with files.storage_errors(workdir / workdir_lib.LOCK):
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, text.encode(), 0)


def _this_process() -> dict[str, Any]:
  started = datetime.datetime.now().isoformat(" ", "seconds")
  return {"host": socket.gethostname(), "pid": os.getpid(), "started": started}


def _wait_for(owner: dict[str, Any]) -> None:
  """Gives the process that did not free the lock the time for a sign of life."""
  notice(
    f"waiting {_SILENT:.0f} s for a sign of life of process {owner.get('pid')} on "
    f"{owner.get('host')}, which did not end this run"
  )
  time.sleep(_SILENT)


def _beat(descriptor: int, ended: threading.Event) -> None:
  while not ended.wait(_BEAT):
    with contextlib.suppress(OSError):
      os.utime(descriptor)


def _owner(descriptor: int) -> dict[str, Any]:
  with contextlib.suppress(ValueError, RecursionError, OSError):  # also of what is no file
    value = json.loads(os.pread(descriptor, 4096, 0))
    return value if isinstance(value, dict) else {}
  return {}


def _busy(workdir: pathlib.Path, owner: dict[str, Any]) -> BusyError:
  who = f"process {owner.get('pid')} on {owner.get('host')}, since {owner.get('started')}"
  return BusyError(
    f"--workdir={workdir}: another training runs there ({who if owner else 'it just began'}); "
    "wait for its end, end it, or name another workdir"
  )


@contextlib.contextmanager
def _held_object(path: pathlib.Path, workdir: pathlib.Path) -> Iterator[None]:
  """Holds the lock of a workdir in an object store, which has no locks: the owner shows it lives.

  Two that begin at the same moment both write; the one whose writing came later has the lock.
  """
  owner = _read(path)
  if owner and not _has_died_here(owner):
    _wait_for(owner)
    if (now := _read(path)) and now != owner:
      raise _busy(workdir, now)
  this = _this_process()
  files.write_json(path, this | {"beat": 0})
  time.sleep(_SETTLE)
  if not _is_of(this, owner := _read(path)):
    raise _busy(workdir, owner)
  ended = threading.Event()
  beat = threading.Thread(target=_beat_object, args=(path, workdir, this, ended), daemon=True)
  beat.start()
  try:
    yield
  finally:
    ended.set()
    beat.join(_SETTLE)
    with contextlib.suppress(Exception):  # of the store; the next start sees that this one ended
      if _is_of(this, _read(path)):
        files.write_json(path, {})


def _has_died_here(owner: dict[str, Any]) -> bool:
  """Returns whether it was a process of this host that is no more."""
  if owner.get("host") != socket.gethostname() or not isinstance(owner.get("pid"), int):
    return False
  try:
    os.kill(owner["pid"], 0)
  except ProcessLookupError:
    return True
  except PermissionError:  # it is another user's
    pass
  return False


def _beat_object(
  path: pathlib.Path, workdir: pathlib.Path, this: dict[str, Any], ended: threading.Event
) -> None:
  """Writes signs of life; ends this process at once when another one has taken the lock."""
  beat = 0
  while not ended.wait(_BEAT):
    with contextlib.suppress(Exception):  # of the store; whatever is saved next tells it
      owner = json.loads(path.read_text()) if path.exists() else {}
      if owner and not _is_of(this, owner):
        notice(f"error: {_busy(workdir, owner)}")
        os._exit(BusyError.code)  # as if it were killed: the workdir is the other one's now
      beat += 1
      path.write_text(json.dumps(this | {"beat": beat}))


def _is_of(process: dict[str, Any], owner: dict[str, Any]) -> bool:
  return {name: owner.get(name) for name in process} == process


def _read(path: pathlib.Path) -> dict[str, Any]:
  return files.read_json(path, "delete it if no training runs there")
