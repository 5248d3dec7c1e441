"""The report's sections on experts: balance, drops, capacity, domains, specialisation."""

from collections.abc import Callable

import numpy as np

from moe_jax.report import blocks, charts, table
from moe_jax.report.blocks import UNKNOWN, ArmName, Block, Cell, Section, Table, Text
from moe_jax.report.runs import Arm, Run, Study, series
from moe_jax.report.sections import arm_names, drawn, pairs

_BINS = 100  # points of a curve with a value for every log line
# Training metrics that one number a layer says; shown where a run has them.
_LATE = (
  ("max_vio_Z", "MaxVio", 1), ("drop_fraction_Z", "dropped, %", 100),
  ("gate_drop_fraction_Z", "gate lost, %", 100), ("window_dead_experts_Z", "dead experts", 1),
  ("router_entropy_Z", "router entropy", 1), ("load_entropy_Z", "load entropy", 1),
  ("router_z_Z", "router z", 1), ("device_overload_Z", "device overload", 1),
)  # fmt: skip
_ROUTING = (
  "domain_separation_Z", "repeat_rate_Z", "repeat_random", "repeat_any_Z", "repeat_any_random",
)  # fmt: skip


def binned(points: charts.Points, bins: int = _BINS) -> charts.Points:
  """Means of neighbours, so that at most `bins` are left."""
  if len(points) <= bins:
    return points
  return [tuple(np.mean(part, axis=0)) for part in np.array_split(np.array(points), bins)]


def balance(study: Study) -> Section:
  names = arm_names(study)
  found: list[Block] = []
  for metric, title, unit, scale in (
    ("max_vio_Z", "MaxVio in training", "largest load / fair share - 1", 1),
    ("drop_fraction_Z", "Dropped in training", "% of assignments", 100),
  ):
    lines = []
    for arm in study.arms:
      each = (series(run.train, metric) for run in drawn(arm))
      curves = [(np.array(x, float), scale * np.mean(y, axis=1)) for x, y in each if x]
      lines.append(charts.Line(names[arm.name], binned(pairs(*table.mean_curve(curves)))))
    axes = charts.Axes(x="step", y=f"{unit}, mean of layers", from_zero=True)
    found += charts.chart(metric.removesuffix("_Z"), title, lines, axes)
  return Section("Balance", [*found, *_late(study), *_shares(study)])


def _late(study: Study) -> list[Table]:
  """A row for each arm and layer."""
  names = arm_names(study)
  rows: list[list[Cell]] = []
  for arm in study.arms:
    means = {name: table.mean_of(table.late(r, name) for r in drawn(arm)) for name, _, _ in _LATE}
    layers = next((run.layers() for run in drawn(arm) if run.layers()), [])
    for z, layer in enumerate(layers):
      cells = [
        UNKNOWN if means[name] is None else blocks.number(scale * means[name][z])
        for name, _, scale in _LATE
      ]
      rows.append([names[arm.name], str(layer), *cells])
  if not rows:
    return []
  title = f"Late in training (the last {table.LATE:.0%} of the log), mean over seeds"
  return [_without_empty(Table(title, ["arm", "layer", *(head for _, head, _ in _LATE)], rows))]


def _without_empty(full: Table) -> Table:
  keep = [i for i in range(len(full.head)) if any(row[i] != UNKNOWN for row in full.rows)]
  rows = [[row[i] for i in keep] for row in full.rows]
  return Table(full.title, [full.head[i] for i in keep], rows, full.left)


def _shares(study: Study) -> list[Table]:
  """Who is dropped: by choice rank, and by where in the sequence the token stands."""
  found = []
  for metric, title, word in (
    ("drop_by_rank_ZK", "Dropped late in training by choice, %", "choice"),
    ("drop_by_position_ZP", "Dropped late in training by eighth of the sequence, %", "part"),
  ):
    names = arm_names(study)
    rows: list[list[Cell]] = []
    for arm in study.arms:
      means = table.mean_of(table.late(run, metric) for run in drawn(arm))
      if means is not None and np.any(means > 0):
        rows.append([names[arm.name], *map(blocks.percent, np.mean(means, axis=0))])
    if rows:
      width = max(map(len, rows))
      head = ["arm", *(f"{word} {i}" for i in range(1, width))]
      found.append(Table(title, head, [row + [UNKNOWN] * (width - len(row)) for row in rows]))
  return found


