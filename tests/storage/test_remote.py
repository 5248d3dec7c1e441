"""Workdirs in an object store: their files and their lock.

The tests take etils' path layer on a disk: remote.py knows a store by that class alone.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from etils import epath

from moe_jax.errors import BusyError, DamagedError, StorageError, UserError, is_storage
from moe_jax.storage import files, lock, remote
from moe_jax.storage import workdir as workdir_lib
from tests.support.scripts import python, refused


@pytest.fixture
def run(tmp_path):
  """A folder that is no pathlib.Path."""
  return epath.Path(tmp_path / "run")


@pytest.fixture(autouse=True)
def own_copies(monkeypatch):
  monkeypatch.setattr(remote, "_STATE", remote._State())
  monkeypatch.setattr(remote, "_NOT_AGAIN", 0.0)


# One file.


def test_an_object_is_written_and_read(run):
  run.mkdir()
  files.write_json(run / "eval.json", {"loss": np.float32(0.5)})
  assert files.read_json(run / "eval.json", "") == {"loss": 0.5}
  assert files.read_json(run / "none.json", "") == {}


def test_lines_are_uploaded_at_a_flush(run):
  run.mkdir()
  for step in (1, 2):
    workdir_lib.append_line(run / "metrics.jsonl", {"step": step})
  assert not (run / "metrics.jsonl").exists(), "an upload for each line"
  assert workdir_lib.read_lines(run / "metrics.jsonl") == [{"step": 1}, {"step": 2}]
  files.flush()
  assert (run / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_lines_are_uploaded_after_a_while(run, monkeypatch):
  run.mkdir()
  monkeypatch.setattr(remote, "UPLOAD_EVERY", 0.0)
  workdir_lib.append_line(run / "metrics.jsonl", {"step": 1})
  assert (run / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_lines_follow_those_that_are_there(run):
  run.mkdir()
  (run / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in (1, 2, 3)))
  workdir_lib.keep_lines(run / "metrics.jsonl", 2)
  workdir_lib.append_line(run / "metrics.jsonl", {"step": 3, "again": True})
  files.flush()
  lines = workdir_lib.read_lines(run / "metrics.jsonl")
  assert [line["step"] for line in lines] == [1, 2, 3] and lines[2]["again"]


def test_lines_of_a_step_that_is_taken_again_are_deleted_from_the_copy_too(run):
  run.mkdir()
  for step in (1, 2, 3):
    workdir_lib.append_line(run / "metrics.jsonl", {"step": step})
  workdir_lib.keep_lines(run / "metrics.jsonl", 1)
  workdir_lib.append_line(run / "metrics.jsonl", {"step": 2, "again": True})
  files.flush()
  assert (run / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2, "again": true}\n'


def test_a_folder_that_grows_is_uploaded_with_its_files(run):
  run.mkdir()
  (run / "profile" / "a").mkdir(parents=True)
  copy = files.growing(run / "profile")
  (copy / "a").mkdir(parents=True)
  (copy / "a" / "trace").write_bytes(b"\r\n")
  files.flush()
  assert (run / "profile" / "a" / "trace").read_bytes() == b"\r\n"


def test_what_has_not_changed_is_not_uploaded_again(run):
  run.mkdir()
  workdir_lib.append_line(run / "metrics.jsonl", {"step": 1})
  files.flush()
  (run / "metrics.jsonl").unlink()
  files.flush()
  assert not (run / "metrics.jsonl").exists()


def test_a_store_that_does_not_answer_is_one_line(run):
  with pytest.raises(StorageError, match=r"cannot reach .*run/eval\.json"):
    files.write(run / "eval.json", "{}")  # into a folder that is missing
  workdir_lib.append_line(run / "metrics.jsonl", {"step": 1})
  with pytest.raises(StorageError, match=r"cannot reach .*run/metrics\.jsonl"):
    files.flush()
  run.mkdir()
  files.flush()
  assert (run / "metrics.jsonl").exists(), "the line is lost"


def test_only_complete_checkpoints_of_a_store_count(run, tmp_path):
  for step in (4, 8):
    (run / "checkpoints" / str(step)).mkdir(parents=True)
  (run / "checkpoints" / "4" / "commit_success.txt").touch()
  assert workdir_lib.saved_steps(run) == [4]
  assert workdir_lib.saved_steps(tmp_path / "run") == [4, 8]  # there, a folder is renamed last


@pytest.mark.parametrize(
  "error, expected",
  [
    (OSError("Forbidden: b/bucket/o\nno access"), True),
    (ValueError("ABORTED: All 32 retry attempts failed: ... [curl_code='7']"), True),
    (ValueError("PERMISSION_DENIED: ... [http_response_code='403']"), True),
    (ValueError("NOT_FOUND: ... [http_response_code='404']"), False),
    (ValueError("another shape"), False),
    (FileNotFoundError("bucket/run/none"), False),
  ],
)
def test_errors_of_a_store_are_told_from_others(error, expected):
  assert is_storage(error) == expected
  outer = RuntimeError("while an array was read")
  outer.__cause__ = error
  assert is_storage(outer) == expected


# The lock.


@pytest.fixture
def lock_file(run, monkeypatch):
  run.mkdir()
  monkeypatch.setattr(lock, "_SILENT", 0.5)
  return run / workdir_lib.LOCK


def owner_of(path):
  return json.loads(path.read_text())


def owned_by(pid, hostname):
  return json.dumps({"pid": pid, "hostname": hostname, "token": "other", "beat": 3})


def test_the_lock_names_its_owner_and_is_freed(lock_file, run):
  with lock.held(run):
    assert owner_of(lock_file)["pid"] == os.getpid()
    beat, end = 0, time.monotonic() + 60
    while not beat and time.monotonic() < end:
      with contextlib.suppress(ValueError):  # a store writes an object at once, and a disk does not
        beat = owner_of(lock_file)["beat"]
    assert beat
  assert not lock_file.exists()
  with lock.held(run):
    pass


def test_a_second_training_is_refused(lock_file, run):
  with (
    lock.held(run),
    pytest.raises(BusyError, match=f"process {os.getpid()} on "),
    lock.held(run),
  ):
    pass
  assert not lock_file.exists()


def test_the_lock_of_a_process_that_died_elsewhere_is_taken_after_a_silence(lock_file, run, capsys):
  lock_file.write_text(owned_by(1, "elsewhere"))
  start = time.monotonic()
  with lock.held(run):
    assert owner_of(lock_file)["pid"] == os.getpid()
  assert time.monotonic() - start > 0.5
  assert "for a sign of life of process 1 on elsewhere" in capsys.readouterr().err


def test_the_lock_of_a_process_that_lives_elsewhere_is_not_taken(lock_file, run):
  lock_file.write_text(owned_by(1, "elsewhere"))
  ended = threading.Event()

  def live():
    beat = 3
    while not ended.wait(0.1):
      beat += 1
      (run / "new").write_text(owned_by(1, "elsewhere").replace("3}", f"{beat}}}"))
      os.replace(run / "new", lock_file)

  thread = threading.Thread(target=live)
  thread.start()
  with pytest.raises(BusyError, match="process 1 on elsewhere"), lock.held(run):
    pass
  ended.set()
  thread.join()


def test_the_lock_of_a_process_that_died_here_is_taken_at_once(lock_file, run, capsys):
  dead = subprocess.Popen([sys.executable, "-c", ""])
  dead.wait()
  lock_file.write_text(owned_by(dead.pid, socket.gethostname()))
  with lock.held(run):
    assert owner_of(lock_file)["pid"] == os.getpid()
  assert not capsys.readouterr().err


def test_of_many_that_begin_at_once_one_has_the_lock(lock_file, run, monkeypatch):
  monkeypatch.setattr(lock, "_SILENT", 60.0)
  took, refused = [], []

  def begin():
    try:
      with lock.held(run):
        took.append(owner_of(lock_file)["token"])
        while len(took) + len(refused) < 8:
          time.sleep(0.05)
    except (BusyError, DamagedError) as error:  # damaged: on a disk, it is not yet written
      refused.append(error)

  threads = [threading.Thread(target=begin) for _ in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(took) == 1


def test_a_training_whose_lock_another_has_taken_ends_at_once(lock_file, run):
  """In a process, since it ends as if it were killed."""
  code = (
    "import time; from etils import epath; from moe_jax.storage import lock\n"
    f"run = epath.Path({os.fspath(run)!r}); lock._SILENT = 0.5\n"
    "with lock.held(run):\n"
    f"  (run / 'train.lock').write_text({owned_by(2, 'elsewhere')!r})\n"
    "  time.sleep(600)"
  )
  done = python("-c", code)
  assert done.returncode == BusyError.code, done.stderr
  assert "another training runs there (process 2 on elsewhere" in done.stderr


# The name of a workdir.


def test_a_folder_is_a_path_as_ever(tmp_path):
  assert workdir_lib.open_path(str(tmp_path)) == tmp_path
  assert not remote.is_remote(workdir_lib.open_path("runs/a:b"))


@pytest.mark.parametrize("name", ["s3://bucket/a", "gs://", "gs:///a", "file:///a"])
def test_other_stores_are_refused(name):
  with pytest.raises(UserError, match=f"{name}: a run is kept in a folder or in Google"):
    workdir_lib.open_path(name)


def test_a_missing_package_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, "gcsfs", None)
  with pytest.raises(UserError, match="pip install gcsfs"):
    workdir_lib.open_path("gs://bucket/a")


def test_a_sweep_stays_on_this_machine():
  words = ["sweep.py", "--sweep=configs/sweeps/balance.py", "--out=gs://bucket/sweep"]
  assert "--out=gs://bucket/sweep: a sweep" in refused(*words)
