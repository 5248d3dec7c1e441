"""Statistics of the results table against hand calculation."""

import math

import numpy as np
import pytest

from moe_jax.errors import si
from moe_jax.report import blocks, runs, table
from tests.support import report_runs
from tests.support.report_runs import FINISHED, row, sweep, write_report


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
  """The sweep of support/report_runs.py: dense, moe and bad with two seeds each."""
  return table.compare_arms(runs.read_sweep(sweep(tmp_path_factory.mktemp("sweep"))))


def test_the_losses_of_an_arm(compared):
  dense, moe, _ = compared.rows
  assert compared.target == pytest.approx(2.1)  # the mean loss of its arm
  assert moe.loss.mean == pytest.approx(1.75) and moe.loss.n == 2
  assert moe.loss.std == pytest.approx(0.3 / math.sqrt(2))  # n - 1: 0.15 * sqrt(2)
  assert moe.bits_per_byte == pytest.approx(3.5)
  assert moe.train_drop == pytest.approx(0.1) and moe.drop is None  # without an evaluation
  assert moe.tokens_per_s == pytest.approx(1000.5)
  # Paired by seed, 1.6 - 2.0 and 1.9 - 2.2: the seeds' own spread is gone.
  assert moe.difference.mean == pytest.approx(-0.35)
  assert moe.difference.error == pytest.approx(0.05) and dense.difference is None


def test_where_the_target_is_reached(compared):
  """2.5 to 1.7 over 200..300 is at 2.1 half way; the other seed is there at 300."""
  dense, moe, bad = (arm.reached for arm in compared.rows)
  assert moe.steps.mean == pytest.approx(275) and moe.seconds.mean == pytest.approx(275)
  # The mean curve of the target is there at the last step, though one seed ends above it.
  assert dense.steps.mean == pytest.approx(400) and dense.seconds.mean == pytest.approx(200)
  assert moe.speedup == pytest.approx(400 / 275) and moe.time_speedup == pytest.approx(200 / 275)
  assert bad is None


def test_a_seed_that_misses_the_target_is_left_out_of_its_steps(tmp_path):
  report_runs.write_run(sweep(tmp_path) / "moe/seed1", "bad", 1, 4)
  reached = table.compare_arms(runs.read_sweep(tmp_path)).rows[1].reached
  assert reached.steps.mean == pytest.approx(250)
  assert reached.steps.n == 1 and reached.speedup is None
  assert row(write_report(tmp_path).markdown, "moe")[5] == "250 (1 of 2)"


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
def test_where_a_curve_crosses_a_target(losses, target, expected):
  found = table.crossing(np.array([100, 200, 300]), np.array(losses), target)
  assert found == (None if expected is None else pytest.approx(expected))


def test_a_size_has_the_suffix_of_the_field():
  sizes = [0, 0.5, 999, 385_870, 46_702_792_704, -7.97e13]
  assert [si(size) for size in sizes] == ["0", "0.5", "999", "385.9k", "46.7B", "-79.7T"]
  assert [blocks.large(size) for size in (1e3, None, math.nan, math.inf)] == ["1k", "-", "-", "-"]


@pytest.mark.parametrize("values", [[], [None]], ids=str)
def test_nothing_has_no_spread(values):
  assert table.seed_spread(values) is None


@pytest.mark.parametrize(
  ("values", "text"),
  [
    ([1.5], "1.5000"),  # one seed has no spread
    ([1.0, 2.0, 6.0], "3.0000 ± 2.6458"),  # sqrt((4+1+9)/2)
    ([1.0, math.nan], "nan"),  # a divergence is not left out
  ],
)
def test_a_spread_is_written_as_mean_and_deviation(values, text):
  assert blocks.plus_minus(table.seed_spread(values)) == text


def test_losses_are_of_eval_json_if_all_runs_have_one_of_their_last_step(tmp_path):
  sweep(tmp_path)
  for arm, seed in FINISHED:
    report_runs.write_eval(tmp_path / arm / f"seed{seed}", 1.0 + seed, drop_fraction_Z=[0.2, 0.4])
  compared = table.compare_arms(runs.read_sweep(tmp_path))
  assert compared.rows[1].loss.mean == pytest.approx(1.5) and "1,000 tokens" in compared.source
  assert compared.rows[1].drop == pytest.approx(0.3)
  assert compared.target == pytest.approx(2.1)  # of the curves that reach it
  report_runs.write_eval(tmp_path / "bad/seed0", 1.0, step=300)
  compared = table.compare_arms(runs.read_sweep(tmp_path))
  assert compared.rows[1].loss.mean == pytest.approx(1.75) and "eval.json" not in compared.source
