"""Whole runs with their workdir in Google Cloud Storage, for which a process here stands in."""

import importlib.util
import json
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from etils import epath

from moe_jax.storage import workdir as workdir_lib
from tests.support.object_store import Store
from tests.support.scripts import ONE_DEVICE, checkpoint_of, command, evaluate, losses_of, python
from tests.support.toys import ROOT

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(importlib.util.find_spec("gcsfs") is None, reason="needs pip install gcsfs"),
]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
  store = Store(tmp_path_factory.mktemp("store"))
  yield store
  store.stop()


def script(store, *words):
  """A process with one device, to which the store is Google's."""
  return python(*words[1:], env=ONE_DEVICE | store.env)


def cut_off(store, words, cuts):
  """Returns exit code and stderr of a process.

  `cuts` is {beginning of a line: what to call with the process when it prints that line}.
  """
  process = subprocess.Popen(
    words,
    cwd=ROOT,
    env=ONE_DEVICE | store.env,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  while cuts and (line := process.stdout.readline()):
    for beginning in [beginning for beginning in cuts if line.startswith(beginning)]:
      cuts.pop(beginning)(process)
  _, errors = process.communicate(timeout=600)
  return process.returncode, errors


def wait_for(path):
  for _ in range(30_000):
    if path.exists():
      return
    time.sleep(0.02)
  raise TimeoutError(path)


@pytest.fixture(scope="module")
def remote_run(store, cache):
  """A run that is killed, whose store then fails while it goes on, and that goes on once more.

  Before, its store fails for some seconds while the first checkpoint is written.
  """

  commit = "run/checkpoints/4/commit_success.txt"
  store.held.write_text(commit)

  def fail_for_seconds(_):
    wait_for(store.folder / "run/checkpoints/4")
    store.stop()
    store.held.unlink()
    assert not (store.folder / commit).exists(), "too late"
    time.sleep(3)
    store.start()

  words = command("gs://bucket/run", cache)
  cuts = {"step      4": fail_for_seconds, "step      9": lambda p: p.send_signal(signal.SIGKILL)}
  killed, said = cut_off(store, words, cuts)
  assert killed == -signal.SIGKILL, said
  # It is stopped before its next checkpoint, which comes after an evaluation.
  outage = cut_off(store, words, {"step": lambda _: store.stop()})
  store.start()
  again = script(store, *words)
  assert again.returncode == 0, again.stderr
  return {"outage": outage, "again": again.stdout}


def test_a_store_that_fails_ends_a_run_with_one_line_and_code_3(remote_run):
  code, said = remote_run["outage"]
  lines = [line for line in said.splitlines() if not line.startswith("I1") and line]
  assert code == 3 and len(lines) == 1, said
  assert lines[0].startswith("error: cannot reach gs://bucket/run/")
  assert "goes on once the store answers" in lines[0]


def test_a_run_goes_on_when_its_store_is_back(remote_run):
  assert "resuming gs://bucket/run at step" in remote_run["again"]


def test_a_cut_off_run_ends_as_a_local_run_that_was_not(remote_run, store, whole_run):
  """Bit for bit."""
  got, want = checkpoint_of(store.folder / "run", 12), checkpoint_of(whole_run.workdir, 12)
  jax.tree.map(np.testing.assert_array_equal, got, want)
  assert losses_of(store.folder / "run") == losses_of(whole_run.workdir)


def test_a_run_leaves_all_its_files_in_the_store(remote_run, store):
  names = {path.name for path in (store.folder / "run").iterdir()}
  assert names >= {"config.json", "data.json", "kernels.json", "metrics.jsonl", "checkpoints"}
  events = list((store.folder / "run" / "tensorboard").iterdir())
  assert len(events) >= 2 and all(event.stat().st_size > 1000 for event in events[-1:])
  assert workdir_lib.saved_steps(epath.Path(store.folder / "run"))[-1] == 12


def test_lines_are_not_uploaded_one_by_one(remote_run, store):
  """In four starts: at each checkpoint, and when later lines are deleted."""
  assert 0 < store.writes("run/metrics.jsonl") < 12


def test_a_checkpoint_that_cannot_be_reached_is_not_damaged(remote_run, store, cache):
  """It must not be set aside, and the run must not go on from an older one."""
  store.refused.write_text("checkpoints/12/state/ocdbt")
  try:
    done = script(store, *command("gs://bucket/run", cache, steps=13))
  finally:
    store.refused.unlink()
  assert done.returncode == 3 and "cannot reach gs://bucket/run/checkpoints/12" in done.stderr
  assert workdir_lib.saved_steps(epath.Path(store.folder / "run"))[-1] == 12
  assert not (store.folder / "run" / workdir_lib.SET_ASIDE).exists()


def test_a_run_in_a_store_is_evaluated(remote_run, store, whole_run, tmp_path):
  done = script(store, sys.executable, "eval.py", "--workdir=gs://bucket/run")
  assert done.returncode == 0, done.stderr
  assert "gs://bucket/run/loss.png" in done.stdout
  assert (store.folder / "run" / "loss.png").read_bytes()[:4] == b"\x89PNG"
  got = json.loads((store.folder / "run" / "eval.json").read_text())
  _, want = evaluate(shutil.copytree(whole_run.workdir, tmp_path / "copy"))
  assert (got["loss"], got["load_ZE"]) == (want["loss"], want["load_ZE"])


def test_a_run_in_a_store_generates(remote_run, store, whole_run):
  words = ["--prompt=def ", "--max_new_tokens=4", "--temperature=0"]
  got, want = (
    script(store, sys.executable, "generate.py", f"--workdir={workdir}", *words)
    for workdir in ("gs://bucket/run", whole_run.workdir)
  )
  assert got.returncode == 0 and got.stdout == want.stdout, got.stderr


def test_a_run_begins_with_the_parameters_of_one_in_a_store(remote_run, store, whole_run, cache):
  words = ["--config.optimizer.warmup_steps=0"]
  init = "--init_from=gs://bucket/run:12"
  got = script(store, *command("gs://bucket/new", cache, *words, "--profile=1:1", init, steps=1))
  assert got.returncode == 0, got.stderr
  assert "begins with the parameters of gs://bucket/run, step 12" in got.stdout
  local = store.folder.parent / "local"
  init = f"--init_from={whole_run.workdir}:12"
  want = script(store, *command(local, cache, *words, init, steps=1))
  assert want.returncode == 0, want.stderr
  assert losses_of(store.folder / "new") == losses_of(local)
  assert list((store.folder / "new" / "profile").rglob("*.xplane.pb")), "no trace"


def test_two_processes_share_a_workdir_in_a_store(store, whole_run, cache):
  """Up to the order of sums, as one process does."""
  words = command("gs://bucket/two", cache, "--config.mesh.expert=2", "--multihost")
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    address = f"localhost:{probe.getsockname()[1]}"
  place = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
  processes = [
    subprocess.Popen(
      words, cwd=ROOT, env=ONE_DEVICE | store.env | place | {"JAX_PROCESS_ID": index}
    )
    for index in "01"
  ]
  assert [process.wait(timeout=600) for process in processes] == [0, 0]
  got, want = losses_of(store.folder / "two"), losses_of(whole_run.workdir)
  assert got == pytest.approx(want, rel=1e-5)
  assert list((store.folder / "two/checkpoints/12/state").glob("ocdbt.process_1/*"))


def test_of_four_that_begin_at_once_one_has_the_lock(store):
  code = (
    "import time; from moe_jax.storage import lock, workdir\n"
    "with lock.held(workdir.open_path('gs://bucket/locked')): time.sleep(600)"
  )
  words = [sys.executable, "-c", code]
  four = [subprocess.Popen(words, cwd=ROOT, env=ONE_DEVICE | store.env) for _ in range(4)]
  try:
    while sum(process.poll() is None for process in four) > 1:
      time.sleep(0.1)
    assert store.writes("locked/train.lock") == 1
  finally:
    for process in four:
      process.kill()
      process.wait()


def test_a_report_reads_runs_in_a_store(remote_run, store, tmp_path):
  words = [sys.executable, "-m", "moe_jax.report", "gs://bucket/run"]
  done = script(store, *words)
  assert done.returncode == 2 and "--out" in done.stderr
  done = script(store, *words, f"--out={tmp_path}")
  assert done.returncode == 0, done.stderr
  assert "run" in (tmp_path / "report.md").read_text()


def test_a_bucket_that_is_missing_is_one_line(store):
  done = script(store, sys.executable, "eval.py", "--workdir=gs://none/run")
  assert done.returncode == 2, done.stderr
  assert done.stderr.startswith("error: gs://none/run: there is no bucket gs://none")
  assert done.stderr.count("\n") == 1


def test_an_account_without_access_is_one_line(store):
  """The stand-in lets nobody into this bucket."""
  done = script(store, sys.executable, "eval.py", "--workdir=gs://closed/run")
  assert done.returncode == 2, done.stderr
  assert done.stderr.startswith("error: gs://closed/run: no access (Forbidden")
  assert "gcloud auth application-default login" in done.stderr and done.stderr.count("\n") == 1
