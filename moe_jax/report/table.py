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


def spread(values: Iterable[float | np.ndarray | None]) -> Spread | None:
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


@dataclasses.dataclass(frozen=True)
class Reached:
  """The steps and the time in which an arm reached the target loss."""

  steps: Spread
  seconds: Spread | None
  speedup: float | None = None  # the target arm's own steps / these; None if a seed is missing
  time_speedup: float | None = None  # the target arm's own seconds / these


@dataclasses.dataclass(frozen=True)
class Row:
  """The numbers of one arm; None if a number is unknown or no run is finished."""

  arm: ArmRuns
  loss: Spread | None
  bits_per_byte: float | None  # mean of seeds
  difference: Spread | None  # from the target arm, run by run of the same seed
  reached: Reached | None
  tokens_per_s: float | None
  flops_per_token: float | None  # in training
  parameters: int | None
  active_parameters: int | None
  drop: float | None  # share of assignments in the evaluation, mean of layers and seeds
  train_drop: float | None  # share of assignments late in training, mean of layers and seeds
  max_vio: float | None  # mean of layers and seeds
  dead_experts: float | None  # of all layers, mean of seeds
  alarms: int


@dataclasses.dataclass(frozen=True)
class Comparison:
  """The numbers of all arms."""

  rows: list[Row]
  target: float | None  # the target loss
  source: str  # the evaluation that the losses of the table come from


def evaluated(study: Study) -> str:
  """Describes the text that all finished runs were evaluated on after their last step.

  Returns '' if they were not, or not all on the same text.
  """
  kinds = set()
  for arm in study.arms:
    for run in arm.finished:
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


def compare_arms(study: Study) -> Comparison:
  """Computes the numbers of all arms, and compares them with the study's target arm."""
  kind = evaluated(study)
  last = final(kind)
  by_name = {arm.name: arm for arm in study.arms}
  target_arm = by_name.get(study.target_arm)
  target, own = None, None
  if target_arm:
    curve = mean_curve([run.curve() for run in target_arm.finished])
    finals = spread(run.curve()[1][-1] for run in target_arm.finished if run.validation)
    target = finals.mean if finals and math.isfinite(finals.mean) else None
    own = _own(target_arm, curve, target)
  rows = [_arm_row(arm, last, target_arm, target, own) for arm in study.arms]
  source = f"eval.json: {kind}" if kind else "the last validation in training"
  return Comparison(rows, target, source)


def _own(
  arm: ArmRuns, curve: tuple[np.ndarray, np.ndarray], target: float | None
) -> Reached | None:
  """Returns when the target arm's mean curve reaches its final loss; single seeds may not."""
  step = None if target is None else crossing(*curve, target)
  if step is None:
    return None
  seconds = [run.seconds_at(np.array(step)) for run in arm.finished]
  return Reached(
    steps=Spread(mean=step, std=None, n=1), seconds=spread(seconds), speedup=1.0, time_speedup=1.0
  )


def reached(arm: ArmRuns, target: float | None, own: Reached | None) -> Reached | None:
  """Returns when the seeds of an arm reach the target: the mean over those that do, or None.

  `own` is that of the target arm.
  """
  if target is None:
    return None
  steps = [(run, crossing(*run.curve(), target)) for run in arm.finished]
  steps = [(run, step) for run, step in steps if step is not None]
  count = spread(step for _, step in steps)
  time = spread(run.seconds_at(np.array(step)) for run, step in steps)
  if count is None:
    return None
  if count.n < len(arm.finished) or own is None or not count.mean:
    return Reached(steps=count, seconds=time)
  speedup = own.steps.mean / count.mean
  if not (time and own.seconds and time.mean):
    return Reached(steps=count, seconds=time, speedup=speedup)
  time_speedup = own.seconds.mean / time.mean
  return Reached(steps=count, seconds=time, speedup=speedup, time_speedup=time_speedup)


def _arm_row(
  arm: ArmRuns,
  last: Callable[[Run], dict],
  target_arm: ArmRuns | None,
  target: float | None,
  own: Reached | None,
) -> Row:
  runs = arm.finished

  def number(name: str) -> Any:
    return next((run.eval[name] for run in arm.runs if name in run.eval), None)

  def over(name: str, reduce: Callable) -> float | None:
    return mean_of(reduce(last(run)[name]) for run in runs if last(run).get(name))

  is_target = arm is target_arm
  rates = [np.median(v) for run in arm.runs if (v := series(run.train, "tokens_per_s")[1])]
  return Row(
    arm=arm,
    loss=spread(last(run).get("loss") for run in runs),
    bits_per_byte=mean_of(last(run).get("bits_per_byte") for run in runs),
    difference=None if is_target or not target_arm else paired(runs, target_arm.finished, last),
    reached=own if is_target else reached(arm, target, own),
    tokens_per_s=float(np.median(rates)) if rates else None,
    flops_per_token=number("flops_per_token"),
    parameters=number("parameters"),
    active_parameters=number("active_parameters"),
    drop=over("drop_fraction_Z", np.mean),
    train_drop=mean_of(d.mean() for run in runs if (d := late(run, "drop_fraction_Z")) is not None),
    max_vio=over("max_vio_Z", np.mean),
    dead_experts=over("dead_experts_Z", np.sum),
    alarms=sum(len(run.alarms) for run in arm.runs),
  )


def paired(ours: list[Run], theirs: list[Run], last: Callable[[Run], dict]) -> Spread | None:
  """Returns the Spread of differences in loss, ours minus theirs, of runs with the same seed."""
  other = {run.seed: last(run).get("loss") for run in theirs}
  pairs = [(last(run).get("loss"), other.get(run.seed)) for run in ours]
  return spread(a - b for a, b in pairs if a is not None and b is not None)


def late(run: Run, name: str) -> np.ndarray | None:
  """Returns the mean of a training metric, of any shape, over the last part of the log lines."""
  values = series(run.train, name)[1]
  if not values:
    return None
  return np.mean(np.array(values[-max(1, round(LATE * len(values))) :], float), axis=0)


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
