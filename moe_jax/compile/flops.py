"""Counts the FLOPs of a traced program from the shapes of its products.

XLA's own count takes the body of a loop once and sees nothing inside a kernel. Here a loop counts
as often as it runs, and what a device of shard_map does counts for all devices. What a remat policy
computes again is counted again. Of a conditional the false branch counts, as in program.py.
"""

import collections
import math
from typing import Any, NamedTuple

import jax

from moe_jax.compile.program import phase_of

# Products of queries by keys in each kernel of attention; the flash kernels compute scores again.
_ATTENTION = {
  "splash_mha_fwd": 2,
  "splash_mha_dq": 3,
  "splash_mha_dkv": 4,
  "dot_product_attention_fwd": 2,
  "dot_product_attention_bwd": 5,
}


class Flops(NamedTuple):
  """FLOPs of a program, of all devices together."""

  phases: dict[str, float]  # all of them, by named scope
  kernels: float  # of them, those in kernels and grouped matmuls, of which a compiler knows nothing

  @property
  def total(self) -> float:
    """All of them."""
    return sum(self.phases.values())


def count(jaxpr: Any, keys: float) -> Flops:
  """Counts the FLOPs of a traced step.

  Args:
    jaxpr: of `traced.jaxpr`.
    keys: how many keys a query sees on average; the kernels of attention skip the others.
  """
  found: dict[tuple[str, bool], float] = collections.defaultdict(float)
  _walk(jaxpr.jaxpr, 1, "", keys, found)
  phases: dict[str, float] = collections.defaultdict(float)
  for (phase, _), flops in found.items():
    phases[phase] += flops
  return Flops(dict(phases), sum(flops for (_, kernel), flops in found.items() if kernel))


def _walk(
  jaxpr: Any, times: float, scope: str, keys: float, found: dict[tuple[str, bool], float]
) -> None:
  for eqn in jaxpr.eqns:
    where = f"{scope}/{eqn.source_info.name_stack}"
    name = eqn.primitive.name
    if flops := _flops(eqn, name, keys):
      found[phase_of(where), name != "dot_general"] += times * flops
    if name == "pallas_call":
      continue
    inner = times
    if name == "scan":
      inner *= eqn.params["length"]
    elif name == "shard_map":
      mesh = eqn.params["mesh"]
      inner *= math.prod(
        mesh.shape[axis] for axis in eqn.params.get("newly_manual_axes", mesh.shape)
      )
    for value in [eqn.params["branches"][0]] if name == "cond" else eqn.params.values():
      for sub in jax.tree.leaves(value, is_leaf=_is_jaxpr):
        if _is_jaxpr(sub):
          _walk(getattr(sub, "jaxpr", sub), inner, where, keys, found)


def _is_jaxpr(value: Any) -> bool:
  return hasattr(value, "eqns") or hasattr(value, "jaxpr")


def _flops(eqn: Any, name: str, keys: float) -> float:
  """Returns the FLOPs of one equation, of a device inside shard_map and of all outside."""
  shapes: list[Any] = [getattr(v.aval, "shape", ()) for v in eqn.invars]
  if name == "dot_general":
    (contracted, _), _ = eqn.params["dimension_numbers"]
    return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shapes[0][d] for d in contracted)
  if name.startswith("ragged_dot"):
    # Each row meets one expert: [N, D] by [E, D, F], or for a gradient by [N, F], to [E, D, F].
    return 2 * math.prod(shapes[0]) * eqn.outvars[0].aval.shape[-1]
  kernel = str(eqn.params.get("name") or eqn.params.get("name_and_src_info", "")) + name
  for attention, products in _ATTENTION.items():
    if attention in kernel:
      # [B, H, L, A], of one row [H, L, A], and cuDNN's [B, L, H, A]; before it may be masks.
      floats = (v.aval for v in eqn.invars if "float" in str(getattr(v.aval, "dtype", "")))
      q = next(aval.shape for aval in floats if len(aval.shape) > 2)
      length = q[-2] if name == "pallas_call" else q[1]
      return 2 * products * math.prod(q) * min(keys, length)
  return 0.0
