"""Real runs of a sweep that has arms that fail."""

import json

import pytest

from tests.support.sweeps import whole_sweep

pytestmark = pytest.mark.slow


def test_arms_that_fail_do_not_stop_the_others_and_the_report_says_why(shared_folder, cache):
  whole = whole_sweep(shared_folder, cache)
  assert whole.said["code"] == 1 and not whole.said["errors"]
  record = json.loads((whole.path / "out/sweep.json").read_text())
  good = {"first": "finished", "second": "finished"}
  statuses = {run["arm"]: run["status"] for run in record["runs"]}
  assert statuses == good | {"diverges": "failed", "too_large": "failed"}
  text = (whole.path / "out/report.md").read_text()
  for arm, reason in (
    ("diverges", "error: not finite at step"),
    ("too_large", "TiB on each device, which has"),
  ):
    name = arm.replace("_", "\\_")
    block = text.split(f"{name}/seed0: end of its log")[1].split("```")[1]
    assert reason in block
  assert "4 arms, 4 runs: 2 finished, 2 failed." in text
