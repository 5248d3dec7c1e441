"""Statistics of arms over their seeds; every loss is the language model's, in nats per token.

Only finished runs are counted, because the loss of an unfinished run does not describe its arm.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from moe_jax.config.run import SEEDS
from moe_jax.report.runs import ArmRuns, Run, Study, series

LATE = 0.25  # "late in training" is this last part of the log lines


@dataclasses.dataclass(frozen=True)
class Spread:
  """Mean and standard deviation of n values."""

  mean: float
  std: float | None  # of the sample (n - 1); None for a single value
  n: int

  @property
  def error(self) -> float | None:
    """Standard error of the mean."""
    return None if self.std is None else self.std / math.sqrt(self.n)


def seed_spread(values: Iterable[float | np.ndarray | None]) -> Spread | None:
  """Returns the Spread of the values that are not None, or None if there are none.

  A value that is not finite is not left out: it makes the mean NaN.
  """
  numbers = [float(v) for v in values if v is not None]
  if not numbers:
    return None
  if not all(map(math.isfinite, numbers)):
    return Spread(mean=math.nan, std=None, n=len(numbers))
  std = statistics.stdev(numbers) if len(numbers) > 1 else None
  return Spread(mean=statistics.fmean(numbers), std=std, n=len(numbers))


def crossing(steps: np.ndarray, losses: np.ndarray, target: float | None) -> float | None:
  """Returns the first step at which a curve, linear between points, is at or below the target."""
  below = np.flatnonzero(losses <= (-math.inf if target is None else target + 1e-9))
  if target is None or not len(below):
    return None
  i = below[0]
  if i == 0:
    return float(steps[0])
  part = (losses[i - 1] - target) / (losses[i - 1] - losses[i])
  part = min(part, 1.0) if math.isfinite(part) else 1.0
  return float(steps[i - 1] + part * (steps[i] - steps[i - 1]))


def mean_curve(curves: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
  """Returns the mean of the curves (x, y) that are not empty, at the x that all of them have."""
  tables = [dict(zip(x.tolist(), y.tolist(), strict=True)) for x, y in curves if len(x)]
  shared = sorted(set.intersection(*map(set, tables))) if tables else []
  means = [statistics.fmean(table[x] for table in tables) for x in shared]
  return np.array(shared, float), np.array(means, float)


@dataclasses.dataclass(frozen=True)
class Reached:
  """The steps and the time to the target loss, and the target arm's own / these."""

  steps: Spread
  seconds: Spread | None
  speedup: float | None = None  # None if a seed is missing
  time_speedup: float | None = None


@dataclasses.dataclass(frozen=True)
class ArmRow:
  """The numbers of one arm; None if a number is unknown or no run is finished."""

  arm: ArmRuns
  loss: Spread | None
  bits_per_byte: float | None  # mean of seeds
  difference: Spread | None  # from the target arm, run by run of the same seed
  reached: Reached | None
  tokens_per_s: float | None
  drop: float | None  # share of assignments in the evaluation, mean of layers and seeds
  train_drop: float | None  # the same late in training
  max_vio: float | None  # mean of layers and seeds
  dead_experts: float | None  # of all layers, mean of seeds


@dataclasses.dataclass(frozen=True)
class ArmComparison:
  """The numbers of all arms."""

  rows: list[ArmRow]
  target: float | None  # the target loss
  source: str  # the evaluation that the losses of the table come from


def evaluated(study: Study) -> str:
  """Describes the text that all finished runs were evaluated on after their last step.

  Returns '' if they were not, or not all on the same text.
  """
  kinds = set()
  for run in (run for arm in study.arms for run in arm.finished):
    result = run.eval
    stale = "loss" not in result or result.get("step", run.step) < run.step
    kinds.add("" if stale else f"{result.get('split')} split, {result.get('tokens', 0):,} tokens")
  return kinds.pop() if len(kinds) == 1 else ""


def final(kind: str) -> Callable[[Run], dict[str, Any]]:
  """Returns a function from a run to its last evaluation, of one kind for all runs.

  It is that of eval.json if `kind`, the result of `evaluated`, is not ''; otherwise it is the last
  validation.
  """
  return lambda run: run.eval if kind else (run.validation or [{}])[-1]


