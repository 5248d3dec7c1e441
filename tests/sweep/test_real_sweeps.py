"""Real runs of a sweep that is killed, has arms that fail, or whose disk is full."""

import json
import os
import pathlib
import re
import signal
import subprocess
import time
from typing import NamedTuple

import pytest

from moe_jax import workdir as workdir_lib
from tests.support.disks import fill, small_disk
from tests.support.sweeps import start_real

pytestmark = pytest.mark.slow
GOOD = (
  "[arm('first', {'eval.final_batches': 1, 'train.steps': 150}),"
  " arm('second', {'eval.final_batches': 1, 'train.steps': 150, 'optimizer.b2': 0.9})]"
)
BAD = (
  "[arm('diverges', {'optimizer.learning_rate': 1e30}),"
  " arm('too_large', {'model.moe.expert_dim': 2_000_000_000})]"
)
SECONDS = 1800


class Ended(NamedTuple):
  code: int
  output: str
  errors: str
  record: dict


def end(process, out) -> Ended:
  try:
    output, errors = process.communicate(timeout=SECONDS)
  except subprocess.TimeoutExpired:
    process.terminate()  # and the run of the sweep with it
    process.communicate()
    raise
  record = json.loads((out / "sweep.json").read_text())
  return Ended(process.returncode, output, errors, record)


def statuses(record):
  return {run["arm"]: run["status"] for run in record["runs"]}


def without_outcomes(record):
  """The record but for how each run ended: the second start meets the full disk elsewhere.

  It can be full before the run's end is recorded, and the run is "waiting" or "running" then.
  """
  assert not {run["status"] for run in record["runs"]} & {"finished", "failed"}
  return record | {
    "runs": [run | {"error": "", "status": "", "seconds": 0} for run in record["runs"]]
  }


def values(out, arm):
  """The losses of each logged step, and of the evaluation: decimal numbers that say every bit."""
  lines = (out / arm / "seed0/metrics.jsonl").read_text().splitlines()
  losses = [
    (line["step"], name, line[name])
    for line in map(json.loads, lines)
    for name in ("train/loss", "validation/loss")
    if name in line
  ]
  return losses, json.loads((out / arm / "seed0/eval.json").read_text())["loss"]


def wait_for_a_checkpoint(workdir):
  deadline = time.time() + SECONDS
  while not workdir_lib.saved_steps(workdir):
    assert time.time() < deadline
    time.sleep(0.02)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache):
  """A sweep that nothing disturbs but its own arms, two of which fail."""
  folder = tmp_path_factory.mktemp("whole")
  return folder / "out", end(start_real(folder, cache, f"{GOOD} + {BAD}"), folder / "out")


def test_arms_that_fail_do_not_stop_the_others(whole):
  _, ended = whole
  assert ended.code == 1 and not ended.errors
  good = {"first": "finished", "second": "finished"}
  assert statuses(ended.record) == good | {"diverges": "failed", "too_large": "failed"}


def test_the_report_says_why_arms_failed(whole):
  out, _ = whole
  text = (out / "report.md").read_text()
  for arm, reason in (
    ("diverges", "error: not finite at step"),
    ("too_large", "TiB on each device, which has"),
  ):
    name = arm.replace("_", "\\_")
    block = text.split(f"{name}/seed0: end of its log")[1].split("```")[1]
    assert reason in block
  assert "2 of 4 runs did not finish, of diverges and too\\_large." in text


def test_a_killed_sweep_ends_with_the_values_of_one_that_was_not(whole, tmp_path, cache):
  """The machine goes down in the middle of the second run."""
  first = start_real(tmp_path, cache, GOOD)
  out, log = tmp_path / "out", tmp_path / "out/second/seed0/log.txt"
  wait_for_a_checkpoint(log.parent)
  children = pathlib.Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
  first.kill()
  for child in children:
    os.kill(int(child), signal.SIGKILL)
  first.communicate()
  assert not workdir_lib.is_trained(log.parent, 150)
  assert statuses(json.loads((out / "sweep.json").read_text())) == {
    "first": "finished", "second": "running",
  }  # fmt: skip
  before = (out / "first/seed0/log.txt").read_text()
  ended = end(start_real(tmp_path, cache, GOOD), out)
  assert ended.code == 0, ended.output
  assert (out / "first/seed0/log.txt").read_text() == before
  assert re.search(r"resuming \S+ at step [1-9]", log.read_text())
  for arm in ("first", "second"):
    assert values(out, arm) == values(whole[0], arm)


def test_a_sweep_goes_on_when_a_full_disk_has_room_again(whole, tmp_path, cache):
  with small_disk(tmp_path / "out", "64m") as out:
    process = start_real(tmp_path, cache, GOOD, "--arms=first")
    log = out / "first/seed0/log.txt"
    wait_for_a_checkpoint(log.parent)
    filler = fill(out)
    ended = end(process, out)
    assert ended.code == 3 and ended.errors.count("\n") == 1, ended
    assert re.match(r"error: first/seed0: .*(No space left|a disk is full)", ended.errors)
    before = without_outcomes(ended.record)
    ended = end(start_real(tmp_path, cache, GOOD, "--arms=first"), out)
    assert ended.code == 3 and ended.errors.count("\n") == 1
    assert without_outcomes(ended.record) == before
    filler.unlink()
    ended = end(start_real(tmp_path, cache, GOOD, "--arms=first"), out)
    assert ended.code == 0, log.read_text(errors="replace")[-2000:]
    assert re.search(r"resuming \S+ at step [1-9]", log.read_text())
    assert values(out, "first") == values(whole[0], "first")
