"""What the sections on experts let a reader conclude."""

from collections.abc import Callable

import numpy as np

from moe_jax.report import conclusions, table
from moe_jax.report.conclusions import Quantity, apart, by_seed, lowest, mean, missing, names
from moe_jax.report.runs import Run, Study
from moe_jax.report.table import spread

_GAP = 1e-3  # nats per token; a smaller gap of causal evaluation may be rounding


def _best(values: conclusions.Values, quantity: Quantity, sentence: str) -> str:
  """Returns the sentence about the lowest arm, with {arm} and {value}, and who is apart from it."""
  order = lowest(values)
  if not order:
    return ""
  seeds = values[order[0]]
  value = f"{quantity.text(spread(seeds.values()))} ({conclusions.over_seeds(seeds)})"
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
    return conclusions.NOTHING
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


def _most(values: conclusions.Values, none: str, most: str, quantity: Quantity) -> str:
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
      tied = [n for n in order[1:] if not conclusions.clear(conclusions.difference(bits[n], best))]
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
  value = f"{Quantity(3).text(spread(seeds.values()))} ({conclusions.over_seeds(seeds)})"
  return (
    f"The experts of {order[0]} differ most between domains: separation {value}; 0 is no "
    f"difference, 1 is experts of their own. {apart(separation, Quantity(3, more='lower'))}"
  )