def capacity(study: Study) -> Section:
  """Loss and drops of the finished models under other capacity factors (ST-MoE, section 4.5)."""
  names = arm_names(study)
  found: dict[ArmName, dict[float, tuple[table.Spread | None, float]]] = {}
  for arm in study.arms:
    points: dict[float, list[dict]] = {}
    for run in arm.finished:
      for point in run.eval.get("capacity", []):
        points.setdefault(float(point["capacity_factor"]), []).append(point)
    if points:
      found[names[arm.name]] = {
        factor: (
          table.spread(point["loss"] for point in same),
          100 * float(np.mean([np.mean(point.get("drop_fraction_Z", 0)) for point in same])),
        )
        for factor, same in points.items()
      }
  if not found:
    return Section("Capacity in evaluation", [])
  factors = sorted({factor for points in found.values() for factor in points})
  ticks = [(i, _factor(factor)) for i, factor in enumerate(factors)]
  pictures = []
  for name, title, unit, value in (
    ("capacity_loss", "Loss under other capacity factors", "nats per token", lambda p: p[0].mean),
    ("capacity_drop", "Dropped under other capacity factors", "% of assignments", lambda p: p[1]),
  ):
    lines = [
      charts.Line(arm, [(i, value(points[f])) for i, f in enumerate(factors) if f in points])
      for arm, points in found.items()
    ]
    axes = charts.Axes(x="capacity factor in evaluation", y=unit, ticks=ticks)
    pictures += charts.chart(name, title, lines, axes)
  rows: list[list[Cell]] = [
    [arm, *(f"{blocks.spread(p[f][0])} / {p[f][1]:.1f}" if f in p else UNKNOWN for f in factors)]
    for arm, p in found.items()
  ]
  shown = Table("Loss / dropped, %", ["arm", *(_factor(f) for f in factors)], rows)
  return Section("Capacity in evaluation", [*pictures, shown])


def _factor(factor: float) -> str:
  return "no drops" if factor == float("inf") else f"{factor:g}"


def by_domain(study: Study) -> Section:
  """Bits per byte of each labelled domain, and the price of causal evaluation."""
  found = []
  domains = dict.fromkeys(d for _, run in study.runs for d in run.eval.get("domains", {}))
  if domains:
    rows = _rows(
      study,
      lambda arm: [
        table.spread(
          run.eval.get("domains", {}).get(d, {}).get("bits_per_byte") for run in arm.finished
        )
        for d in domains
      ],
    )
    found.append(Table("Bits per byte by domain", ["arm", *domains], rows))
  if any("causal" in run.eval for _, run in study.runs):
    kinds = ("teacher_forced_loss", "loss", "gap")
    rows = _rows(
      study,
      lambda arm: [
        table.spread(run.eval.get("causal", {}).get(kind) for run in arm.finished) for kind in kinds
      ],
    )
    head = ["arm", "loss, all tokens at once", "loss, token by token", "gap"]
    found.append(
      Table("Evaluated causally: a gap is what the router saw of the future", head, rows)
    )
  return Section("Domains and causality", found)


def _rows(study: Study, cells: Callable[[Arm], list[table.Spread | None]]) -> list[list[Cell]]:
  """A row for each arm that has anything."""
  names = arm_names(study)
  made = [(arm, cells(arm)) for arm in study.arms]
  return [[names[a.name], *map(blocks.spread, row)] for a, row in made if any(row)]


def specialisation(study: Study) -> Section:
  names, lines = arm_names(study), []
  rows: list[list[Cell]] = []
  for arm in study.arms:
    runs = [run for run in arm.finished if run.routing]
    if not runs:
      continue
    columns = [table.mean_of(_by_layer(run, name) for run in runs) for name in _ROUTING]
    for z, layer in enumerate(runs[0].layers()):
      values = [None if column is None else float(column[z]) for column in columns]
      cells = [blocks.number(values[0], 3), *map(blocks.percent, values[1:])]
      rows.append([names[arm.name], str(layer), *cells])
    curves = []
    for run in runs:
      points = [
        (p["step"], 100 * np.mean(p["overlap_Z"])) for p in run.routing.get("saturation", [])
      ]
      steps, overlaps = np.array(sorted(points), float).reshape(-1, 2).T
      curves.append((steps, overlaps))
    lines.append(charts.Line(names[arm.name], pairs(*table.mean_curve(curves))))
  axes = charts.Axes(x="step", y="% of the last checkpoint's choices made already")
  found: list[Block] = [*charts.chart("saturation", "Router saturation", lines, axes)]
  if rows:
    head = [
      "arm", "layer", "domain separation", "repeats first choice, %", "at random, %",
      "repeats any choice, %", "at random, %",
    ]  # fmt: skip
    found.append(_without_empty(Table("By layer, mean over seeds", head, rows)))
    note = (
      "Domain separation: mean total-variation distance between the domains' expert histograms, "
      "0 to 1. Repeats: how often the next token of a document goes to the same expert."
    )
    found.append(Text(note, small=True))
  return Section("Specialisation", found)


def _by_layer(run: Run, name: str) -> list[float] | None:
  """A value of routing.json for each layer; one number stands for all layers."""
  value = run.routing.get(name)
  return [value] * len(run.layers()) if isinstance(value, (int, float)) else value
