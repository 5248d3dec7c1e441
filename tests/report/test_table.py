"""Statistics of the results table against hand calculation."""

import math

import numpy as np
import pytest

from moe_jax import report
from moe_jax.report import blocks, runs, table
from tests.support import report_runs
from tests.support.report_runs import FINISHED, row, sweep


def test_statistics_by_hand(tmp_path):
  compared = table.compare(runs.read_sweep(sweep(tmp_path)))
  dense, moe, bad = compared.rows
  assert compared.target == pytest.approx(2.1)
  assert moe.loss.mean == pytest.approx(1.75) and moe.loss.n == 2
  assert moe.loss.std == pytest.approx(0.3 / math.sqrt(2))  # n - 1: 0.15 * sqrt(2)
  assert moe.bits_per_byte == pytest.approx(3.5)
  # 1.6 - 2.0 and 1.9 - 2.2: paired by seed, so the seeds' own spread is gone.
  assert moe.difference.mean == pytest.approx(-0.35)
  assert moe.difference.error == pytest.approx(0.05)
  assert dense.difference is None
  # 2.5 to 1.7 over 200..300 is at 2.1 half way; the other seed is there at 300.
  assert moe.reached.steps.mean == pytest.approx(275)
  assert moe.reached.seconds.mean == pytest.approx(275)
  # One dense seed ends above the target; the mean curve is there at the last step.
  assert dense.reached.steps.mean == pytest.approx(400)
  assert dense.reached.seconds.mean == pytest.approx(200)
  assert moe.reached.speedup == pytest.approx(400 / 275)
  assert moe.reached.time_speedup == pytest.approx(200 / 275)
  assert bad.reached is None
  assert moe.train_drop == pytest.approx(0.1) and moe.drop is None
  assert moe.tokens_per_s == pytest.approx(1000.5)


def test_missing_seeds_are_said(tmp_path):
  report_runs.write_run(sweep(tmp_path) / "moe/seed1", "bad", 1, 4)
  found = table.compare(runs.read_sweep(tmp_path)).rows[1].reached
  assert found.steps.mean == pytest.approx(250) and found.steps.n == 1 and found.speedup is None
  report.compare(tmp_path)
  assert row((tmp_path / "report.md").read_text(), "moe")[5] == "250 (1 of 2)"


@pytest.mark.parametrize(
  ("losses", "target", "expected"),
  [
    ([3.0, 2.0, 1.0], 1.5, 250),
    ([3.0, 2.0, 1.0], 1.0, 300),
    ([3.0, 1.0, 2.5], 2.0, 150),  # the first time
    ([3.0, 2.0, 1.0], 4.0, 100),  # before the first evaluation, nobody knows when
    ([3.0, 2.0, 1.0], 0.5, None),
    ([math.nan, 2.0, 1.0], 1.5, 250),
    ([3.0, math.nan, 1.0], 1.5, 300),
    ([math.nan, math.nan, math.nan], 1.5, None),
  ],
)
def test_crossing(losses, target, expected):
  found = table.crossing(np.array([100, 200, 300]), np.array(losses), target)
  assert found == (None if expected is None else pytest.approx(expected))


def test_spread():
  assert table.spread([]) is None and table.spread([None]) is None
  assert blocks.spread(table.spread([1.5])) == "1.5000"  # one seed has no spread
  assert blocks.spread(table.spread([1.0, 2.0, 6.0])) == "3.0000 ± 2.6458"  # sqrt((4+1+9)/2)
  assert blocks.spread(table.spread([1.0, math.nan])) == "nan"  # a divergence is not left out


def test_losses_of_one_source(tmp_path):
  """eval.json is used when all finished runs have one of their last step, else for none."""
  sweep(tmp_path)
  for arm, seed in FINISHED:
    report_runs.write_eval(tmp_path / arm / f"seed{seed}", 1.0 + seed, drop_fraction_Z=[0.2, 0.4])
  compared = table.compare(runs.read_sweep(tmp_path))
  assert compared.rows[1].loss.mean == pytest.approx(1.5) and "1,000 tokens" in compared.source
  assert compared.rows[1].drop == pytest.approx(0.3)
  assert compared.target == pytest.approx(2.1)  # of the curves, which are what reaches it
  report_runs.write_eval(tmp_path / "bad/seed0", 1.0, step=300)
  compared = table.compare(runs.read_sweep(tmp_path))
  assert compared.rows[1].loss.mean == pytest.approx(1.75) and "eval.json" not in compared.source
