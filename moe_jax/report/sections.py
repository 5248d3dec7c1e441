"""The report's sections on results: question, table, failures, configs.

The sections are made of blocks; markdown.py and page.py format them.
"""

import json
import math
from collections import Counter
from typing import Any

import numpy as np

from moe_jax.report import blocks, charts, conclusions, table
from moe_jax.report.blocks import UNKNOWN, ArmName, Block, Cell, Code, Section, Table, Text
from moe_jax.report.runs import ArmRuns, Run, Study
from moe_jax.report.table import Comparison, Row

_NOTE = """\
Loss: nats per token of the language model alone, from {source}; mean ± standard deviation of the
sample over seeds, finished runs only. Tokens/s: the median of the runs' medians; runs that shared a
machine slowed each other down. Dropped, MaxVio (largest load / fair share - 1) and dead experts: in
that evaluation, mean over layers (dead: sum) and seeds; in brackets over the last quarter of the
training."""
_TARGET_NOTE = """\
Target: {target:.4f}, the mean of the validation losses with which {arm} ended its training. Steps
to target: the step at which a seed's validation curve, linear between evaluations, first reaches
the target, mean over seeds; for {arm} itself, the step at which its mean curve does. In brackets:
how many times fewer, or how many of the seeds reach the target. Difference: mean ± standard error,
paired by seed."""


def arm_names(study: Study) -> dict[str, ArmName]:
  """Returns the cell of each arm by its name."""
  return {arm.name: ArmName(arm.name, colour) for colour, arm in enumerate(study.arms)}


def question(study: Study) -> Section:
  """Returns the question of the study, and the states of its runs."""
  texts = [Text(study.question)] if study.question.strip() else []
  if study.published:
    texts.append(Text(f"Published   {study.published}"))
  if study.band:
    texts.append(Text(f"Band   stated before the run: {study.band}"))
  counts = Counter(run.status for _, run in study.runs)
  states = ", ".join(f"{n} {status}" for status, n in counts.items())
  texts.append(Text(f"{len(study.arms)} arms, {len(study.runs)} runs: {states}.", small=True))
  return Section("Question" if study.question.strip() else "Runs", texts, study.no_target)


def results(study: Study, compared: Comparison) -> Section:
  """Returns the table with a row for each arm, and its notes."""
  names = arm_names(study)
  head = ["arm", "seeds", "validation loss", "bits per byte"]
  if study.target_arm:
    head += [f"loss minus {study.target_arm}", "steps to target", "time to target"]
  head += [
    "tokens/s", "FLOPs per token", "parameters, active", "dropped, % (in training)",
    "MaxVio", "dead experts", "alarms",
  ]  # fmt: skip
  rows = [_cells(row, names[row.arm.name], compared, study.target_arm) for row in compared.rows]
  notes = [Text(_NOTE.format(source=compared.source), small=True)]
  if compared.target is not None:
    note = _TARGET_NOTE.format(target=compared.target, arm=study.target_arm)
    notes.append(Text(note, small=True))
  return Section("Results", [Table("", head, rows), *notes], conclusions.results(study))


def _cells(row: Row, name: ArmName, compared: Comparison, target_arm: str) -> list[Cell]:
  in_training = "" if row.train_drop is None else f" ({blocks.percent(row.train_drop)})"
  planned, done = len(row.arm.runs), len(row.arm.finished)
  cells: list[Cell] = [
    name,
    f"{done}" if done == planned else f"{done} of {planned}",
    blocks.plus_minus(row.loss),
    blocks.number(row.bits_per_byte, 4),
  ]
  if target_arm:
    cells += [
      UNKNOWN
      if name.name == target_arm
      else blocks.plus_minus(row.difference, sign="+", error=True),
      *_reached(row, compared.target),
    ]
  return [
    *cells,
    blocks.si(row.tokens_per_s),
    blocks.si(row.flops_per_token),
    f"{blocks.si(row.parameters)}, {blocks.si(row.active_parameters)}",
    UNKNOWN if row.drop is None else blocks.percent(row.drop) + in_training,
    blocks.number(row.max_vio),
    blocks.number(row.dead_experts, 1),
    str(row.alarms),
  ]


