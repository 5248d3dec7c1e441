"""Statistics of the results table against hand calculation."""

import math

import numpy as np
import pytest

from moe_jax.report import blocks, runs, table
from tests.support import report_runs
from tests.support.report_runs import FINISHED, row, sweep, write_report


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
  """The sweep of support/report_runs.py: dense, moe and bad with two seeds each."""
  return table.compare_arms(runs.read_sweep(sweep(tmp_path_factory.mktemp("sweep"))))


@pytest.fixture
def dense(compared):
  return compared.rows[0]


@pytest.fixture
def moe(compared):
  return compared.rows[1]


def test_the_target_is_the_mean_loss_of_its_arm(compared):
  assert compared.target == pytest.approx(2.1)


def test_mean_and_deviation_of_the_loss(moe):
  assert moe.loss.mean == pytest.approx(1.75) and moe.loss.n == 2
  assert moe.loss.std == pytest.approx(0.3 / math.sqrt(2))  # n - 1: 0.15 * sqrt(2)


def test_bits_per_byte(moe):
  assert moe.bits_per_byte == pytest.approx(3.5)


def test_differences_are_paired_by_seed(moe):
  """1.6 - 2.0 and 1.9 - 2.2: the seeds' own spread is gone."""
  assert moe.difference.mean == pytest.approx(-0.35)
  assert moe.difference.error == pytest.approx(0.05)


def test_the_target_has_no_difference_to_itself(dense):
  assert dense.difference is None


def test_where_the_target_is_reached(moe):
  """2.5 to 1.7 over 200..300 is at 2.1 half way; the other seed is there at 300."""
  assert moe.reached.steps.mean == pytest.approx(275)
  assert moe.reached.seconds.mean == pytest.approx(275)


def test_the_mean_curve_of_the_target_reaches_it_at_the_last_step(dense):
  """Though one of its seeds ends above it."""
  assert dense.reached.steps.mean == pytest.approx(400)
  assert dense.reached.seconds.mean == pytest.approx(200)


def test_speedups_in_steps_and_in_time(moe):
  assert moe.reached.speedup == pytest.approx(400 / 275)
  assert moe.reached.time_speedup == pytest.approx(200 / 275)


def test_an_arm_that_stays_above_the_target_never_reaches_it(compared):
  assert compared.rows[2].reached is None


def test_drops_in_training_and_no_drops_without_an_evaluation(moe):
  assert moe.train_drop == pytest.approx(0.1) and moe.drop is None


def test_tokens_per_second(moe):
  assert moe.tokens_per_s == pytest.approx(1000.5)


@pytest.fixture
def one_seed_above(tmp_path):
  """A sweep in which one seed of moe never reaches the target."""
  report_runs.write_run(sweep(tmp_path) / "moe/seed1", "bad", 1, 4)
  return tmp_path


def test_a_seed_that_misses_the_target_is_left_out_of_its_steps(one_seed_above):
  reached = table.compare_arms(runs.read_sweep(one_seed_above)).rows[1].reached
  assert reached.steps.mean == pytest.approx(250)
  assert reached.steps.n == 1 and reached.speedup is None


def test_the_table_counts_the_seeds_that_reach_the_target(one_seed_above):
  assert row(write_report(one_seed_above).markdown, "moe")[5] == "250 (1 of 2)"


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


@pytest.mark.parametrize("values", [[], [None]], ids=str)
def test_nothing_has_no_spread(values):
  assert table.spread(values) is None


@pytest.mark.parametrize(("values", "text"), [
  ([1.5], "1.5000"),  # one seed has no spread
  ([1.0, 2.0, 6.0], "3.0000 ± 2.6458"),  # sqrt((4+1+9)/2)
  ([1.0, math.nan], "nan"),  # a divergence is not left out
])  # fmt: skip
def test_a_spread_is_written_as_mean_and_deviation(values, text):
  assert blocks.plus_minus(table.spread(values)) == text


@pytest.fixture
def evaluated(tmp_path):
  """A sweep whose finished runs have an eval.json of their last step."""
  sweep(tmp_path)
  for arm, seed in FINISHED:
    report_runs.write_eval(tmp_path / arm / f"seed{seed}", 1.0 + seed, drop_fraction_Z=[0.2, 0.4])
  return tmp_path


def test_losses_are_of_eval_json_if_all_runs_have_one(evaluated):
  compared = table.compare_arms(runs.read_sweep(evaluated))
  assert compared.rows[1].loss.mean == pytest.approx(1.5) and "1,000 tokens" in compared.source
  assert compared.rows[1].drop == pytest.approx(0.3)


def test_the_target_is_of_the_curves_that_reach_it(evaluated):
  assert table.compare_arms(runs.read_sweep(evaluated)).target == pytest.approx(2.1)


def test_losses_are_of_training_if_one_eval_json_is_of_another_step(evaluated):
  report_runs.write_eval(evaluated / "bad/seed0", 1.0, step=300)
  compared = table.compare_arms(runs.read_sweep(evaluated))
  assert compared.rows[1].loss.mean == pytest.approx(1.75) and "eval.json" not in compared.source
