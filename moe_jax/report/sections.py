"""The report's sections on results: question, table, curves, failures, configs.

The sections are made of blocks; the templates format them.
"""

import json
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from moe_jax.report import blocks, charts, conclusions, table
from moe_jax.report.blocks import UNKNOWN, Block, Code, Section, Table, Text
from moe_jax.report.charts import Line
from moe_jax.report.runs import ArmRuns, Run, Study, series
from moe_jax.report.table import ArmComparison, ArmRow

_BINS = 40  # points of a curve of training losses, each the mean of its neighbours
Way = Callable[[Run, ArmRuns, np.ndarray], np.ndarray | None]
_NOTE = """\
Loss: nats per token of the language model alone, from {source}; mean ± standard deviation over
seeds, finished runs only. Conclusions: 'by' gives the paired difference ± its standard error, and
more than twice that is clear. Tokens/s: the median of the runs' medians; runs that shared a machine
slowed each other down. Dropped, MaxVio (largest load / fair share - 1) and dead experts: in that
evaluation, mean over layers (dead: sum) and seeds; in brackets late in training."""
_TARGET_NOTE = """\
Target: {target:.4f}, the mean of the validation losses with which {arm} ended its training. Steps
to target: where a seed's validation curve, linear between evaluations, first is there, mean over
seeds; for {arm}, where its mean curve is. In brackets: how many times fewer, or how many of the
seeds reach it. Difference: mean ± standard error, paired by seed."""
_CURVES_NOTE = """\
The pictures share the scale of the loss, that of the second half of the training. Bold: mean over
seeds; thin: each seed; training loss: each point the mean of its neighbours. FLOPs: counted from
the shapes, of all training steps so far."""


def question(study: Study) -> Section:
  """Returns the question of the study, and the states of its runs."""
  published = f"Published: {study.published}" if study.published else ""
  band = f"Band, stated before the run: {study.band}" if study.band else ""
  counts = Counter(run.status for _, run in study.runs)
  states = ", ".join(f"{n} {status}" for status, n in counts.items())
  count = Text(f"{len(study.arms)} arms, {len(study.runs)} runs: {states}.", small=True)
  asked = study.question.strip()
  parts = [Text(asked), Text(published), Text(band), count]
  return Section("Question" if asked else "Runs", parts, study.no_target, always=True)


def results(study: Study, compared: ArmComparison) -> Section:
  """Returns the table with a row for each arm, and its notes."""
  rows = [_cells(row, study.target_arm, compared.target) for row in compared.rows]
  notes = [Text(_NOTE.format(source=compared.source), small=True)]
  if compared.target is not None:
    note = _TARGET_NOTE.format(target=compared.target, arm=study.target_arm)
    notes.append(Text(note, small=True))
  shown = Table("", list(rows[0]), [list(row.values()) for row in rows])
  return Section("Results", [shown, *notes], conclusions.results_verdict(study))


def _cells(row: ArmRow, target_arm: str, target: float | None) -> dict[str, Any]:
  """Returns the cells of an arm by the titles of their columns."""
  planned, done = len(row.arm.runs), len(row.arm.finished)
  late = "" if row.train_drop is None else f" ({blocks.number(row.train_drop, 1, 100)})"
  flops, total, active = (
    blocks.large(next((run.eval[name] for run in row.arm.runs if name in run.eval), None))
    for name in ("flops_per_token", "parameters", "active_parameters")
  )
  cells = {
    "arm": row.arm,
    "seeds": f"{done}" if done == planned else f"{done} of {planned}",
    "validation loss": blocks.plus_minus(row.loss),
    "bits per byte": blocks.number(row.bits_per_byte, 4),
  }
  if target_arm:
    cells[f"loss minus {target_arm}"] = blocks.plus_minus(row.difference, sign="+", error=True)
    cells["steps to target"], cells["time to target"] = _reached(row, target)
  return cells | {
    "tokens/s": blocks.large(row.tokens_per_s),
    "FLOPs per token": flops,
    "parameters, active": f"{total}, {active}",
    "dropped, % (in training)": blocks.number(row.drop, 1, 100) + late * (row.drop is not None),
    "MaxVio": blocks.number(row.max_vio),
    "dead experts": blocks.number(row.dead_experts, 1),
    "alarms": str(sum(len(run.alarms) for run in row.arm.runs)),
  }


