"""train.py: what it writes, how a run that was cut off goes on, what is refused."""

import json
import re
import shutil
import signal
import subprocess

import jax
import numpy as np
import pytest

from moe_jax.config import Config
from moe_jax.config.run import changes, from_json
from tests.support.scripts import (
  ONE_DEVICE,
  built,
  call,
  checkpoint_of,
  command,
  losses_of,
  refused,
  train,
)
from tests.support.toys import ROOT


@pytest.fixture
def copied_run(whole_run, tmp_path):
  return shutil.copytree(whole_run.workdir, tmp_path / "copy")


# What train.py leaves.


def test_a_run_writes_its_files(whole_run):
  config = from_json((whole_run.workdir / "config.json").read_text())
  assert config.train.steps == 12
  assert list((whole_run.workdir / "tensorboard").glob("events.*"))
  assert json.loads((whole_run.workdir / "kernels.json").read_text())["attention"] == "blocks"


def test_a_run_prints_what_is_no_default(whole_run):
  """As --diff has it, and no other field."""
  lines = whole_run.output.split("\nmodel  ")[0].splitlines()
  config = from_json((whole_run.workdir / "config.json").read_text())
  changed = changes(Config(), config)
  assert [line.split(" = ")[0] for line in lines] == [f"config.{name}" for name in changed]
  assert "config.train.steps = 12   (default 1000)" in lines


def test_a_run_prints_its_kernel_and_its_steps(whole_run):
  assert "\nattention          blocks; differs from the reference by" in whole_run.output
  line = next(x for x in whole_run.output.splitlines() if x.startswith("step     10/12"))
  for part in ("loss", "balance", "dropped", "tokens/s", "ETA"):
    assert part in line


def test_the_metrics_hold_every_step_and_the_loss_falls(whole_run):
  steps = losses_of(whole_run.workdir)
  assert sorted(steps) == list(range(1, 13))
  assert steps[12] < steps[1] - 0.5, "it does not learn"


def test_two_checkpoints_at_most_are_kept_and_the_last_of_all(whole_run):
  kept = {int(p.name) for p in (whole_run.workdir / "checkpoints").iterdir()}
  assert 12 in kept and len(kept) <= 2


def test_running_again_says_that_it_is_finished(copied_run, cache):
  done = call(*command(copied_run, cache)[1:])
  assert done.returncode == 0 and "is finished: step 12 of 12" in done.stdout


def test_a_workdir_that_reads_as_a_pattern_is_refused(tmp_path, cache):
  assert "below a folder with '['" in refused(*command(tmp_path / "a[1]", cache)[1:])
  assert not list(tmp_path.iterdir())


def test_another_config_in_the_same_workdir_is_refused(whole_run, cache):
  path = whole_run.workdir / "config.json"
  before = path.read_text()
  line = refused(*command(whole_run.workdir, cache, "--config.optimizer.learning_rate=0.5")[1:])
  assert "config.optimizer.learning_rate=0.5 (was 0.01)" in line
  assert path.read_text() == before


# Runs that are cut off and go on.


RARELY = "--config.train.checkpoint_every=100"  # so that only SIGTERM and the end save a step


def stopped_at(workdir, cache, beginning, sign):
  """The exit code and the output of a run that gets a signal when it prints a step's line."""
  process = subprocess.Popen(
    command(workdir, cache, RARELY), cwd=ROOT, env=ONE_DEVICE, stdout=subprocess.PIPE, text=True
  )
  lines = []
  for line in process.stdout:
    lines.append(line)
    if line.startswith(beginning):
      process.send_signal(sign)
      break
  rest, _ = process.communicate(timeout=600)
  return process.returncode, "".join(lines) + rest


@pytest.fixture(scope="module")
def cut_off(shared_folder, cache):
  """A run that is stopped by SIGTERM, goes on, is killed, and goes on to its end."""

  def build(path):
    code, stopped = stopped_at(path / "run", cache, "step      3/12", signal.SIGTERM)
    killed, again = stopped_at(path / "run", cache, "step      9/12", signal.SIGKILL)
    said = {"code": code, "stopped": stopped, "killed": killed, "again": again}
    return said | {"last": train(path / "run", cache, RARELY)}

  return built(shared_folder / "cut_off", build)


def test_sigterm_saves_the_step_and_ends_with_0(cut_off):
  saved = re.search(r"SIGTERM: saved step (\d+)", cut_off.said["stopped"])
  assert cut_off.said["code"] == 0
  assert saved and 3 <= int(saved[1]) < 9, cut_off.said["stopped"]
  assert re.search(rf"resuming \S+/run at step {saved[1]}\n", cut_off.said["again"])


def test_the_same_command_goes_on_after_sigkill_with_its_kernels(cut_off):
  assert cut_off.said["killed"] == -signal.SIGKILL and "resuming" in cut_off.said["last"]
  assert "attention          blocks, which the run began with" in cut_off.said["last"]


@pytest.mark.preflight
def test_a_cut_off_run_ends_bit_for_bit_as_one_that_was_not(cut_off, whole_run):
  """With its weights, moments and counters, losses, and place in the data."""
  workdirs = (cut_off.path / "run", whole_run.workdir)
  got, want = (checkpoint_of(workdir, 12) for workdir in workdirs)
  assert np.abs(got["bias_ZE"]).max() > 0
  jax.tree.map(np.testing.assert_array_equal, got, want)
  assert losses_of(workdirs[0]) == losses_of(workdirs[1])
  got, want = ((w / "checkpoints/12/data").rglob("*.json") for w in workdirs)
  assert [p.read_text() for p in got] == [p.read_text() for p in want]


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train.py", "eval.py"])
def test_other_text_is_refused(script, copied_run, cache):
  """As when another Python's standard library stands behind the same name."""
  path = copied_run / "data.json"
  text = path.read_text()
  path.write_text(text.replace(json.loads(text)["validation"], "0" * 64))
  train_command, eval_command = command(copied_run, cache)[1:], [script, f"--workdir={copied_run}"]
  line = refused(*(train_command if script == "train.py" else eval_command))
  assert "the validation text is not the one" in line
