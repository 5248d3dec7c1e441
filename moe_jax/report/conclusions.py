"""What the numbers of each section let a reader conclude, in one or two sentences.

An arm is clearly higher than the lowest one if its mean difference, over the seeds that both have,
is more than twice the standard error of this paired difference. Only finished runs are counted.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from moe_jax.report import blocks, table
from moe_jax.report.runs import Run, Study
from moe_jax.report.table import Comparison, Spread, spread

Value = Callable[[Run], float | np.ndarray | None]
Values = dict[str, dict[int, float]]  # of an arm, of a seed

NOTHING = "No run is finished, so nothing can be concluded yet."
_NAMED = 5  # so many arms are named one by one
_GAP = 1e-3  # nats per token; a smaller gap of causal evaluation may be rounding


@dataclasses.dataclass(frozen=True)
class Quantity:
  """How a sentence writes a number."""

  digits: int = 4
  unit: str = ""  # with its space
  more: str = "higher"

  def text(self, value: Spread | None, error: bool = False) -> str:
    """Returns 'mean ± deviation unit'."""
    return blocks.plus_minus(value, self.digits, error=error) + self.unit


def by_seed(study: Study, value: Value, *, experts: bool = False) -> Values:
  """Returns the value of every finished run that has one.

  An arm without any has {}, and is `missing`; a dense arm is left out of values of `experts`.
  """
  return {
    arm.name: {run.seed: float(v) for run in arm.finished if (v := value(run)) is not None}
    for arm in study.arms
    if not (experts and arm.is_dense)
  }


def missing(values: Values) -> str:
  """Names the arms that a comparison lacks; '' if it has them all."""
  arms = [name for name, seeds in values.items() if not seeds]
  return f"{_are(arms)} missing here, without a usable run that has this number." if arms else ""


def mean(seeds: dict[int, float]) -> float:
  """Returns the mean over the seeds of an arm; NaN without any."""
  return statistics.fmean(seeds.values()) if seeds else math.nan


def lowest(values: Values) -> list[str]:
  """Returns the names of the arms, the one with the lowest mean first; none with a NaN."""
  return sorted(
    (n for n in values if math.isfinite(mean(values[n]))), key=lambda n: mean(values[n])
  )


def difference(ours: dict[int, float], theirs: dict[int, float]) -> Spread | None:
  """Returns the Spread of ours minus theirs over the seeds that both have."""
  return spread(ours[seed] - theirs[seed] for seed in ours if seed in theirs)


def clear(gap: Spread | None) -> bool:
  """Returns whether a difference is more than twice its standard error above zero."""
  return gap is not None and gap.error is not None and gap.mean > 2 * gap.error + 1e-9


def names(arms: Sequence[str]) -> str:
  """Returns 'a', 'a and b', 'a, b and c', or 'a, b, c, d and 3 more'."""
  listed = list(arms)
  if len(arms) > _NAMED:
    listed = [*arms[: _NAMED - 1], f"{len(arms) - _NAMED + 1} more"]
  return listed[0] if len(listed) == 1 else f"{', '.join(listed[:-1])} and {listed[-1]}"


def over_seeds(seeds: dict[int, float]) -> str:
  """Returns what the number after '±' means."""
  return "one seed" if len(seeds) == 1 else f"± standard deviation over {len(seeds)} seeds"


def apart(values: Values, quantity: Quantity) -> str:
  """Returns which of the other arms are clearly higher than the lowest, and which are missing."""
  return f"{_apart(values, quantity)} {missing(values)}".rstrip()


def _apart(values: Values, quantity: Quantity) -> str:
  best, *others = lowest(values)
  if not others:
    return "There is no other arm to compare it with."
  differences = {name: difference(values[name], values[best]) for name in others}
  certain = {name: d for name, d in differences.items() if d is not None and d.error is not None}
  if not certain:
    by = f"{mean(values[others[0]]) - mean(values[best]):.{quantity.digits}f}{quantity.unit}"
    why = "No two arms share two seeds" if any(len(v) > 1 for v in values.values()) else "One seed"
    return f"The next, {others[0]}, is {quantity.more} by {by}. {why}: no uncertainty is known."
  far = {name: d for name, d in certain.items() if clear(d)}
  tied = {name: d for name, d in certain.items() if name not in far}
  unknown = [name for name in others if name not in certain]
  parts = []
  if tied:
    who = f"{_are(tied)} not" if len(tied) < len(others) or len(tied) == 1 else "No other arm is"
    which = "each paired difference"
    if len(tied) == 1:
      which = f"the paired difference, {quantity.text(tied[min(tied)], error=True)},"
    parts.append(f"{who} clearly {quantity.more}: {which} is at most twice its standard error.")
  if far:
    who = _are(far) if len(far) < len(others) or len(far) == 1 else "Every other arm is"
    nearest = min(far, key=lambda name: far[name].mean)
    by = "" if len(far) == 1 else f", {nearest}, the nearest,"
    by += f" by {quantity.text(far[nearest], error=True)}"
    parts.append(
      f"{who} {quantity.more} by more than twice the standard error of the paired difference:"
      f"{by.removeprefix(',')}."
    )
  if unknown:
    parts.append(f"No uncertainty is known of {names(unknown)}: fewer than two shared seeds.")
  few = [name for name, d in certain.items() if d.n == 2]
  if few:
    which = "With two seeds" if len(few) == len(certain) else f"With the two seeds of {names(few)}"
    parts.append(f"{which} the standard error is itself a rough guess.")
  return " ".join(parts)


def _are(arms: Iterable[str]) -> str:
  listed = list(arms)
  return f"{names(listed)} {'is' if len(listed) == 1 else 'are'}"


def results(study: Study) -> str:
  """Returns which arm ends with the lowest loss, and how the target arm stands."""
  last = table.final(table.evaluated(study))
  losses = by_seed(study, lambda run: last(run).get("loss"))
  lines = [study.no_target] if study.no_target else []
  if not any(losses.values()):
    return "\n".join([*lines, NOTHING])
  order, quantity = lowest(losses), Quantity(unit=" nats per token")
  if order:
    best = losses[order[0]]
    number = quantity.text(spread(best.values()))
    lines.append(
      f"{order[0]} ends lowest, at {number} ({over_seeds(best)}). {apart(losses, quantity)}"
    )
  target = study.target_arm
  if len(order) > 2 and target in order[1:]:
    lines.append(_against(losses, target, [name for name in order if name != target]))
  if diverged := [name for name in losses if losses[name] and name not in order]:
    lines.append(f"The loss of {names(diverged)} is not a finite number.")
  return "\n".join(lines)


def _against(losses: Values, target: str, others: list[str]) -> str:
  """Returns which arms are clearly better and which are clearly worse than the target arm."""
  sides: dict[str, list[str]] = {"lower": [], "higher": [], "neither": []}
  for name in others:
    ours, theirs = losses[name], losses[target]
    up, down = clear(difference(ours, theirs)), clear(difference(theirs, ours))
    sides["higher" if up else "lower" if down else "neither"].append(name)
  if len(sides["lower"]) == len(others):
    return f"Every other arm is clearly lower than {target}."
  said = "; ".join(f"{side}: {names(arms)}" for side, arms in sides.items() if arms)
  return (
    f"Against {target}, clearly {said}."
    if sides["lower"] or sides["higher"]
    else (f"No arm is clearly lower or higher than {target}.")
  )


def curves(study: Study, compared: Comparison) -> str:
  """Returns which arm reaches the target loss in the fewest steps, and in the least time."""
  if compared.target is None:
    return "No target arm with a finished run: steps and time to a loss are not compared."
  rows = {row.arm.name: row for row in compared.rows}
  own = rows.pop(study.target_arm)
  loss = f"the target, {compared.target:.4f} nats per token, with which {own.arm.name} ends"
  reached = {n: r.reached for n, r in rows.items() if r.reached and r.reached.speedup}
  if not rows:
    return f"There is no arm but {own.arm.name}, so steps and time to a loss are not compared."
  curves = by_seed(study, lambda run: len(run.curve()[0]) or None)
  if not reached:
    return f"No other arm reaches {loss}, in every finished run. {missing(curves)}".rstrip()
  target = compared.target
  steps = by_seed(study, lambda run: table.crossing(*run.curve(), target))
  steps = {name: seeds for name, seeds in steps.items() if name in reached}
  first, many = lowest(steps)[0], Quantity(digits=0, unit=" steps", more="later")
  lines = [
    f"The first arm at {loss}, is {first}, after {many.text(spread(steps[first].values()))} "
    f"({over_seeds(steps[first])}), {reached[first].speedup:.2f} times as fast as {own.arm.name}."
  ]
  if len(steps) > 1:
    lines[0] += f" {apart(steps, many)}"
  quick = {n: r for n, r in reached.items() if r.time_speedup}
  if quick:
    name = max(quick, key=lambda n: quick[n].time_speedup or 0)
    lines.append(
      f"In time the first is {name}, after {_took(quick[name].seconds)}, "
      f"{quick[name].time_speedup:.2f} times as fast as {own.arm.name}."
    )
  if late := [name for name in rows if name not in reached and curves[name]]:
    lines.append(f"Not every finished run of {names(late)} reaches it.")
  return "\n".join([*lines, missing(curves)]).rstrip()


def _took(seconds: Spread | None) -> str:
  """Returns 'mean ± deviation' of a time."""
  if seconds is None or seconds.std is None:
    return blocks.duration(seconds.mean if seconds else None)
  return f"{blocks.duration(seconds.mean)} ± {blocks.duration(seconds.std)}"


def failures(study: Study) -> str:
  """Returns how many runs did not finish, and which arms raised alarms."""
  fine = ("finished", "waiting", "damaged")
  bad = [arm.name for arm, run in study.runs if run.status not in fine]
  damaged = [arm.name for arm, run in study.runs if run.status == "damaged"]
  alarmed: dict[str, list[str]] = {}
  for arm in study.arms:
    for kind in sorted({str(alarm.get("alarm", "")) for run in arm.runs for alarm in run.alarms}):
      count = sum(any(a.get("alarm", "") == kind for a in run.alarms) for run in arm.runs)
      alarmed.setdefault(kind, []).append(f"{arm.name} ({count} of {len(arm.runs)} runs)")
  parts = []
  for arms, what in ((bad, "did not finish"), (damaged, "are damaged and left out")):
    if arms:
      of = names(list(dict.fromkeys(arms)))
      parts.append(f"{len(arms)} of {len(study.runs)} runs {what}, of {of}.")
  parts += [f"Alarms of {kind}: {names(arms)}." for kind, arms in alarmed.items()]
  return " ".join(parts) or "No run failed and no alarm was raised."


def configs(study: Study) -> str:
  """Returns in how many fields the arms differ."""
  fields = list(table.differing(study))
  if len(study.arms) == 1:
    return "There is one arm, so no field differs."
  if not fields:
    return "No field of the arms' configs differs."
  many = "one field" if len(fields) == 1 else f"{len(fields)} fields"
  return f"The arms differ in {many}, besides their seeds: {names(fields)}."


def _best(values: Values, quantity: Quantity, sentence: str) -> str:
  """Returns the sentence about the lowest arm, with {arm} and {value}, and who is apart from it."""
  order = lowest(values)
  if not order:
    return ""
  seeds = values[order[0]]
  value = f"{quantity.text(spread(seeds.values()))} ({over_seeds(seeds)})"
  return f"{sentence.format(arm=order[0], value=value)} {apart(values, quantity)}"


def _late(name: str, reduce: Callable) -> Callable[[Run], float | None]:
  def value(run: Run) -> float | None:
    late = table.late(run, name)
    return None if late is None else float(reduce(late))

  return value


def balance(study: Study) -> str:
  """Returns which arm has the least MaxVio, which drop, and which have dead experts."""
  violation = by_seed(study, _late("max_vio_Z", np.mean), experts=True)
  if not any(violation.values()):
    return NOTHING
  least = (
    "Late in training {arm} is the best balanced: its MaxVio is {value}; 0 is perfect balance."
  )
  dropped = by_seed(study, lambda run: _percent(_late("drop_fraction_Z", np.mean)(run)))
  dead = by_seed(study, _late("window_dead_experts_Z", np.sum))
  lines = [
    _best(violation, Quantity(digits=2), least),
    _most(dropped, "No arm drops anything.", "Most assignments are dropped by", Quantity(1, "%")),
    _most(
      dead, "No arm has a dead expert.", "Most dead experts, of all layers, are in", Quantity(1)
    ),
  ]
  return "\n".join(filter(None, lines))


def _percent(share: float | None) -> float | None:
  return None if share is None else 100 * share


def _most(values: Values, none: str, most: str, quantity: Quantity) -> str:
  """Returns the arm with the highest value, or `none` if all are zero."""
  order = lowest(values)
  if not order:
    return ""
  if not any(mean(values[name]) for name in order):
    return none
  high = mean(values[order[-1]])
  top = [name for name in order if mean(values[name]) > high - 1e-9]
  number = quantity.text(spread(values[top[0]].values()))
  said = f"{most} {names(top)}: {number} over {len(values[top[0]])} seed"
  said += "s" * (len(values[top[0]]) > 1)
  zero = sum(not mean(values[name]) for name in order)
  others = "the others" if zero == len(order) - len(top) else f"{zero} of the {len(order)} arms"
  return f"{said}; {others}: none." if zero else f"{said}."


def capacity(study: Study) -> str:
  """Returns which arm loses least between its largest and its smallest capacity factor."""
  factors = {float(p["capacity_factor"]) for _, r in study.runs for p in r.eval.get("capacity", [])}
  if len(factors) < 2:
    return ""
  low, high = min(factors), max(factors)

  def rise(run: Run) -> float | None:
    losses = {float(p["capacity_factor"]): p["loss"] for p in run.eval.get("capacity", [])}
    return losses[low] - losses[high] if {low, high} <= set(losses) else None

  without = "without a limit" if high == float("inf") else f"at {high:g}"
  sentence = (
    f"A capacity factor of {low:g} costs {{arm}} the least: its loss is {{value}} higher than "
    f"{without}."
  )
  return _best(by_seed(study, rise, experts=True), Quantity(unit=" nats per token"), sentence)


def _bits(domain: str) -> Callable[[Run], float | None]:
  return lambda run: run.eval.get("domains", {}).get(domain, {}).get("bits_per_byte")


def domains(study: Study) -> str:
  """Returns the best arm in each domain, and which routers seem to read later tokens."""
  winners: dict[str, list[str]] = {}
  several = False
  for domain in dict.fromkeys(d for _, run in study.runs for d in run.eval.get("domains", {})):
    bits = by_seed(study, _bits(domain))
    if order := lowest(bits):
      several = several or len(order) > 1
      best = bits[order[0]]
      tied = [n for n in order[1:] if not clear(difference(bits[n], best))]
      mark = f" (not clearly below {names(tied)})" if tied else ""
      winners.setdefault(order[0] + mark, []).append(domain)
  parts = []
  if several:
    by_domain = "; ".join(f"in {names(where)} {arm}" for arm, where in winners.items())
    parts.append(f"The arm with the fewest bits per byte: {by_domain}.")
  gaps = by_seed(study, lambda run: run.eval.get("causal", {}).get("gap"))
  leaks = [name for name in gaps if mean(gaps[name]) > _GAP]
  if leaks:
    worst = max(leaks, key=lambda name: mean(gaps[name]))
    value = Quantity(unit=" nats per token").text(spread(gaps[worst].values()))
    parts.append(f"The routers of {names(leaks)} read later tokens: the gap of {worst} is {value}.")
  elif any(gaps.values()):
    parts.append(f"No router reads later tokens: no gap is above {_GAP:g} nats per token.")
  either = by_seed(study, lambda run: len({"domains", "causal"} & set(run.eval)) or None)
  return "\n".join([*parts, missing(either)]).rstrip() if parts else ""


def specialisation(study: Study) -> str:
  """Returns the arm whose experts tell the domains apart most, and how often tokens repeat."""

  def same(run: Run) -> float | None:
    separation_Z = run.routing.get("domain_separation_Z")
    return None if not separation_Z else -float(np.mean(separation_Z))

  # The lowest of the negative values is the highest separation.
  separation = by_seed(study, same, experts=True)
  if not (order := lowest(separation)):
    return ""
  seeds = {seed: -value for seed, value in separation[order[0]].items()}
  value = f"{Quantity(3).text(spread(seeds.values()))} ({over_seeds(seeds)})"
  return (
    f"The experts of {order[0]} differ most between domains: separation {value}; 0 is no "
    f"difference, 1 is experts of their own. {apart(separation, Quantity(3, more='lower'))}"
  )