def _reached(row: ArmRow, target: float | None) -> tuple[str, str]:
  """Returns the cells of the steps and of the time to the target loss."""
  done, found = len(row.arm.finished), row.reached
  if target is None or not done:
    return UNKNOWN, UNKNOWN
  if found is None:
    return "not reached", "not reached"
  missed = f" ({found.steps.n} of {done})" if found.steps.n < done else ""
  steps, time = (
    f" ({ratio:.2f}x)" if ratio else missed for ratio in (found.speedup, found.time_speedup)
  )
  seconds = blocks.duration(found.seconds.mean if found.seconds else None)
  return f"{found.steps.mean:,.0f}{steps}", f"{seconds}{time}"


def flops_at(run: Run, arm: ArmRuns, steps: np.ndarray) -> np.ndarray | None:
  """Returns the training FLOPs until these steps; FLOPs per token are the same for all seeds."""
  per_token = next((r.eval["flops_per_token"] for r in arm.runs if "flops_per_token" in r.eval), 0)
  tokens = run.config.get("data.batch_size", 0) * run.config.get("data.seq_len", 0)
  return per_token * tokens * steps if per_token and tokens else None


def curves(study: Study, compared: ArmComparison) -> Section:
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
  parts.append(Text(_CURVES_NOTE, small=True))
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


def failures(study: Study) -> Section:
  """Returns the runs that are not finished, the ends of their logs, and all alarms."""
  damaged = [[arm, run.name, run.error] for arm, run in study.runs if run.status == "damaged"]
  fine = ("finished", "waiting", "damaged")
  bad = [(arm, run) for arm, run in study.runs if run.status not in fine]
  states = [[arm, str(run.seed), run.status, f"{run.step:,}"] for arm, run in bad]
  alarmed = []
  for arm, run in study.runs:
    groups: dict[tuple, list[dict]] = {}
    for alarm in run.alarms:
      groups.setdefault((alarm.get("alarm", ""), alarm.get("layer", -1)), []).append(alarm)
    for (kind, layer), (first, *more) in groups.items():
      where = "all" if layer == -1 else str(layer)
      said = [f"{first['step']:,}", str(1 + len(more)), str(first.get("message", ""))]
      alarmed.append([arm, str(run.seed), str(kind), where, *said])
  head = ["arm", "seed", "alarm", "layer", "first step", "times", "first message"]
  parts: list[Block] = [
    Table("Damaged runs, left out", ["arm", "run", "why"], damaged, left=(0, 1, 2)),
    Table("Runs that are not finished", ["arm", "seed", "status", "newest step"], states, (0, 2)),
    *(Code(f"{run.name}: end of its log", run.error) for _, run in bad),
    Table("Alarms", head, alarmed, left=(0, 2, 6)),
  ]
  counts = {
    "did not finish": len(bad),
    "are damaged and left out": len(damaged),
    "raised alarms": sum(bool(run.alarms) for _, run in study.runs),
  }
  said = [f"{n} of {len(study.runs)} runs {what}." for what, n in counts.items() if n]
  ended = " ".join(said) or "No run failed and no alarm was raised."
  return Section("Failures and alarms", parts, ended, always=True)


def configs(study: Study) -> Section:
  """Returns the fields that differ between arms, the arms' notes, and the commands of all runs."""
  fields = table.differing(study)
  arms = [arm for arm in study.arms if any(arm.name in v for v in fields.values())]
  rows = [
    [field, *(_plain(values.get(arm.name, "")) for arm in arms)] for field, values in fields.items()
  ]
  base = f"Base config: {study.base}. Sweep: {study.sweep or UNKNOWN}." if study.base else ""
  commands = [
    "\n".join([f"# {arm.name}, seed {run.seed}", *filter(None, (run.command, run.evaluate))])
    for arm, run in study.runs
    if run.command or run.evaluate
  ]
  parts: list[Block] = [
    Table("Fields that differ", ["field", *arms], rows),
    Table("Notes", ["arm", "note"], [[a, note] for a in study.arms for note in a.notes], (0, 1)),
    Text(base, small=True),
    Code("Commands of all runs", "\n\n".join(commands)),
  ]
  differ = conclusions.names([*fields]) if fields else "no field"
  said = f"The arms differ, besides their seeds, in {differ}."
  return Section("Configs and commands", parts, said, always=True)


def _plain(value: Any) -> str:
  if isinstance(value, float) and math.isfinite(value):
    return f"{value:g}"
  return value if isinstance(value, str) else json.dumps(value)
