"""train.py as a process: what it writes, how a run that was cut off goes on, what is refused."""

import json
import re
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from moe_jax import config as config_lib
from tests.support.scripts import (
  ONE_DEVICE,
  built,
  checkpoint_of,
  command,
  evaluate,
  losses_of,
  refused,
  train,
)
from tests.support.toys import ROOT


@pytest.fixture
def copied_run(whole_run, tmp_path):
  return shutil.copytree(whole_run.workdir, tmp_path / "copy")


# What train.py leaves.


def test_a_run_writes_its_config(whole_run):
  config = config_lib.from_json((whole_run.workdir / "config.json").read_text())
  assert config.train.steps == 12


def test_the_metrics_hold_every_step(whole_run):
  assert sorted(losses_of(whole_run.workdir)) == list(range(1, 13))


def test_a_run_writes_tensorboard_events(whole_run):
  assert list((whole_run.workdir / "tensorboard").glob("events.*"))


@pytest.mark.parametrize("part", ["loss", "balance", "dropped", "tokens/s", "ETA"])
def test_the_line_of_a_step_shows(part, whole_run):
  lines = whole_run.output.splitlines()
  assert part in next(line for line in lines if line.startswith("step     10/12"))


def test_the_kernel_of_attention_is_printed(whole_run):
  assert "\nattention          blocks; differs from the reference by" in whole_run.output


def test_the_kernel_of_attention_is_recorded(whole_run):
  assert json.loads((whole_run.workdir / "kernels.json").read_text())["attention"] == "blocks"


def test_the_loss_falls(whole_run):
  steps = losses_of(whole_run.workdir)
  assert steps[12] < steps[1] - 0.5, "it does not learn"


def test_two_checkpoints_at_most_are_kept_and_the_last_of_all(whole_run):
  kept = {int(p.name) for p in (whole_run.workdir / "checkpoints").iterdir()}
  assert 12 in kept and len(kept) <= 2


def test_running_again_says_that_it_is_finished(whole_run, cache):
  assert "is finished: step 12 of 12" in train(whole_run.workdir, cache)


def test_another_config_in_the_same_workdir_is_refused(whole_run, cache):
  path = whole_run.workdir / "config.json"
  before = path.read_text()
  line = refused(command(whole_run.workdir, cache, "--config.optimizer.learning_rate=0.5"))
  assert "config.optimizer.learning_rate=0.5 (was 0.01)" in line
  assert path.read_text() == before


# Runs that are cut off and go on.


def stopped_at(workdir, cache, beginning, sign):
  """A run that gets a signal when it prints the line of a step, and the command run once more."""
  process = subprocess.Popen(
    command(workdir, cache), cwd=ROOT, env=ONE_DEVICE, stdout=subprocess.PIPE, text=True
  )
  for line in process.stdout:
    if line.startswith(beginning):
      process.send_signal(sign)
      break
  rest, _ = process.communicate(timeout=600)
  found = {"workdir": str(workdir), "code": process.returncode, "rest": rest}
  return found | {"again": train(workdir, cache)}


@pytest.fixture(scope="module")
def terminated(shared_folder, cache):
  return built(shared_folder / "terminated", lambda path: stopped_at(
    path / "run", cache, "step      6/12", signal.SIGTERM))  # fmt: skip


@pytest.fixture(scope="module")
def killed(shared_folder, cache):
  """Step 4 was on disk before the save of 8 began."""
  return built(shared_folder / "killed", lambda path: stopped_at(
    path / "run", cache, "step      9/12", signal.SIGKILL))  # fmt: skip


@pytest.mark.slow
def test_sigterm_saves_the_step_and_ends_with_0(terminated):
  saved = re.search(r"SIGTERM: saved step (\d+)", terminated.said["rest"])
  assert terminated.said["code"] == 0
  assert saved and 6 <= int(saved[1]) < 12, terminated.said["rest"]


@pytest.mark.slow
def test_the_same_command_goes_on_at_the_step_that_sigterm_saved(terminated):
  saved = re.search(r"SIGTERM: saved step (\d+)", terminated.said["rest"])
  line = f"resuming {terminated.said['workdir']} at step {saved[1]}"
  assert line in terminated.said["again"]


def test_the_same_command_goes_on_after_sigkill(killed):
  assert "resuming" in killed.said["again"]


def test_a_run_that_goes_on_keeps_its_kernels(killed):
  assert "attention          blocks, which the run began with" in killed.said["again"]


CUT_OFF = [pytest.param("terminated", marks=pytest.mark.slow), "killed"]


@pytest.mark.preflight
@pytest.mark.parametrize("how", CUT_OFF)
def test_a_cut_off_run_ends_with_the_same_weights_moments_and_counters(how, whole_run, request):
  """Bit for bit."""
  workdir = request.getfixturevalue(how).path / "run"
  got, want = checkpoint_of(workdir, 12), checkpoint_of(whole_run.workdir, 12)
  assert np.abs(got["bias_ZE"]).max() > 0
  jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.preflight
@pytest.mark.parametrize("how", CUT_OFF)
def test_a_cut_off_run_has_the_same_losses(how, whole_run, request):
  workdir = request.getfixturevalue(how).path / "run"
  assert losses_of(workdir) == losses_of(whole_run.workdir)


@pytest.mark.preflight
@pytest.mark.parametrize("how", CUT_OFF)
def test_a_cut_off_run_ends_at_the_same_place_in_the_data(how, whole_run, request):
  workdirs = (request.getfixturevalue(how).path / "run", whole_run.workdir)
  got, want = ((w / "checkpoints/12/data").rglob("*.json") for w in workdirs)
  assert [p.read_text() for p in got] == [p.read_text() for p in want]


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train.py", "eval.py"])
def test_other_text_is_refused(script, copied_run, cache):
  """As when another Python's standard library stands behind the same name."""
  path = copied_run / "data.json"
  text = path.read_text()
  path.write_text(text.replace(json.loads(text)["validation"], "0" * 64))
  eval_command = [sys.executable, "eval.py", f"--workdir={copied_run}"]
  line = refused(command(copied_run, cache) if script == "train.py" else eval_command)
  assert "the validation text is not the one" in line


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_with_one_line(tmp_path, cache):
  arguments = ["--config.optimizer.learning_rate=1e30", "--config.optimizer.clip_norm=0"]
  done = subprocess.run(
    command(tmp_path / "run", cache, *arguments),
    cwd=ROOT, env=ONE_DEVICE, capture_output=True, text=True, timeout=600,
  )  # fmt: skip
  assert done.returncode == 6 and done.stderr.splitlines()[-1].startswith("error: not finite at")
  assert "config.optimizer.learning_rate=1e+30" in done.stderr and "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def dense_run(shared_folder, cache):
  def build(path):
    dense = ("--config.model.moe.num_experts=0",)
    train(path / "run", cache, *dense, steps=6)
    again = train(path / "run", cache, *dense, steps=7)
    return {"again": again, "result": evaluate(path / "run")[1]}

  return built(shared_folder / "dense", build)


@pytest.mark.slow
def test_a_dense_run_has_no_biases_to_save_and_goes_on(dense_run):
  assert "resuming" in dense_run.said["again"]


@pytest.mark.slow
def test_the_evaluation_of_a_dense_run_has_no_loads(dense_run):
  result = dense_run.said["result"]
  assert result["step"] == 7 and "load_ZE" not in result