def _reached(row: Row, target: float | None) -> tuple[str, str]:
  """Returns the cells of the steps and of the time to the target loss."""
  done = len(row.arm.finished)
  if target is None or not done:
    return UNKNOWN, UNKNOWN
  if row.reached is None:
    return "not reached", "not reached"
  steps, seconds = row.reached.steps, row.reached.seconds
  times = blocks.duration(seconds.mean if seconds else None)
  cells = []
  for text, speedup in (
    (f"{steps.mean:,.0f}", row.reached.speedup), (times, row.reached.time_speedup),
  ):  # fmt: skip
    missed = row.reached.speedup is None and steps.n < done
    extra = f" ({steps.n} of {done})" if missed else ""
    cells.append(text + (f" ({speedup:.2f}x)" if speedup else extra))
  return cells[0], cells[1]


def runs_to_draw(arm: ArmRuns) -> list[Run]:
  """Returns the runs of an arm's curves: finished runs if any, since a failed one ends the mean."""
  return arm.finished or [run for run in arm.runs if run.train or run.validation]


def last_step(study: Study) -> float:
  """Returns the newest step of any run."""
  return max((float(run.step) for _, run in study.runs), default=0.0)


def pairs(x: np.ndarray, y: np.ndarray) -> charts.Points:
  """Returns the points of a curve."""
  return list(zip(map(float, x), map(float, y), strict=True))


def failures(study: Study) -> Section:
  """Returns the runs that are not finished, the ends of their logs, and all alarms."""
  names = arm_names(study)
  parts: list[Block] = []
  rows: list[list[Cell]]
  damaged = [(arm, run) for arm, run in study.runs if run.status == "damaged"]
  if damaged:
    rows = [[names[arm.name], run.name, run.error] for arm, run in damaged]
    parts.append(Table("Damaged runs, left out", ["arm", "run", "why"], rows, left=(0, 1, 2)))
  fine = ("finished", "waiting", "damaged")
  bad = [(arm, run) for arm, run in study.runs if run.status not in fine]
  if bad:
    rows = [[names[arm.name], str(run.seed), run.status, f"{run.step:,}"] for arm, run in bad]
    head = ["arm", "seed", "status", "newest step"]
    parts.append(Table("Runs that are not finished", head, rows, left=(0, 2)))
  parts += [Code(f"{run.name}: end of its log", run.error) for _, run in bad if run.error.strip()]
  rows = []
  for arm, run in study.runs:
    groups: dict[tuple, list[dict]] = {}
    for alarm in run.alarms:
      groups.setdefault((alarm.get("alarm", ""), alarm.get("layer", -1)), []).append(alarm)
    for (kind, layer), alarms in groups.items():
      where = "all" if layer == -1 else str(layer)
      first = alarms[0]
      said = [f"{first['step']:,}", str(len(alarms)), str(first.get("message", ""))]
      rows.append([names[arm.name], str(run.seed), str(kind), where, *said])
  if rows:
    head = ["arm", "seed", "alarm", "layer", "first step", "times", "first message"]
    parts.append(Table("Alarms", head, rows, left=(0, 2, 6)))
  return Section("Failures and alarms", parts, conclusions.failures(study))


def configs(study: Study) -> Section:
  """Returns the fields that differ between arms, the arms' notes, and the commands of all runs."""
  parts: list[Block] = []
  fields = table.differing(study)
  if fields:
    arms = [arm for arm in study.arms if any(arm.name in v for v in fields.values())]
    rows = [
      [field, *(_plain(values.get(arm.name, "")) for arm in arms)]
      for field, values in fields.items()
    ]
    parts.append(Table("Fields that differ", ["field", *(arm.name for arm in arms)], rows))
  names = arm_names(study)
  notes: list[list[Cell]] = [[names[a.name], note] for a in study.arms for note in a.notes]
  if notes:
    parts.append(Table("Notes", ["arm", "note"], notes, left=(0, 1)))
  if study.base:
    parts.append(Text(f"Base config: {study.base}. Sweep: {study.sweep or UNKNOWN}.", small=True))
  commands = []
  for arm, run in study.runs:
    lines = [line for line in (run.command, run.evaluate) if line]
    if lines:
      commands.append("\n".join([f"# {arm.name}, seed {run.seed}", *lines]))
  if commands:
    parts.append(Code("Commands of all runs", "\n\n".join(commands)))
  return Section("Configs and commands", parts, conclusions.configs(study))


def _plain(value: Any) -> str:
  if isinstance(value, str):
    return value
  if isinstance(value, float) and math.isfinite(value):
    return f"{value:g}"
  return json.dumps(value)
