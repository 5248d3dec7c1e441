"""The report's sections on experts: balance, drops, capacity, domains, specialisation."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from moe_jax.report import blocks, charts, conclusions, table
from moe_jax.report.blocks import UNKNOWN, Block, Section, Table, Text
from moe_jax.report.charts import Line
from moe_jax.report.runs import ArmRuns, Curve, Run, Study, series

_BINS = 100  # the most points of a curve that has a value for every log line
# Training metrics with one number for each layer: name, title of the column, factor, meaning.
_LATE = (
  ("max_vio_Z", "MaxVio", 1, "the largest load / the fair share - 1; 0 is balanced"),
  ("drop_fraction_Z", "dropped, %", 100, "assignments of a token to an expert that was full"),
  ("gate_drop_fraction_Z", "gate lost, %", 100, "the share of the gates' sum that was dropped"),
  ("window_dead_experts_Z", "dead experts", 1, "without a token over a window of many steps"),
  ("router_entropy_Z", "router entropy", 1, "of a token's router scores, in nats; 0 is certain"),
  ("load_entropy_Z", "load entropy", 1, "of the loads, in nats; log of the experts is balanced"),
  ("router_z_Z", "router z", 1, "the mean square of the logsumexp of the router's logits"),
  ("device_overload_Z", "device overload", 1, "the busiest device / the mean; 1 is balanced"),
)
# Of routing.json, a number for each layer or for all: name, title of the column, factor, digits.
_ROUTING = (
  ("domain_separation_Z", "domain separation", 1, 3),
  ("repeat_rate_Z", "repeats first choice, %", 100, 1),
  ("repeat_random", "at random, %", 100, 1),
  ("repeat_any_Z", "repeats any choice, %", 100, 1),
  ("repeat_any_random", "at random, %", 100, 1),
)
_ROUTING_NOTE = """\
Domain separation: mean total-variation distance between the domains' expert histograms, 0 to 1.
Repeats: how often the next token of a document goes to the same expert. Router saturation: how many
of a checkpoint's choices of experts are those of the last one."""


def balance_section(study: Study) -> Section:
  """Returns curves and tables of the experts' balance and of drops in training."""
  parts: list[Block] = []
  for metric, title, unit, scale in (
    ("max_vio_Z", "MaxVio in training, mean of layers", "largest load / fair share - 1", 1),
    ("drop_fraction_Z", "Dropped in training, mean of layers", "% of assignments", 100),
  ):
    lines = []
    for arm in study.arms:
      curve = _mean_of_layers((run.train for run in arm.drawn), metric, scale)
      lines.append(Line(arm, charts.binned(curve, _BINS)))
    if metric == "drop_fraction_Z" and not any(np.any(line.curve[1] > 0) for line in lines):
      continue  # the conclusion says so
    y_range = charts.y_range(lines, from_zero=True)
    name = metric.removesuffix("_Z")
    parts += charts.chart(name, title, lines, "step", unit, y_range, study.last_step)
  arms = {arm: [run for run in arm.drawn if run.train] for arm in study.arms}
  columns = [(name, head, scale, 2) for name, head, scale, _ in _LATE]
  title = f"Late in training (the last {table.LATE:.0%} of the log), mean over seeds"
  late = _by_layer(title, arms, columns, table.late)
  notes = [f"{head}: {what}." for _, head, _, what in _LATE if head in late.head]
  parts += [late, Text(" ".join(notes), small=True), *_shares(study)]
  return Section("Balance", parts, conclusions.balance(study))


def _mean_of_layers(logs: Iterable[list[dict[str, Any]]], metric: str, scale: int) -> Curve:
  """Returns the mean curve of several logs of a metric that has a number for each layer."""
  found = (series(log, metric) for log in logs)
  return table.mean_curve([(x, scale * y.mean(axis=1)) for x, y in found if len(x)])


def _by_layer(
  title: str,
  arms: dict[ArmRuns, list[Run]],
  columns: Sequence[tuple[str, str, int, int]],
  value: Callable[[Run, str], Any],
) -> Table:
  """Returns a table of means over seeds with a row for each arm and layer; no column is empty.

  `columns` are names of numbers with their titles, factors and digits. `value` returns such a
  number of a run: one for each layer, one for all layers, or None.
  """
  rows = []
  for arm, runs in arms.items():
    means = [table.mean_of(value(run, name) for run in runs) for name, *_ in columns]
    for z, layer in enumerate(next((run.layers() for run in runs if run.layers()), [])):
      row: list[Any] = [arm, str(layer)]
      for mean, (*_, scale, digits) in zip(means, columns, strict=True):
        here = mean[z] if np.ndim(mean) else mean
        row.append(blocks.number(here, digits, scale))
      rows.append(row)
  head = ["arm", "layer", *(head for _, head, *_ in columns)]
  keep = [i for i in range(len(head)) if any(row[i] != UNKNOWN for row in rows)]
  kept = [[row[i] for i in keep] for row in [head, *rows]]
  return Table(title, kept[0], kept[1:])


