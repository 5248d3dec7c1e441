"""The report of several runs: which text, tables and pictures it holds."""

import json
import re

import pytest

from moe_jax.report import page
from tests.support import report_runs
from tests.support.report_runs import FINISHED, row, sweep, write_report


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  return write_report(sweep(tmp_path_factory.mktemp("finished")))


def test_the_path_of_the_page_is_returned(tmp_path):
  assert page.compare(sweep(tmp_path)) == (tmp_path / "report.html", [], 0)


def test_a_row_holds_the_statistics_of_its_arm(finished):
  assert row(finished.markdown, "moe")[1:7] == [
    "2",
    "1.7500 ± 0.2121",
    "3.5000",
    "-0.3500 ± 0.0500",
    "275 (1.45x)",
    "4.6 min (0.73x)",
  ]
  assert row(finished.markdown, "bad")[5:7] == ["not reached", "not reached"]
  assert "99.0" not in finished.markdown  # total losses, with auxiliary terms


def test_page_and_markdown_say(finished):
  text = finished.markdown
  for words in ("Do experts help?", "7.5x", "1.2x to 2x", "1.7500 ± 0.2121", "275 (1.45x)"):
    assert words in text and words in finished.html
  # A conclusion keeps its numbers together.
  assert '<p class="conclusion">Lowest loss: moe, 1.7500\u00a0±\u00a00.2121' in finished.html
  assert "| moe | 5.0 | 15.0 |" in text  # drops by choice
  assert "python train.py --workdir=moe/seed1" in text and "note of moe" in text
  # The fields that differ between arms, and no others.
  assert re.search(r"\| model.moe.arm \| dense \| moe \| bad \|", text.replace("\\_", "_"))
  assert "train.seed" not in text


def test_the_report_of_unfinished_runs(tmp_path):
  """One run failed at step 200, one still writes its last lines, one waits."""
  statuses = FINISHED | {("moe", 0): "failed", ("moe", 1): "running", ("bad", 1): "waiting"}
  sweep(tmp_path, statuses)
  report_runs.write_run(tmp_path / "moe/seed0", "moe", 0, 4, steps=(100, 200))
  path = tmp_path / "moe/seed1/metrics.jsonl"
  path.write_text(path.read_text()[:-30])
  alarm = {"step": 7, "alarm": "collapse", "layer": 1, "value": 1.0, "limit": 0.5, "message": "oh"}
  (tmp_path / "moe/seed1/alarms.jsonl").write_text(json.dumps(alarm) + '\n{"step": 8, "al')
  text = write_report(tmp_path).markdown
  assert row(text, "moe")[1:3] == ["0 of 2", "-"] and row(text, "moe")[-1] == "1"  # its alarms
  assert row(text, "bad")[1:3] == ["1 of 2", "3.0000"]
  for line in (
    "error: loss is nan",
    "| moe | 0 | failed | 200 |",
    "| moe | 1 | running | 400 |",
    "| moe | 1 | collapse | 1 | 7 | 1 | oh |",
    "3 finished, 1 failed, 1 running, 1 waiting",
  ):
    assert line in text


def test_a_sweep_of_which_nothing_ran_has_a_report(tmp_path):
  page.compare(sweep(tmp_path, dict.fromkeys(FINISHED, "waiting")))
  assert row((tmp_path / "report.md").read_text(), "moe")[1:3] == ["0 of 2", "-"]
