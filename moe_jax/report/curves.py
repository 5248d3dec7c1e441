"""The report's curves of losses over steps, FLOPs and time, all with one scale of the loss."""

from collections.abc import Callable

import numpy as np

from moe_jax.report import charts, conclusions, table
from moe_jax.report.blocks import Section, Text
from moe_jax.report.charts import Axes, Line
from moe_jax.report.runs import ArmRuns, Run, Study, series
from moe_jax.report.sections import arm_names, last_step, pairs, runs_to_draw
from moe_jax.report.table import Comparison

_BINS = 40  # points of a curve of training losses, each the mean of its neighbours
_NOTE = """\
The four pictures share the scale of the loss, which is that of the second half of the training: the
first steps may lie above a picture, which then says how high. Training loss: mean over seeds, at
most {bins} points, each the mean of its neighbours. Validation: bold, mean over seeds; thin: each
seed. FLOPs: floating-point operations, counted from the shapes, of all training steps so far."""

Way = Callable[[Run, ArmRuns, np.ndarray], np.ndarray | None]


def flops_at(run: Run, arm: ArmRuns, steps: np.ndarray) -> np.ndarray | None:
  """Returns the training FLOPs until these steps; FLOPs per token are the same for all seeds."""
  per_token = next((r.eval["flops_per_token"] for r in arm.runs if "flops_per_token" in r.eval), 0)
  tokens = run.config.get("data.batch_size", 0) * run.config.get("data.seq_len", 0)
  return per_token * tokens * steps if per_token and tokens else None


def section(study: Study, compared: Comparison) -> Section:
  """Returns training losses over steps, and validation losses over steps, FLOPs and time."""
  ways: tuple[tuple[str, str, str, Way], ...] = (
    ("loss_steps", "Validation loss over steps", "step", lambda run, arm, steps: steps),
    ("loss_flops", "Validation loss over training FLOPs", "FLOPs", flops_at),
    (
      "loss_time", "Validation loss over wall-clock", "seconds of training",
      lambda run, arm, steps: run.seconds_at(steps),
    ),
  )  # fmt: skip
  drawn = [("loss_training", "Training loss over steps", "step", training(study))]
  drawn += [(name, title, x, validation(study, way)) for name, title, x, way in ways]
  y_range = charts.y_range([line for *_, lines in drawn for line in lines], crop=True)
  guide = (compared.target, "target") if compared.target is not None else None
  pictures = []
  for name, title, x, lines in drawn:
    end = last_step(study) if x == "step" else 0.0
    mark = None if name == "loss_training" else guide
    axes = Axes(x=x, y="nats per token", guide=mark, y_range=y_range, x_end=end)
    pictures += charts.chart(name, title, lines, axes)
  if not pictures:
    return Section("Curves", [])
  note = Text(_NOTE.format(bins=_BINS), small=True)
  return Section("Curves", [*pictures, note], conclusions.curves(study, compared))


def training(study: Study) -> list[Line]:
  """Returns the mean curve of the training loss of each arm."""
  names, lines = arm_names(study), []
  for arm in study.arms:
    logged = [series(run.train, "loss") for run in runs_to_draw(arm)]
    curves = [(np.array(x, float), np.array(y, float)) for x, y in logged]
    lines.append(Line(names[arm.name], charts.binned(pairs(*table.mean_curve(curves)), _BINS)))
  return lines


def validation(study: Study, way: Way) -> list[Line]:
  """Returns the mean curve and the seeds' curves of each arm, with `way` as their x."""
  names, lines = arm_names(study), []
  for arm in study.arms:
    runs = [run for run in runs_to_draw(arm) if run.validation]
    steps, losses = table.mean_curve([run.curve() for run in runs])
    where = table.mean_of(way(run, arm, steps) for run in runs)
    if where is None or not len(steps):
      continue
    thin = []
    for run in runs if len(runs) > 1 else []:
      at, values = run.curve()
      if (x := way(run, arm, at)) is not None:
        thin.append(pairs(x, values))
    lines.append(Line(names[arm.name], pairs(where, losses), thin))
  return lines
