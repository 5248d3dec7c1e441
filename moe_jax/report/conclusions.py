"""Says what a reader may conclude from the numbers of each section, about one line a section.

An arm is clearly higher than the lowest one if its mean difference, over the seeds that both have,
is more than twice the standard error of this paired difference. Only finished runs are counted.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from moe_jax.report import blocks, table
from moe_jax.report.runs import Run, Study
from moe_jax.report.table import ArmComparison, Value, Values, by_seed, paired, seed_spread

NOTHING = "No run is finished, so nothing can be concluded yet."
_NATS = " nats per token"
_NAMED = 5  # so many arms are named one by one
_GAP = 1e-3  # nats per token; a smaller gap of causal evaluation may be rounding


def missing_line(values: Values) -> str:
  """Names the arms that a comparison lacks; '' if it has them all."""
  arms = [name for name, seeds in values.items() if not seeds]
  are = "is" if len(arms) == 1 else "are"
  lacks = "missing here, without a usable run that has this number."
  return f"{names(arms)} {are} {lacks}" if arms else ""


def mean(seeds: dict[int, float]) -> float:
  """Returns the mean over the seeds of an arm; NaN without any."""
  return statistics.fmean(seeds.values()) if seeds else math.nan


def lowest(values: Values) -> list[str]:
  """Returns the names of the arms, the one with the lowest mean first; none with a NaN."""
  finite = [name for name in values if math.isfinite(mean(values[name]))]
  return sorted(finite, key=lambda name: mean(values[name]))


def clear(ours: dict[int, float], theirs: dict[int, float]) -> bool:
  """Returns whether ours is above theirs by more than twice the standard error of the gap."""
  gap = paired(ours, theirs)
  return gap is not None and gap.error is not None and gap.mean > 2 * gap.error + 1e-9


def names(arms: Sequence[str]) -> str:
  """Returns 'a', 'a and b', 'a, b and c', or 'a, b, c, d and 3 more'."""
  listed = list(arms)
  if len(arms) > _NAMED:
    listed = [*arms[: _NAMED - 1], f"{len(arms) - _NAMED + 1} more"]
  return " and ".join(filter(None, [", ".join(listed[:-1]), *listed[-1:]]))


def listed(groups: dict[str, list[str]], between: str) -> str:
  """Returns 'group: a and b' of each group that has arms."""
  return between.join(f"{group}: {names(arms)}" for group, arms in groups.items() if arms)


def verdict_number(seeds: dict[int, float], digits: int, unit: str) -> str:
  """Returns 'mean ± deviation unit (3 seeds)'."""
  many = "one seed" if len(seeds) == 1 else f"{len(seeds)} seeds"
  return f"{blocks.plus_minus(seed_spread(seeds.values()), digits)}{unit} ({many})"


def verdict(
  lead: str, values: Values, digits: int = 4, unit: str = "", more: str = "higher"
) -> str:
  """Returns the arm with the lowest value, and which others are clearly higher, by how much.

  With more='lower' it is the arm with the highest. Without any value it is ''.
  """
  sign = -1 if more == "lower" else 1
  signed = {name: {seed: sign * v for seed, v in seeds.items()} for name, seeds in values.items()}
  if not (order := lowest(signed)):
    return ""
  best, few = signed[order[0]], False
  kinds = (f"Clearly {more}", f"Not clearly {more}", f"{more.capitalize()}, uncertain")
  groups: dict[str, list[str]] = {kind: [] for kind in kinds}
  clearly, tied, uncertain = groups.values()
  for other, seeds in ((other, signed[other]) for other in order[1:]):
    gap = paired(seeds, best)
    if gap is None or gap.error is None:
      uncertain.append(f"{other} by {mean(seeds) - mean(best):.{digits}f}")
      continue
    few |= gap.n == 2
    side = clearly if clear(seeds, best) else tied
    side.append(f"{other} by {blocks.plus_minus(gap, digits, error=True)}")
  parts = [f"{lead}: {order[0]}, {verdict_number(values[order[0]], digits, unit)}."]
  parts.append(
    f"{listed(groups, '. ')}." if order[1:] else "There is no other arm to compare it with."
  )
  if uncertain:
    parts.append("Without two seeds that both arms have, no uncertainty is known.")
  if few:
    parts.append("With two seeds the standard error is itself a rough guess.")
  return " ".join(filter(None, [*parts, missing_line(values)]))


def most(lead: str, values: Values, digits: int, unit: str, none: str) -> str:
  """Returns the arms with the highest value, or `none` if all are zero."""
  if not (order := lowest(values)):
    return ""
  high = mean(values[order[-1]])
  top = [name for name in order if mean(values[name]) > high - 1e-9]
  return f"{lead}: {names(top)}, {verdict_number(values[top[0]], digits, unit)}." if high else none


def results_verdict(study: Study) -> str:
  """Returns which arm ends with the lowest loss, and how the target arm stands."""
  _, last = table.last_evaluation(study)
  losses = by_seed(study, lambda run: last(run).get("loss"))
  order, target = lowest(losses), study.target_arm
  lines = [study.no_target, verdict("Lowest loss", losses, unit=_NATS)]
  if len(order) > 2 and target in order[1:]:
    sides: dict[str, list[str]] = {"clearly lower": [], "clearly higher": [], "neither": []}
    for name in order:
      down = clear(losses[target], losses[name])
      side = "clearly higher" if clear(losses[name], losses[target]) else "neither"
      if name != target:
        sides["clearly lower" if down else side].append(name)
    lines.append(f"Against {target}, {listed(sides, '; ')}.")
  if diverged := [name for name in losses if losses[name] and name not in order]:
    lines.append(f"The loss of {names(diverged)} is not a finite number.")
  if not any(losses.values()):
    lines.append(NOTHING)
  return "\n".join(filter(None, lines))


def curves(study: Study, compared: ArmComparison) -> str:
  """Returns which arm reaches the target loss in the fewest steps."""
  if (target := compared.target) is None:
    return "No target arm with a finished run: steps and time to a loss are not compared."
  own, had = study.target_arm, by_seed(study, lambda run: len(run.curve()[0]) or None)
  rows = {row.arm.name: row.reached for row in compared.rows if row.arm.name != own}
  speedups = {name: row.speedup for name, row in rows.items() if row and row.speedup}
  loss = f"the target, {target:.4f} nats per token, with which {own} ends"
  if not speedups:
    return f"No other arm reaches {loss}, in every finished run. {missing_line(had)}".rstrip()
  steps = by_seed(study, lambda run: table.crossing(*run.curve(), target))
  steps = {name: seeds for name, seeds in steps.items() if name in speedups}
  first = lowest(steps)[0]
  said = verdict(f"First at {loss}", steps, 0, " steps", "later")
  fast = f"{first} is {speedups[first]:.2f} times as fast as {own}."
  return f"{said} {fast} {missing_line(had)}".rstrip()


def balance(study: Study) -> str:
  """Returns which arm has the least MaxVio, which drop most, and which have dead experts."""

  def late(name: str, reduce: Callable) -> Values:
    """Returns a metric of each MoE run, late in the training and over its layers."""
    return by_seed(study, lambda r: table.mean_over([table.late(r, name)], reduce), experts=True)

  violation = late("max_vio_Z", np.mean)
  if not any(violation.values()):
    return NOTHING
  dropped = late("drop_fraction_Z", lambda drop_Z: 100 * np.mean(drop_Z))
  dead = late("window_dead_experts_Z", np.sum)
  lines = [
    verdict("Best balanced, by MaxVio late in training", violation, 2),
    most("Most dropped", dropped, 1, "%", "No arm drops anything."),
    most("Most dead experts, of all layers", dead, 1, "", "No arm has a dead expert."),
  ]
  return "\n".join(filter(None, lines))


def capacity_verdict(study: Study) -> str:
  """Returns which arm loses least between its largest and its smallest capacity factor."""
  factors = {p["capacity_factor"] for _, run in study.runs for p in run.eval.get("capacity", [])}
  if len(factors) < 2:
    return ""
  low, high = min(factors), max(factors)

  def rise(run: Run) -> float | None:
    losses = {p["capacity_factor"]: p["loss"] for p in run.eval.get("capacity", [])}
    return losses[low] - losses[high] if {low, high} <= set(losses) else None

  against = "no limit" if high == math.inf else f"{high:g}"
  lead = f"A capacity factor of {low:g}, against {against}, costs least"
  return verdict(lead, by_seed(study, rise, experts=True), unit=_NATS)


def evaluated(*path: str) -> Value:
  """Returns a function from a run to the number at this path in its eval.json, or None."""

  def number(run: Run) -> Any:
    found: Any = run.eval
    for name in path[:-1]:
      found = found.get(name) or {}
    return found.get(path[-1])

  return number


def domains(study: Study) -> str:
  """Returns the best arm in each domain, and which routers seem to read later tokens."""
  winners: dict[str, list[str]] = {}
  for domain in study.domains:
    found = by_seed(study, evaluated("domains", domain, "bits_per_byte"))
    if len(order := lowest(found)) > 1:
      tied = [name for name in order[1:] if not clear(found[name], found[order[0]])]
      mark = f" (not clearly below {names(tied)})" if tied else ""
      winners.setdefault(order[0] + mark, []).append(domain)
  lines = [f"Fewest bits per byte in {names(where)}: {arm}." for arm, where in winners.items()]
  gaps = by_seed(study, evaluated("causal", "gap"))
  leaks = {name: seeds for name, seeds in gaps.items() if mean(seeds) > _GAP}
  if leaks:
    lines.append(f"The routers of {names([*leaks])} read later tokens.")
    lines.append(most("Largest gap", leaks, 4, _NATS, ""))
  elif any(gaps.values()):
    lines.append(f"No router reads later tokens: no gap is above {_GAP:g} nats per token.")
  either = by_seed(study, lambda run: len({"domains", "causal"} & set(run.eval)) or None)
  return "\n".join(filter(None, [*lines, missing_line(either)])) if lines else ""


def specialisation(study: Study) -> str:
  """Returns the arm whose experts tell the domains apart most."""
  separation = by_seed(
    study,
    lambda run: table.mean_over([run.routing.get("domain_separation_Z")], np.mean),
    experts=True,
  )
  lead = "Experts differ most between domains, by their separation"
  return verdict(lead, separation, 3, more="lower")
