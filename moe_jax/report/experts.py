"""The report's sections on experts: balance, drops, capacity, domains, specialisation."""

from collections.abc import Callable

import numpy as np

from moe_jax.report import blocks, charts, conclusions, table
from moe_jax.report.blocks import UNKNOWN, ArmName, Block, Cell, Section, Table, Text
from moe_jax.report.runs import ArmRuns, Run, Study, series
from moe_jax.report.sections import arm_names, last_step, pairs, runs_to_draw

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
_ROUTING = (
  "domain_separation_Z", "repeat_rate_Z", "repeat_random", "repeat_any_Z", "repeat_any_random",
)  # fmt: skip


def balance_section(study: Study) -> Section:
  """Returns curves and tables of the experts' balance and of drops in training."""
  names, end = arm_names(study), last_step(study)
  pictures: list[Block] = []
  for metric, title, unit, scale in (
    ("max_vio_Z", "MaxVio in training", "largest load / fair share - 1", 1),
    ("drop_fraction_Z", "Dropped in training", "% of assignments", 100),
  ):
    lines = []
    for arm in study.arms:
      points = (series(run.train, metric) for run in runs_to_draw(arm))
      curves = [(np.array(x, float), scale * np.mean(y, axis=1)) for x, y in points if x]
      lines.append(
        charts.Line(names[arm.name], charts.binned(pairs(*table.mean_curve(curves)), _BINS))
      )
    y_range = charts.y_range(lines, from_zero=True)
    axes = charts.Axes(x="step", y=f"{unit}, mean of layers", y_range=y_range, x_end=end)
    if metric == "drop_fraction_Z" and not any(y > 0 for line in lines for _, y in line.points):
      continue  # the conclusion says so
    pictures += charts.chart(metric.removesuffix("_Z"), title, lines, axes)
  parts = [*pictures, *_late(study), *_shares(study)]
  return Section("Balance", parts, conclusions.balance(study) if parts else "")


def _late(study: Study) -> list[Block]:
  """Returns a table with a row for each arm and layer and its legend, or nothing."""
  names = arm_names(study)
  rows: list[list[Cell]] = []
  for arm in study.arms:
    runs = [run for run in runs_to_draw(arm) if run.train]
    means = {name: table.mean_of(table.late(run, name) for run in runs) for name, *_ in _LATE}
    layers = next((run.layers() for run in runs if run.layers()), [])
    for z, layer in enumerate(layers):
      cells = [
        UNKNOWN if means[name] is None else blocks.number(scale * means[name][z])
        for name, _, scale, _ in _LATE
      ]
      rows.append([names[arm.name], str(layer), *cells])
  if not rows:
    return []
  title = f"Late in training (the last {table.LATE:.0%} of the log), mean over seeds"
  head = ["arm", "layer", *(head for _, head, *_ in _LATE)]
  late = _without_empty(Table(title, head, rows))
  notes = [f"{head}: {meaning}" for _, head, _, meaning in _LATE if head in late.head]
  return [late, Text(f"{'. '.join(notes)}.", small=True)]


def _without_empty(full: Table) -> Table:
  keep = [i for i in range(len(full.head)) if any(row[i] != UNKNOWN for row in full.rows)]
  rows = [[row[i] for i in keep] for row in full.rows]
  return Table(full.title, [full.head[i] for i in keep], rows, full.left)


def _shares(study: Study) -> list[Table]:
  """Returns tables of drops by rank of the choice and by the token's place in the sequence."""
  tables = []
  for metric, title, word in (
    ("drop_by_rank_ZK", "Dropped late in training by choice, %", "choice"),
    ("drop_by_position_ZP", "Dropped late in training by eighth of the sequence, %", "part"),
  ):
    names = arm_names(study)
    rows: list[list[Cell]] = []
    for arm in study.arms:
      means = table.mean_of(table.late(run, metric) for run in runs_to_draw(arm))
      if means is not None and np.any(means > 0):
        rows.append([names[arm.name], *map(blocks.percent, np.mean(means, axis=0))])
    if rows:
      width = max(map(len, rows))
      head = ["arm", *(f"{word} {i}" for i in range(1, width))]
      tables.append(Table(title, head, [row + [UNKNOWN] * (width - len(row)) for row in rows]))
  return tables