def compare_arms(study: Study) -> ArmComparison:
  """Computes the numbers of all arms, and compares them with the study's target arm."""
  kind = evaluated(study)
  last = final(kind)
  base = next((arm for arm in study.arms if arm.name == study.target_arm), None)
  target, own = None, None
  if base:
    finals = seed_spread(run.curve()[1][-1] for run in base.finished if run.validation)
    target = finals.mean if finals and math.isfinite(finals.mean) else None
    # The target arm itself is there when its mean curve is; single seeds may never be.
    step = crossing(*mean_curve([run.curve() for run in base.finished]), target)
    own = reached(base, [step] * len(base.finished))
  rows = []
  for arm in study.arms:
    runs = arm.finished
    is_base = arm is base
    steps = [crossing(*run.curve(), target) for run in runs]
    rates = [np.median(v) for run in arm.runs if len(v := series(run.train, "tokens_per_s")[1])]
    late_drops = (late(run, "drop_fraction_Z") for run in runs)
    rows.append(
      ArmRow(
        arm=arm,
        loss=seed_spread(last(run).get("loss") for run in runs),
        bits_per_byte=mean_of(last(run).get("bits_per_byte") for run in runs),
        difference=None if is_base or not base else paired(runs, base.finished, last),
        reached=reached(arm, [step] * len(runs) if is_base else steps, own) if base else None,
        tokens_per_s=float(np.median(rates)) if rates else None,
        drop=_mean_over(map(last, runs), "drop_fraction_Z", np.mean),
        train_drop=mean_of(np.mean(drop_Z) for drop_Z in late_drops if drop_Z is not None),
        max_vio=_mean_over(map(last, runs), "max_vio_Z", np.mean),
        dead_experts=_mean_over(map(last, runs), "dead_experts_Z", np.sum),
      )
    )
  return ArmComparison(rows, target, f"eval.json: {kind}" if kind else "the last validation")


def reached(arm: ArmRuns, steps: list[float | None], own: Reached | None = None) -> Reached | None:
  """Returns when an arm reaches the target: the mean over the seeds that do, or None.

  Args:
    arm: the arm.
    steps: at which each of its finished runs is at the target, or None.
    own: the same of the target arm; by default it is this arm.
  """
  there = [(run, step) for run, step in zip(arm.finished, steps, strict=True) if step is not None]
  count = seed_spread(step for _, step in there)
  if count is None:
    return None
  found = Reached(count, seed_spread(run.seconds_at(np.array(step)) for run, step in there))
  if count.n < len(steps):
    return found
  base = own or found
  return dataclasses.replace(
    found,
    speedup=_ratio(base.steps, found.steps),
    time_speedup=_ratio(base.seconds, found.seconds),
  )


def _ratio(base: Spread | None, ours: Spread | None) -> float | None:
  return base.mean / ours.mean if base and ours and ours.mean else None


def _mean_over(results: Iterable[dict], name: str, reduce: Callable) -> float | None:
  return mean_of(reduce(result[name]) for result in results if result.get(name))


def paired(ours: list[Run], theirs: list[Run], last: Callable[[Run], dict]) -> Spread | None:
  """Returns the Spread of differences in loss, ours minus theirs, of runs with the same seed."""
  other = {run.seed: last(run).get("loss") for run in theirs}
  pairs = [(last(run).get("loss"), other.get(run.seed)) for run in ours]
  return seed_spread(a - b for a, b in pairs if a is not None and b is not None)


def late(run: Run, name: str) -> np.ndarray | None:
  """Returns the mean of a training metric, of any shape, over the last part of the log lines."""
  values = series(run.train, name)[1]
  return values[-max(1, round(LATE * len(values))) :].mean(axis=0) if len(values) else None


def mean_of(values: Iterable[Any]) -> Any:
  """Returns the mean of the values that are not None, numbers or arrays of one shape.

  Returns None if there are none, or if their shapes differ.
  """
  arrays = [np.asarray(v, float) for v in values if v is not None]
  if not arrays or any(array.shape != arrays[0].shape for array in arrays):
    return None
  mean = np.mean(arrays, axis=0)
  return float(mean) if mean.ndim == 0 else mean


def differing(study: Study) -> dict[str, dict[str, Any]]:
  """Returns {field: {arm: value}} of the config fields that differ between arms, without seeds."""
  configs = {arm.name: next((r.config for r in arm.runs if r.config), {}) for arm in study.arms}
  configs = {name: config for name, config in configs.items() if config}
  fields = dict.fromkeys(f for config in configs.values() for f in config if f not in SEEDS)
  values = {f: {name: config.get(f, "") for name, config in configs.items()} for f in fields}
  return {f: v for f, v in values.items() if len({repr(x) for x in v.values()}) > 1}
