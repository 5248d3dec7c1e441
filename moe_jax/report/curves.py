"""The report's curves of losses over steps, FLOPs and time, all with one scale of the loss."""

from collections.abc import Callable

import numpy as np

from moe_jax.report import charts, conclusions, table
from moe_jax.report.blocks import Block, Section, Text
from moe_jax.report.charts import Line
from moe_jax.report.runs import ArmRuns, Run, Study, series
from moe_jax.report.table import ArmComparison

_BINS = 40  # points of a curve of training losses, each the mean of its neighbours
_NOTE = """\
The pictures share the scale of the loss, that of the second half of the training. Bold: mean over
seeds; thin: each seed; training loss: each point the mean of its neighbours. FLOPs: counted from
the shapes, of all training steps so far."""

Way = Callable[[Run, ArmRuns, np.ndarray], np.ndarray | None]


def flops_at(run: Run, arm: ArmRuns, steps: np.ndarray) -> np.ndarray | None:
  """Returns the training FLOPs until these steps; FLOPs per token are the same for all seeds."""
  per_token = next((r.eval["flops_per_token"] for r in arm.runs if "flops_per_token" in r.eval), 0)
  tokens = run.config.get("data.batch_size", 0) * run.config.get("data.seq_len", 0)
  return per_token * tokens * steps if per_token and tokens else None


def curves_section(study: Study, compared: ArmComparison) -> Section:
  """Returns training losses over steps, and validation losses over steps, FLOPs and time."""
  ways: tuple[tuple[str, str, str, Way], ...] = (
    ("loss_steps", "steps", "step", lambda run, arm, steps: steps),
    ("loss_flops", "training FLOPs", "FLOPs", flops_at),
    ("loss_time", "wall-clock", "seconds of training", lambda run, arm, at: run.seconds_at(at)),
  )
  trained = ((arm, [series(run.train, "loss") for run in arm.drawn]) for arm in study.arms)
  training = [Line(arm, charts.binned(table.mean_curve(found), _BINS)) for arm, found in trained]
  drawn = [("loss_training", "Training loss over steps", "step", training)]
  for name, title, x, way in ways:
    drawn.append((name, f"Validation loss over {title}", x, validation(study, way)))
  y_range = charts.y_range([line for *_, lines in drawn for line in lines], crop=True)
  parts: list[Block] = []
  for name, title, x, lines in drawn:
    end = study.last_step if x == "step" else 0.0
    target = None if name == "loss_training" else compared.target
    parts += charts.chart(name, title, lines, x, "nats per token", y_range, end, target)
  parts.append(Text(_NOTE, small=True))
  return Section("Curves", parts, conclusions.curves(study, compared))


def validation(study: Study, way: Way) -> list[Line]:
  """Returns the mean curve and the seeds' curves of each arm, with `way` as their x."""
  lines = []
  for arm in study.arms:
    runs = [run for run in arm.drawn if run.validation]
    steps, losses = table.mean_curve([run.curve() for run in runs])
    where = table.mean_of(way(run, arm, steps) for run in runs)
    if where is None or not len(steps):
      continue
    seeds = [(way(run, arm, run.curve()[0]), run.curve()[1]) for run in runs if len(runs) > 1]
    lines.append(Line(arm, (where, losses), [(x, y) for x, y in seeds if x is not None]))
  return lines
