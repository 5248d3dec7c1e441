"""One training at a time in a workdir, with real second processes."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from moe_jax.errors import BusyError
from moe_jax.storage import lock, workdir
from tests.support.toys import ROOT

HOLD = """
import pathlib, sys, time
from moe_jax.storage import lock
with lock.held(pathlib.Path(sys.argv[1])):
  print("held", flush=True)
  time.sleep(60)
"""


@contextlib.contextmanager
def holder(folder):
  process = subprocess.Popen(
    [sys.executable, "-c", HOLD, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True
  )
  try:
    assert process.stdout.readline() == "held\n"
    yield process
  finally:
    process.kill()
    process.communicate()


def test_a_second_process_is_told_who_holds_it(tmp_path):
  with holder(tmp_path) as process:
    said = rf"another training runs there \(process {process.pid} on \S+, since 20\d\d-"
    with pytest.raises(BusyError, match=said), lock.held(tmp_path):
      pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    with lock.held(tmp_path):  # at once: the system has freed it
      assert json.loads((tmp_path / workdir.LOCK).read_text())["pid"] == os.getpid()
  assert (tmp_path / workdir.LOCK).read_text() == ""


@pytest.fixture
def quick(monkeypatch):
  monkeypatch.setattr(lock, "_BEAT", 0.1)
  monkeypatch.setattr(lock, "_SILENT", 0.5)


def test_a_process_on_another_host_holds_it_while_it_shows_signs_of_life(tmp_path, quick, capsys):
  """On a file system without locks: the other host's process is only seen by its file."""
  path = tmp_path / workdir.LOCK
  path.write_text(json.dumps({"host": "node7", "pid": 5, "started": "2026-01-01 10:00:00"}))
  ended = threading.Event()

  def live():
    while not ended.wait(0.1):
      os.utime(path)

  thread = threading.Thread(target=live)
  thread.start()
  with pytest.raises(BusyError, match="process 5 on node7, since 2026"), lock.held(tmp_path):
    pass
  ended.set()
  thread.join()
  with lock.held(tmp_path):  # it is silent now
    pass
  assert capsys.readouterr().err.count("for a sign of life of process 5 on node7") == 2


def test_a_file_that_is_garbage_blocks_nobody(tmp_path):
  (tmp_path / workdir.LOCK).write_bytes(b"\xff{[")
  with lock.held(tmp_path):
    pass


def test_the_lock_is_no_link(tmp_path):
  target = tmp_path / "elsewhere"
  target.write_text("mine")
  (tmp_path / workdir.LOCK).symlink_to(target)
  with pytest.raises(ValueError, match=r"cannot write .*lock.json"), lock.held(tmp_path):
    pass
  assert target.read_text() == "mine"
