"""One training at a time in a workdir, with real second processes."""

import contextlib
import os
import pathlib
import signal
import threading
import time

import psutil
import pytest

from moe_jax.errors import BusyError, StorageError
from moe_jax.storage import lock, workdir
from tests.support.locks import HOLD, holder
from tests.support.scripts import python

# A file system without flock, as some that clusters share.
NO_FLOCK = """
import errno, fcntl
def flock(*_): raise OSError(errno.ENOLCK, "No locks available")
fcntl.flock = fcntl.lockf = flock
"""


@pytest.mark.parametrize("before", ["", NO_FLOCK], ids=["flock", "no flock"])
def test_a_second_process_is_told_who_holds_it(before, tmp_path):
  with holder(tmp_path, before=before) as process:
    second = python("-c", before + HOLD, tmp_path, 30.0)
    assert second.returncode == 1 and not second.stdout
    assert f"another training runs there (process {process.pid} on " in second.stderr
    process.send_signal(signal.SIGKILL)
    process.wait()
    with lock.held(tmp_path):  # at once
      assert f"pid={os.getpid()}\n" in (tmp_path / workdir.LOCK).read_text()
  assert not (tmp_path / workdir.LOCK).exists()


def test_a_process_of_this_host_that_is_stopped_keeps_it(tmp_path, monkeypatch):
  """It goes on some day; and nobody waits for its signs of life."""
  monkeypatch.setattr(lock, "_SILENT", 0.5)
  with holder(tmp_path, 0.5) as process:
    process.send_signal(signal.SIGSTOP)
    time.sleep(1)
    with pytest.raises(BusyError, match=f"process {process.pid} on "), lock.held(tmp_path):
      pass
    assert lock.owner_lives(tmp_path)


def test_who_looks_on_knows_whether_the_owner_lives(tmp_path):
  path = tmp_path / workdir.LOCK
  assert not lock.owner_lives(tmp_path)
  owned_elsewhere(path)
  assert lock.owner_lives(tmp_path)
  os.utime(path, (0, time.time() - 100))
  assert not lock.owner_lives(tmp_path)
  path.unlink()
  with holder(tmp_path) as process:
    assert lock.owner_lives(tmp_path)
    text = path.read_text()
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert not lock.owner_lives(tmp_path)  # nor is a zombie
    process.wait()
    assert not lock.owner_lives(tmp_path)
  path.write_text(text.replace(f"pid={process.pid}", f"pid={os.getpid()}"))  # used again
  os.utime(path, (0, psutil.Process().create_time() - 100))
  assert not lock.owner_lives(tmp_path)


@pytest.fixture
def quick(monkeypatch):
  monkeypatch.setattr(lock, "_SILENT", 1.0)


def owned_elsewhere(path):
  path.write_text("filelock/2\npid=5\nhost=node7\nmode=lease\ntoken=abc\nduration=1.0\n")


def test_a_process_on_another_host_holds_it_while_it_shows_signs_of_life(tmp_path, quick, capsys):
  path = tmp_path / workdir.LOCK
  owned_elsewhere(path)
  ended = threading.Event()

  def live():
    while not ended.wait(0.3):
      os.utime(path)

  thread = threading.Thread(target=live)
  thread.start()
  with pytest.raises(BusyError, match="process 5 on node7"), lock.held(tmp_path):
    pass
  ended.set()
  thread.join()
  with lock.held(tmp_path):  # it is silent now
    pass
  assert capsys.readouterr().err.count("for a sign of life of process 5 on node7") == 2


@pytest.mark.parametrize("taken", [True, False])
def test_a_process_that_has_lost_it_ends_at_once(taken, tmp_path):
  with holder(tmp_path, 1.0) as process:
    if taken:  # by a host that had no sign of life from this one
      owned_elsewhere(tmp_path / "new")
      (tmp_path / "new").rename(tmp_path / workdir.LOCK)
    else:
      (tmp_path / workdir.LOCK).unlink()
    assert process.wait(timeout=60) == (BusyError if taken else StorageError).code
    said = "training runs there (process 5 on node7)" if taken else "train.lock is gone or cannot"
    assert said in process.stderr.read()


@pytest.mark.parametrize("content", [b"\xff{[", b""])
def test_a_file_that_is_garbage_blocks_nobody(content, tmp_path, quick, monkeypatch):
  monkeypatch.setattr(lock, "_SILENT", 2.5)
  (tmp_path / workdir.LOCK).write_bytes(content)
  with lock.held(tmp_path):
    pass


def test_nothing_is_written_through_a_link(tmp_path, quick):
  target = tmp_path / "elsewhere"
  target.write_text("mine")
  (tmp_path / workdir.LOCK).symlink_to(target)
  with contextlib.suppress(BusyError), lock.held(tmp_path):
    pass
  assert target.read_text() == "mine"


def test_a_folder_that_cannot_be_written_is_one_line():
  folder = pathlib.Path("/proc/self")
  with pytest.raises(StorageError, match=r"cannot write .*train.lock"), lock.held(folder):
    pass
