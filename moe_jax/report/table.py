"""Statistics of arms over their seeds; every loss is the language model's, in nats per token.

Only finished runs are counted, because the loss of an unfinished run does not describe its arm.
"""

import math
import statistics
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from moe_jax.config.run import SEEDS
from moe_jax.report.runs import ArmRuns, Run, Study, series

Value = Callable[[Run], float | np.ndarray | None]
Values = dict[str, dict[int, float]]  # of an arm, of a seed
LATE = 0.25  # "late in training" is this last part of the log lines


class Spread(NamedTuple):
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


def crossing(steps: np.ndarray, losses: np.ndarray, target: float) -> float | None:
  """Returns the first step at which a curve, linear between points, is at or below the target."""
  below = np.flatnonzero(losses <= target + 1e-9)
  if not len(below):
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


class Reached(NamedTuple):
  """The steps and the time to the target loss, and the target arm's own / these."""

  steps: Spread
  seconds: Spread | None
  speedup: float | None = None  # None if a seed is missing
  time_speedup: float | None = None


class ArmRow(NamedTuple):
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


class ArmComparison(NamedTuple):
  """The numbers of all arms."""

  rows: list[ArmRow]
  target: float | None  # the target loss
  source: str  # the evaluation that the losses of the table come from


def last_evaluation(study: Study) -> tuple[str, Callable[[Run], dict[str, Any]]]:
  """Returns where the final losses come from, and a function from a run to the result there.

  It is eval.json if all finished runs were evaluated on the same text after their last step;
  otherwise it is the last validation.
  """
  kinds = set()
  for run in (run for arm in study.arms for run in arm.finished):
    result = run.eval
    stale = "loss" not in result or result.get("step", run.step) < run.step
    kinds.add("" if stale else f"{result.get('split')} split, {result.get('tokens', 0):,} tokens")
  if len(kinds) == 1 and (kind := kinds.pop()):
    return f"eval.json: {kind}", lambda run: run.eval
  return "the last validation", lambda run: (run.validation or [{}])[-1]


def by_seed(study: Study, value: Value, *, experts: bool = False) -> Values:
  """Returns the value of every finished run that has one.

  An arm without any has {}; a dense arm is left out of values of `experts`.
  """
  return {
    arm.name: {run.seed: float(v) for run in arm.finished if (v := value(run)) is not None}
    for arm in study.arms
    if not (experts and arm.is_dense)
  }


def paired(ours: dict[int, float], theirs: dict[int, float]) -> Spread | None:
  """Returns the Spread of ours minus theirs over the seeds that both have."""
  return seed_spread(ours[seed] - theirs[seed] for seed in ours if seed in theirs)


def compare_arms(study: Study) -> ArmComparison:
  """Computes the numbers of all arms, and compares them with the study's target arm."""
  source, last = last_evaluation(study)
  losses = by_seed(study, lambda run: last(run).get("loss"))
  base = next((arm for arm in study.arms if arm.name == study.target_arm), None)
  target, own = None, None
  finals = base and seed_spread(run.curve()[1][-1] for run in base.finished if run.validation)
  if base and finals and math.isfinite(finals.mean):
    target = finals.mean
    # The target arm itself is there when its mean curve is; single seeds may never be.
    step = crossing(*mean_curve([run.curve() for run in base.finished]), target)
    own = reached(base, [step] * len(base.finished))
  rows = []
  for arm in study.arms:
    runs = arm.finished
    there = None
    if target is not None:
      steps = [step if arm is base else crossing(*run.curve(), target) for run in runs]
      there = reached(arm, steps, own)
    rates = [np.median(v) for run in arm.runs if len(v := series(run.train, "tokens_per_s")[1])]
    against = None if arm is base or not base else losses[base.name]
    rows.append(
      ArmRow(
        arm=arm,
        loss=seed_spread(last(run).get("loss") for run in runs),
        bits_per_byte=mean_of(last(run).get("bits_per_byte") for run in runs),
        difference=None if against is None else paired(losses[arm.name], against),
        reached=there,
        tokens_per_s=float(np.median(rates)) if rates else None,
        drop=mean_over((last(run).get("drop_fraction_Z") for run in runs), np.mean),
        train_drop=mean_over((late(run, "drop_fraction_Z") for run in runs), np.mean),
        max_vio=mean_over((last(run).get("max_vio_Z") for run in runs), np.mean),
        dead_experts=mean_over((last(run).get("dead_experts_Z") for run in runs), np.sum),
      )
    )
  return ArmComparison(rows, target, source)


def reached(arm: ArmRuns, steps: list[float | None], own: Reached | None = None) -> Reached | None:
  """Returns when an arm reaches the target: the mean over the seeds that do, or None.

  `steps` are those at which its finished runs are there, or None; `own` is the target arm's result,
  by default this one.
  """
  there = [(run, step) for run, step in zip(arm.finished, steps, strict=True) if step is not None]
  count = seed_spread(step for _, step in there)
  if count is None:
    return None
  found = Reached(count, seed_spread(run.seconds_at(np.array(step)) for run, step in there))
  if count.n < len(steps):
    return found
  base = own or found
  return found._replace(
    speedup=_ratio(base.steps, found.steps), time_speedup=_ratio(base.seconds, found.seconds)
  )


def _ratio(base: Spread | None, ours: Spread | None) -> float | None:
  return base.mean / ours.mean if base and ours and ours.mean else None


def mean_over(values: Iterable[Any], reduce: Callable) -> float | None:
  """Returns the mean of reduce(value) over the values that are not None or empty; or None."""
  return mean_of(reduce(value) for value in values if value is not None and len(value))


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
