"""Workdirs in an object store: the files of a run, and whole runs against a stand-in for the store.

The quick tests take etils' path layer on a disk: remote.py knows a store by that class alone.
"""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from etils import epath

from moe_jax import files, remote
from moe_jax import workdir as workdir_lib
from moe_jax.errors import StorageError, UserError, is_storage
from tests.support.object_store import Store
from tests.support.scripts import ONE_DEVICE, checkpoint_of, command, evaluate, losses_of
from tests.support.toys import ROOT


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
  monkeypatch.setattr(remote, "_UPLOAD_EVERY", 0.0)
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


# The name of a workdir.


def test_a_folder_is_a_path_as_ever(tmp_path):
  assert workdir_lib.open_path(str(tmp_path)) == tmp_path
  assert not remote.is_remote(workdir_lib.open_path("runs/a:b"))


def test_other_stores_are_refused():
  with pytest.raises(UserError, match="s3://bucket/a: a run is kept in a folder or in Google"):
    workdir_lib.open_path("s3://bucket/a")


def test_a_missing_package_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, "gcsfs", None)
  with pytest.raises(UserError, match="pip install gcsfs"):
    workdir_lib.open_path("gs://bucket/a")


# Whole runs.

needs_gcsfs = pytest.mark.skipif(
  importlib.util.find_spec("gcsfs") is None, reason="needs pip install gcsfs"
)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
  store = Store(tmp_path_factory.mktemp("store"))
  yield store
  store.stop()


def script(store, *words):
  """A process with one device, to which the store is Google's."""
  return subprocess.run(
    words, cwd=ROOT, env=ONE_DEVICE | store.env, capture_output=True, text=True, timeout=400
  )  # fmt: skip


def cut_off(store, words, beginning, cut):
  """Calls `cut(process)` when the process prints a line with this beginning; returns its end."""
  process = subprocess.Popen(
    words, cwd=ROOT, env=ONE_DEVICE | store.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    text=True,
  )  # fmt: skip
  for line in process.stdout:
    if line.startswith(beginning):
      cut(process)
      break
  _, errors = process.communicate(timeout=400)
  return process.returncode, errors


@pytest.fixture(scope="module")
def remote_run(store, cache):
  """A run that is killed, whose store then fails while it goes on, and that goes on once more."""
  words = command("gs://bucket/run", cache)
  killed, _ = cut_off(store, words, "step      9/12", lambda p: p.send_signal(signal.SIGKILL))
  assert killed == -signal.SIGKILL
  # It is stopped before its next checkpoint, which comes after an evaluation.
  outage = cut_off(store, words, "step", lambda _: store.stop())
  store.start()
  again = script(store, *words)
  assert again.returncode == 0, again.stderr
  return {"outage": outage, "again": again.stdout}


@pytest.mark.slow
@needs_gcsfs
def test_a_store_that_fails_ends_a_run_with_one_line_and_code_3(remote_run):
  code, said = remote_run["outage"]
  lines = [line for line in said.splitlines() if not line.startswith("I1") and line]
  assert code == 3 and len(lines) == 1, said
  assert lines[0].startswith("error: cannot reach gs://bucket/run/metrics.jsonl")
  assert "goes on once the store answers" in lines[0]


@pytest.mark.slow
@needs_gcsfs
def test_a_run_goes_on_when_its_store_is_back(remote_run):
  assert "resuming gs://bucket/run at step" in remote_run["again"]


@pytest.mark.slow
@needs_gcsfs
def test_a_cut_off_run_ends_as_a_local_run_that_was_not(remote_run, store, whole_run):
  """Bit for bit."""
  got, want = checkpoint_of(store.folder / "run", 12), checkpoint_of(whole_run.workdir, 12)
  jax.tree.map(np.testing.assert_array_equal, got, want)
  assert losses_of(store.folder / "run") == losses_of(whole_run.workdir)


@pytest.mark.slow
@needs_gcsfs
def test_a_run_leaves_all_its_files_in_the_store(remote_run, store):
  names = {path.name for path in (store.folder / "run").iterdir()}
  assert names >= {"config.json", "data.json", "kernels.json", "metrics.jsonl", "checkpoints"}
  events = list((store.folder / "run" / "tensorboard").iterdir())
  assert len(events) >= 2 and all(event.stat().st_size > 1000 for event in events[-1:])
  assert workdir_lib.saved_steps(epath.Path(store.folder / "run"))[-1] == 12


