"""Real runs of a sweep that has arms that fail."""

import json

import pytest

from tests.support.sweeps import whole_sweep

pytestmark = pytest.mark.slow


def statuses(record):
  return {run["arm"]: run["status"] for run in record["runs"]}


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
