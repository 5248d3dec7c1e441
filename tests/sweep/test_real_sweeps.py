"""Real runs of a sweep that is killed, or has arms that fail."""

import json
import os
import pathlib
import re
import signal
import time

import pytest

from moe_jax import workdir as workdir_lib
from tests.support.sweeps import GOOD, SECONDS, end, start_real, whole_sweep

pytestmark = pytest.mark.slow


def statuses(record):
  return {run["arm"]: run["status"] for run in record["runs"]}


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
def whole(shared_folder, cache):
  return whole_sweep(shared_folder, cache)


def test_arms_that_fail_do_not_stop_the_others(whole):
  assert whole.said["code"] == 1 and not whole.said["errors"]
  good = {"first": "finished", "second": "finished"}
  record = json.loads((whole.path / "out/sweep.json").read_text())
  assert statuses(record) == good | {"diverges": "failed", "too_large": "failed"}


def test_the_report_says_why_arms_failed(whole):
  text = (whole.path / "out/report.md").read_text()
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
  ended = end(start_real(tmp_path, cache, GOOD))
  assert ended["code"] == 0, ended["output"]
  assert (out / "first/seed0/log.txt").read_text() == before
  assert re.search(r"resuming \S+ at step [1-9]", log.read_text())
  for arm in ("first", "second"):
    assert values(out, arm) == values(whole.path / "out", arm)