def _shares(study: Study) -> list[Table]:
  """Returns tables of drops by rank of the choice and by the token's place in the sequence."""
  tables = []
  for metric, title, word in (
    ("drop_by_rank_ZK", "Dropped late in training by choice, %", "choice"),
    ("drop_by_position_ZP", "Dropped late in training by eighth of the sequence, %", "part"),
  ):
    means = {arm: table.mean_of(table.late(run, metric) for run in arm.drawn) for arm in study.arms}
    shares = {arm: np.mean(mean, axis=0) for arm, mean in means.items() if np.any(mean)}
    width = max(map(len, shares.values()), default=0)
    head = ["arm", *(f"{word} {i + 1}" for i in range(width))]
    rows = [
      [arm, *(blocks.number(part, 1, 100) for part in share), *[UNKNOWN] * (width - len(share))]
      for arm, share in shares.items()
    ]
    tables.append(Table(title, head, rows))
  return tables


def capacity_section(study: Study) -> Section:
  """Returns loss and drops of finished runs at other capacity factors (ST-MoE, section 4.5)."""
  found = {
    arm: [point for run in arm.finished for point in run.eval.get("capacity", [])]
    for arm in study.arms
  }
  factors = sorted({point["capacity_factor"] for points in found.values() for point in points})
  ticks = ["no drops" if factor == np.inf else f"{factor:g}" for factor in factors]
  losses, drops, rows = [], [], []
  for arm, points in ((arm, points) for arm, points in found.items() if points):
    cells, curve = [UNKNOWN] * len(factors), []
    for x, factor in enumerate(factors):
      there = [point for point in points if point["capacity_factor"] == factor]
      if loss := table.seed_spread(point["loss"] for point in there):
        drop = 100 * np.mean([np.mean(point.get("drop_fraction_Z", 0)) for point in there])
        cells[x] = f"{blocks.plus_minus(loss)} / {drop:.1f}"
        curve.append((x, loss.mean, drop))
    xs, means, shares = np.array(curve).T
    losses.append(Line(arm, (xs, means)))
    drops.append(Line(arm, (xs, shares)))
    rows.append([arm, *cells])
  parts: list[Block] = []
  for name, what, unit, lines in (
    ("capacity_loss", "Loss", "nats per token", losses),
    ("capacity_drop", "Dropped", "% of assignments", drops),
  ):
    y_range = charts.y_range(lines, from_zero=lines is drops)
    title, x_label = f"{what} under other capacity factors", "capacity factor in evaluation"
    parts += charts.chart(name, title, lines, x_label, unit, y_range, ticks=ticks)
  title = "Loss ± standard deviation over seeds / dropped in %, at each capacity factor"
  parts.append(Table(title, ["arm", *ticks], rows))
  return Section("Capacity in evaluation", parts, conclusions.capacity_verdict(study))


def domain_section(study: Study) -> Section:
  """Returns bits per byte of each labelled domain, and the losses of causal evaluation."""
  bits = {
    domain: conclusions.evaluated("domains", domain, "bits_per_byte") for domain in study.domains
  }
  causal = {
    "loss, later tokens seen": conclusions.evaluated("causal", "teacher_forced_loss"),
    "loss, later tokens hidden": conclusions.evaluated("causal", "loss"),
    "gap": conclusions.evaluated("causal", "gap"),
  }
  tables = []
  for title, columns in (
    ("Bits per byte by domain, ± standard deviation over seeds", bits),
    ("Causal evaluation: a gap shows that the router read later tokens", causal),
  ):
    spreads = {
      arm: [table.seed_spread(map(value, arm.finished)) for value in columns.values()]
      for arm in study.arms
    }
    rows = [[arm, *map(blocks.plus_minus, row)] for arm, row in spreads.items() if any(row)]
    tables.append(Table(title, ["arm", *columns], rows))
  return Section("Domains and causality", tables, conclusions.domains(study))


def specialisation_section(study: Study) -> Section:
  """Returns router saturation, separation of the domains and repeats from routing.json."""
  arms = {arm: [run for run in arm.finished if run.routing] for arm in study.arms}
  lines = []
  for arm, runs in arms.items():
    logs = (run.routing.get("saturation", []) for run in runs)
    lines.append(Line(arm, _mean_of_layers(logs, "overlap_Z", 100)))
  title, unit = "Router saturation", "% of the last checkpoint's choices"
  drawn = charts.chart("saturation", title, lines, "step", unit, (0, 106), study.last_step)
  numbers = _by_layer("By layer, mean over seeds", arms, _ROUTING, lambda r, n: r.routing.get(n))
  parts: list[Block] = [*drawn, numbers, Text(_ROUTING_NOTE, small=True)]
  return Section("Specialisation", parts, conclusions.specialisation(study))