@pytest.mark.slow
@needs_gcsfs
def test_lines_are_not_uploaded_one_by_one(remote_run, store):
  """In four starts: at each checkpoint, and when later lines are deleted."""
  assert 0 < store.writes("run/metrics.jsonl") < 12


@pytest.mark.slow
@needs_gcsfs
def test_a_run_in_a_store_is_evaluated(remote_run, store, whole_run, tmp_path):
  done = script(store, sys.executable, "eval.py", "--workdir=gs://bucket/run")
  assert done.returncode == 0, done.stderr
  assert "gs://bucket/run/loss.png" in done.stdout
  assert (store.folder / "run" / "loss.png").read_bytes()[:4] == b"\x89PNG"
  got = json.loads((store.folder / "run" / "eval.json").read_text())
  _, want = evaluate(shutil.copytree(whole_run.workdir, tmp_path / "copy"))
  assert (got["loss"], got["load_ZE"]) == (want["loss"], want["load_ZE"])


@pytest.mark.slow
@needs_gcsfs
def test_a_run_in_a_store_generates(remote_run, store, whole_run):
  words = ["--prompt=def ", "--max_new_tokens=4", "--temperature=0"]
  got, want = (
    script(store, sys.executable, "generate.py", f"--workdir={workdir}", *words)
    for workdir in ("gs://bucket/run", whole_run.workdir)
  )
  assert got.returncode == 0 and got.stdout == want.stdout, got.stderr


@pytest.mark.slow
@needs_gcsfs
def test_a_run_begins_with_the_parameters_of_one_in_a_store(remote_run, store, whole_run, cache):
  words = command("gs://bucket/new", cache, steps=1)
  got = script(store, *words, "--init_from=gs://bucket/run:12", "--profile=1:1")
  assert got.returncode == 0, got.stderr
  assert "begins with the parameters of gs://bucket/run, step 12" in got.stdout
  local = store.folder.parent / "local"
  want = script(store, *command(local, cache, steps=1), f"--init_from={whole_run.workdir}:12")
  assert want.returncode == 0, want.stderr
  assert losses_of(store.folder / "new") == losses_of(local)
  assert list((store.folder / "new" / "profile").rglob("*.xplane.pb")), "no trace"


@pytest.mark.slow
@needs_gcsfs
def test_a_report_reads_runs_in_a_store(remote_run, store, tmp_path):
  words = [sys.executable, "-m", "moe_jax.report", "gs://bucket/run"]
  done = script(store, *words)
  assert done.returncode == 2 and "--out" in done.stderr
  done = script(store, *words, f"--out={tmp_path}")
  assert done.returncode == 0, done.stderr
  assert "run" in (tmp_path / "report.md").read_text()


@pytest.mark.slow
@needs_gcsfs
def test_a_bucket_that_is_missing_is_one_line(store):
  done = script(store, sys.executable, "eval.py", "--workdir=gs://none/run")
  assert done.returncode == 2, done.stderr
  assert done.stderr.startswith("error: gs://none/run: there is no bucket gs://none")
  assert done.stderr.count("\n") == 1


@pytest.mark.slow
@needs_gcsfs
def test_an_account_without_access_is_one_line(store):
  """The stand-in lets nobody into this bucket."""
  done = script(store, sys.executable, "eval.py", "--workdir=gs://closed/run")
  assert done.returncode == 2, done.stderr
  assert done.stderr.startswith("error: gs://closed/run: no access (Forbidden")
  assert "gcloud auth application-default login" in done.stderr and done.stderr.count("\n") == 1


def test_a_sweep_stays_on_this_machine():
  words = ["sweep.py", "--sweep=configs/sweeps/balance.py", "--out=gs://bucket/sweep"]
  done = subprocess.run(
    [sys.executable, *words], cwd=ROOT, env=dict(os.environ), capture_output=True, text=True
  )
  assert done.returncode == 2 and "--out=gs://bucket/sweep: a sweep" in done.stderr, done.stderr