def capacity_section(study: Study) -> Section:
  """Returns loss and drops of finished runs at other capacity factors (ST-MoE, section 4.5)."""
  names = arm_names(study)
  results: dict[ArmName, dict[float, tuple[table.Spread | None, float]]] = {}
  for arm in study.arms:
    points: dict[float, list[dict]] = {}
    for run in arm.finished:
      for point in run.eval.get("capacity", []):
        points.setdefault(float(point["capacity_factor"]), []).append(point)
    if points:
      results[names[arm.name]] = {
        factor: (
          table.spread(point["loss"] for point in same),
          100 * float(np.mean([np.mean(point.get("drop_fraction_Z", 0)) for point in same])),
        )
        for factor, same in points.items()
      }
  if not results:
    return Section("Capacity in evaluation", [])
  factors = sorted({factor for points in results.values() for factor in points})
  ticks = [(i, _factor(factor)) for i, factor in enumerate(factors)]
  pictures = []
  for name, title, unit, value in (
    ("capacity_loss", "Loss under other capacity factors", "nats per token", lambda p: p[0].mean),
    ("capacity_drop", "Dropped under other capacity factors", "% of assignments", lambda p: p[1]),
  ):
    lines = [
      charts.Line(arm, [(i, value(points[f])) for i, f in enumerate(factors) if f in points])
      for arm, points in results.items()
    ]
    y_range = charts.y_range(lines, from_zero=name == "capacity_drop")
    axes = charts.Axes(x="capacity factor in evaluation", y=unit, ticks=ticks, y_range=y_range)
    pictures += charts.chart(name, title, lines, axes)
  rows: list[list[Cell]] = [
    [arm, *(_loss_and_drop(points[f]) if f in points else UNKNOWN for f in factors)]
    for arm, points in results.items()
  ]
  title = "Loss ± standard deviation over seeds / dropped in %, at each capacity factor"
  numbers = Table(title, ["arm", *(_factor(f) for f in factors)], rows)
  return Section("Capacity in evaluation", [*pictures, numbers], conclusions.capacity(study))


def _loss_and_drop(point: tuple[table.Spread | None, float]) -> str:
  loss, drop = point
  return f"{blocks.plus_minus(loss)} / {drop:.1f}"


def _factor(factor: float) -> str:
  return "no drops" if factor == float("inf") else f"{factor:g}"


def domain_section(study: Study) -> Section:
  """Returns bits per byte of each labelled domain, and the losses of causal evaluation."""
  tables = []
  domains = dict.fromkeys(d for _, run in study.runs for d in run.eval.get("domains", {}))
  if domains:
    rows = _arm_rows(
      study,
      lambda arm: [
        table.spread(
          run.eval.get("domains", {}).get(d, {}).get("bits_per_byte") for run in arm.finished
        )
        for d in domains
      ],
    )
    tables.append(
      Table("Bits per byte by domain, ± standard deviation over seeds", ["arm", *domains], rows)
    )
  if any("causal" in run.eval for _, run in study.runs):
    kinds = ("teacher_forced_loss", "loss", "gap")
    rows = _arm_rows(
      study,
      lambda arm: [
        table.spread(run.eval.get("causal", {}).get(kind) for run in arm.finished) for kind in kinds
      ],
    )
    head = ["arm", "loss, later tokens seen", "loss, later tokens hidden", "gap"]
    title = "Causal evaluation: a gap shows that the router read later tokens"
    tables.append(Table(title, head, rows))
  return Section("Domains and causality", tables, conclusions.domains(study) if tables else "")


def _arm_rows(
  study: Study, cells: Callable[[ArmRuns], list[table.Spread | None]]
) -> list[list[Cell]]:
  """Returns a row of cells for each arm that has any value."""
  names = arm_names(study)
  rows = [(arm, cells(arm)) for arm in study.arms]
  return [[names[arm.name], *map(blocks.plus_minus, row)] for arm, row in rows if any(row)]


def specialisation_section(study: Study) -> Section:
  """Returns router saturation, separation of the domains and repeats from routing.json."""
  names, lines = arm_names(study), []
  rows: list[list[Cell]] = []
  for arm in study.arms:
    runs = [run for run in arm.finished if run.routing]
    if not runs:
      continue
    columns = [table.mean_of(_by_layer(run, name) for run in runs) for name in _ROUTING]
    for z, layer in enumerate(runs[0].layers()):
      values = [None if column is None else float(column[z]) for column in columns]
      separation, *shares = values  # domain_separation_Z is the first of _ROUTING
      cells = [blocks.number(separation, 3), *map(blocks.percent, shares)]
      rows.append([names[arm.name], str(layer), *cells])
    curves = []
    for run in runs:
      points = [
        (p["step"], 100 * np.mean(p["overlap_Z"])) for p in run.routing.get("saturation", [])
      ]
      steps, overlaps = np.array(sorted(points), float).reshape(-1, 2).T
      curves.append((steps, overlaps))
    lines.append(charts.Line(names[arm.name], pairs(*table.mean_curve(curves))))
  axes = charts.Axes(
    x="step", y="% of the last checkpoint's choices", y_range=(0, 106), x_end=last_step(study)
  )
  parts: list[Block] = [*charts.chart("saturation", "Router saturation", lines, axes)]
  if rows:
    head = [
      "arm", "layer", "domain separation", "repeats first choice, %", "at random, %",
      "repeats any choice, %", "at random, %",
    ]  # fmt: skip
    parts.append(_without_empty(Table("By layer, mean over seeds", head, rows)))
    note = (
      "Domain separation: mean total-variation distance between the domains' expert histograms, "
      "0 to 1. Repeats: how often the next token of a document goes to the same expert. Router "
      "saturation: how many of a checkpoint's choices of experts are those of the last one."
    )
    parts.append(Text(note, small=True))
  return Section("Specialisation", parts, conclusions.specialisation(study) if parts else "")


def _by_layer(run: Run, name: str) -> list[float] | None:
  """Returns a value of routing.json for each layer; a single number counts for all layers."""
  value = run.routing.get(name)
  return [value] * len(run.layers()) if isinstance(value, (int, float)) else value
