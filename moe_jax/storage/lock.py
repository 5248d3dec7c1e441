"""A lock on a workdir, so that two trainings cannot write to it at once. Imports no jax."""

import contextlib
import json
import os
import pathlib
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator

import filelock
import psutil

from moe_jax.errors import BusyError, StorageError, UserError, notice
from moe_jax.storage import files, remote
from moe_jax.storage import workdir as workdir_lib

_SILENT = 30.0  # seconds without a sign of life after which a process on another host is dead


@contextlib.contextmanager
def held(workdir: pathlib.Path) -> Iterator[None]:
  """Holds the lock of a workdir, which has to exist.

  The lock is a file that names its owner and changes while the owner lives. So it holds between
  hosts, too, and on file systems without `flock`. A process that has lost it ends at once.

  Raises:
    BusyError: another process holds it; the message names it.
    StorageError: the file cannot be written.
  """
  path = workdir / workdir_lib.LOCK

  def lost(_: object) -> None:  # as if it were killed: the workdir may be another one's now
    missing = StorageError(f"{path} is gone or cannot be written; the same command goes on")
    error = _busy(workdir, lease.owner) if lease.owner else missing
    notice(f"error: {error}")
    os._exit(error.code)

  kind = _ObjectLease if remote.is_remote(path) else filelock.SoftFileLease
  lease = kind(path, lease_duration=_SILENT, on_compromise=lost)
  with files.storage_errors(path):
    _take(lease, workdir)
  try:
    yield
  finally:
    with contextlib.suppress(OSError, UserError):  # the next start sees that this one ended
      lease.release()


def _take(lease: "_ObjectLease | filelock.SoftFileLease", workdir: pathlib.Path) -> None:
  with contextlib.suppress(filelock.Timeout):
    lease.acquire(timeout=0)  # also where the owner was a process of this host that is no more
    return
  owner = lease.owner
  if owner and owner.hostname == socket.gethostname():
    raise _busy(workdir, owner)
  who = f"process {owner.pid} on {owner.hostname}" if owner else "a process without a name"
  notice(f"waiting {_SILENT:.0f} s for a sign of life of {who}, which did not end this run")
  try:
    lease.acquire(timeout=1.2 * _SILENT)
  except filelock.Timeout:
    if lease.owner:
      raise _busy(workdir, lease.owner) from None
    lease.force_break()  # an empty file, of a host that lost its power
    lease.acquire(timeout=0)


def owner_lives(workdir: pathlib.Path) -> bool:
  """Returns whether a process holds the lock of a workdir on a disk, and lives.

  One of this host that is stopped lives; one of another host has to show signs of life.
  """
  path = workdir / workdir_lib.LOCK
  try:
    sign = path.stat().st_mtime
    owner = filelock.SoftFileLease(path, lease_duration=_SILENT).owner
    if not owner or owner.hostname != socket.gethostname():
      return time.time() - sign < 2 * _SILENT  # the clocks of two hosts may differ
    process = psutil.Process(owner.pid)
    # Another process may have the number of one that was killed, but began after its last sign.
    young = process.create_time() > sign + 2 * _SILENT
    return not young and process.status() != psutil.STATUS_ZOMBIE
  except (FileNotFoundError, psutil.NoSuchProcess):
    return False


def _busy(workdir: pathlib.Path, owner: filelock.OwnerRecord) -> BusyError:
  return BusyError(
    f"--workdir={workdir}: another training runs there (process {owner.pid} on {owner.hostname}); "
    "wait for its end, end it, or name another workdir"
  )


class _ObjectLease:
  """A SoftFileLease for an object store, whose one atomic operation is to create an object."""

  def __init__(
    self, path: pathlib.Path, lease_duration: float, on_compromise: Callable[[object], None]
  ):
    self._path, self._duration, self._lost = path, lease_duration, on_compromise
    self._this = filelock.OwnerRecord(
      os.getpid(), socket.gethostname(), "lease", secrets.token_hex(8)
    )
    self._released = threading.Event()
    self._beat = threading.Thread(target=self._keep, daemon=True)

  @property
  def owner(self) -> filelock.OwnerRecord | None:
    values = files.read_json(self._path, "delete it if no training runs there")
    if not values:
      return None
    host = values.get("hostname", "?")
    return filelock.OwnerRecord(values.get("pid", 0), host, "lease", values.get("token"))

  def acquire(self, timeout: float) -> None:
    """Takes the lock; raises filelock.Timeout where an owner that may live has it."""
    seen: bytes | None = None  # what the object holds, unchanged since
    since = time.monotonic()
    end = since + timeout
    while not remote.create(self._path, self._record(0)):
      with contextlib.suppress(FileNotFoundError):
        if (found := remote.read(self._path)) != seen:
          seen, since = found, time.monotonic()
      owner = self.owner
      if owner == self._this:  # a client repeats a request that was answered too late
        break
      dead = owner and owner.hostname == self._this.hostname and not psutil.pid_exists(owner.pid)
      if owner and (dead or time.monotonic() - since > self._duration):
        self.force_break()
      elif time.monotonic() >= end:
        raise filelock.Timeout(str(self._path))
      else:
        time.sleep(self._duration / 30)
    self._beat.start()

  def force_break(self) -> None:
    with remote.errors(self._path):
      self._path.unlink(missing_ok=True)

  def release(self) -> None:
    self._released.set()
    self._beat.join(self._duration)
    if self.owner == self._this:
      self.force_break()

  def _record(self, beat: int) -> bytes:
    return json.dumps(self._this._asdict() | {"beat": beat}).encode()

  def _keep(self) -> None:
    """Writes signs of life, and says so where another process has taken the lock."""
    beat = 0
    while not self._released.wait(self._duration / 3):
      with contextlib.suppress(Exception):  # of the store; whatever is saved next tells it
        if self.owner not in (self._this, None):
          self._lost(self)
        beat += 1
        self._path.write_bytes(self._record(beat))
