"""Makes twins of a config, dense or with other experts, of equal size or FLOPs.

Parameters and FLOPs are counted from the parameters' shapes (cost.count). The counts are linear in
the width of a feed-forward, so a division gives the width that matches; then it is checked.
"""

import dataclasses
import math
from typing import Any

from moe_jax.config import Config, Loss, MoE, override
from moe_jax.errors import UserError, si
from moe_jax.model import cost
from moe_jax.model.pattern import moe_layers
from moe_jax.moe import validation

_COUNTS = {  # by: (field of cost.Counts, its name in messages)
  "active_params": ("active", "active parameters"),
  "flops_per_token": ("flops_per_token", "FLOPs per token"),
  "total_params": ("total", "parameters"),
}
_COUNT_TOLERANCE = 0.01


@dataclasses.dataclass(frozen=True)
class Match:
  """A transform Config -> Config; see `match`."""

  kind: str
  by: str
  multiple_of: int
  fields: tuple[tuple[str, Any], ...]

  def __call__(self, config: Config) -> Config:
    return self.solve(config)[0]

  def solve(self, reference: Config) -> tuple[Config, str]:
    """Returns the twin of `reference`, whose count it equals, and a line that says how nearly.

    Raises:
      UserError: no width comes within 1%, or the twin is not a valid config.
    """
    if self.kind == "moe":
      fields = {f"model.moe.{name}": value for name, value in self.fields}
      twin, field = override(reference, fields, str(self)), "model.moe.expert_dim"
      if not twin.model.moe.num_experts:
        raise UserError(
          f"{self}: the config is dense; give the number of experts, such as num_experts=8"
        )
    else:
      if not reference.model.moe.num_experts:
        raise UserError(f"{self}: config.model.moe.num_experts=0 is dense already; match an MoE")
      loss = Loss(load_balance=0.0, router_z=0.0, z=reference.loss.z)
      twin, field = override(reference, {"model.moe": MoE(), "loss": loss}), "model.ffn_dim"
    name, unit = _COUNTS[self.by]

    def count(width: int) -> float:
      return getattr(cost.count(override(twin, {field: width}, "match")), name)

    step = math.lcm(self.multiple_of, reference.mesh.tensor)
    target, first, second = getattr(cost.count(reference), name), count(step), count(2 * step)
    width = step * max(1, round(1 + (target - first) / (second - first)))
    error = count(width) / target - 1
    comparison = f"{count(width):,.0f} {unit} against {target:,.0f} ({100 * error:+.2f}%)"
    if abs(error) > _COUNT_TOLERANCE:
      raise UserError(
        f"{self}: no width matches within 1%; the nearest, config.{field}={width}, has "
        f"{comparison}; compare larger models, or match by another count"
      )
    found = override(twin, {field: width}, str(self))
    validation.validate(found)
    note = f"{self.kind} twin by {self.by}: {field}={width}, {comparison}"
    layers = reference.model.num_layers
    dense = layers - len(moe_layers(reference.model))
    if self.kind == "dense" and dense:
      note += (
        f"; one ffn_dim for all {layers} layers, where {dense} of the reference are dense with "
        f"ffn_dim={reference.model.ffn_dim}"
      )
    return found, note

  def __str__(self) -> str:
    more = "".join(f", {name}={getattr(v, 'value', v)!r}" for name, v in self.fields)
    return f"match({self.kind!r}, by={self.by!r}{more})"


def match(kind: str, *, by: str, multiple_of: int = 1, **moe: Any) -> Match:
  """Returns a transform of a config into another model of equal cost, for an arm of a sweep.

  `match("dense", by="flops_per_token")` replaces the experts by a dense feed-forward in every
  layer, and has no auxiliary loss. `match("moe", by="flops_per_token", num_experts=64, top_k=8)`
  has other experts, whose width is solved. Nothing else changes: data and their order, initial
  scales, activation, optimizer, schedule.

  Args:
    by: the quantity that is equal: "active_params", "flops_per_token" (of training), or
      "total_params".
    multiple_of: a divisor of the solved width; 1 matches most closely, 128 suits accelerators.
    **moe: fields of config.model.moe to change, for kind="moe".

  Raises:
    UserError: an argument has another value, or a field cannot be changed.
  """
  transform = Match(kind, by, multiple_of, tuple(moe.items()))
  if kind not in ("dense", "moe"):
    raise UserError(f"{transform}: the kind is not one of: dense, moe")
  if by not in _COUNTS:
    raise UserError(f"{transform}: `by` is not one of: {', '.join(_COUNTS)}")
  if multiple_of < 1:
    raise UserError(f"{transform}: multiple_of={multiple_of} must be at least 1")
  if kind == "dense" and moe:
    raise UserError(f"{transform}: a dense twin has no experts to set; drop {', '.join(moe)}")
  if "expert_dim" in moe:
    raise UserError(f"{transform}: expert_dim is the width that is solved; drop it")
  return transform


def sizes(config: Config) -> str:
  """Describes the parameters and FLOPs of a config in one line."""
  counts = cost.count(config)
  return (
    f"{si(counts.total)} parameters, {si(counts.active)} active, "
    f"{si(counts.flops_per_token)} FLOPs per token"
  )
