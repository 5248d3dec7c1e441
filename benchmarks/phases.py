"""Times the pieces of an MoE layer alone: router, dispatch, experts, combine and statistics.

Each piece is compiled as a separate program and runs on the arrays that it gets in the layer. XLA
then cannot fuse across pieces, so their sum is reported next to the whole layer's time.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks import timing
from moe_jax.config import Dispatch, MoE
from moe_jax.kernels.expert_weights import MATRICES, Experts
from moe_jax.kernels.experts import experts as run_experts
from moe_jax.moe import counts, dispatch, routers
from moe_jax.moe import layer as layer_lib
from moe_jax.moe.routing import Tokens

SPLIT = (Dispatch.GATHER, Dispatch.GROUPED)
MOVING = ("router", "dispatch", "combine")  # the pieces that a dense layer does not have


def thunks(graph: Any, moe: MoE, arrays: Any) -> dict[str, Callable[[], Any]]:
  """Returns compiled functions {"router forward": ..., "router step": ...} of a layer in SPLIT."""
  B, L, D = arrays.x_BLD.shape
  E, grouped = moe.num_experts, moe.dispatch is Dispatch.GROUPED
  layout = dispatch.layout_of(moe, (B, L), train=True)

  def router(params, x_BLD, real_BL):
    layer = nnx.merge(graph, params)
    weights = layer.weights(x_BLD.dtype, jnp.zeros(E))
    ids_BL, key = jnp.zeros((B, L), jnp.int32), jax.random.key(0)
    tokens = Tokens(ids_BL, real_BL.astype(jnp.int32), ids_BL)
    inputs = layer_lib.router_inputs(x_BLD, tokens, weights, moe, key, train=True)
    routing = routers.route(inputs, moe, B, capacity=layout.capacity, train=True)
    slots, sizes_E = dispatch.place_assignments(routing.assignments, layout)
    return routing.gate_N, (inputs, routing, slots, sizes_E)

  def pack(x_TD, routing, slots):
    return dispatch.gather_rows(x_TD, routing.assignments, slots, layout)

  def experts(x_SD, weights, sizes_E):
    x = x_SD if grouped else x_SD.reshape(E, -1, D)
    return run_experts(x, sizes_E, weights, moe.grouped_matmul).reshape(-1, D)

  def combine(y_SD, gate_N, routing, slots):
    assigned = routing.assignments._replace(gate_N=gate_N)
    return dispatch.gather_combine(y_SD, assigned, slots, layout)

  def count(inputs, routing, slots):
    return counts.local_sums(inputs, routing, slots.kept_N, layout, drops=not grouped)

  params, x_BLD, real_BL = arrays.params, arrays.x_BLD, arrays.real_BL
  state = nnx.to_pure_dict(params)
  weights = Experts(**{name: state[name] for name in MATRICES})
  x_TD = x_BLD.reshape(-1, D)
  _, (inputs, routing, slots, sizes_E) = jax.jit(router)(params, x_BLD, real_BL)
  x_SD = jax.jit(pack)(x_TD, routing, slots)
  y_SD = jax.jit(experts)(x_SD, weights, sizes_E)
  plan = (routing, slots)
  pieces = {}
  pieces |= _both("router", router, (params, x_BLD), (real_BL,), has_aux=True)
  pieces |= _both("dispatch", pack, (x_TD,), plan)
  pieces |= _both("experts", experts, (x_SD, weights), (sizes_E,))
  pieces |= _both("combine", combine, (y_SD, routing.gate_N), plan)
  statistics = functools.partial(jax.jit(count), inputs, *plan)
  # The same program counts for a step, because statistics are timed without a gradient.
  pieces |= {"statistics forward": statistics, "statistics step": statistics}
  for thunk in pieces.values():
    jax.block_until_ready(thunk())
  return pieces


def _both(name, function, differentiated, rest, *, has_aux=False) -> dict[str, Callable[[], Any]]:
  def forward(differentiated, rest):
    return function(*differentiated, *rest)

  def step(differentiated, rest):
    y, vjp, *aux = jax.vjp(lambda *d: function(*d, *rest), *differentiated, has_aux=has_aux)
    return y, aux, vjp(y)  # y stands for its gradient, of which only the shape matters

  return {
    f"{name} {kind}": functools.partial(jax.jit(program), differentiated, rest)
    for kind, program in (("forward", forward), ("step", step))
  }


def row(setting: str, candidate: str, names: list[str], times: timing.Times) -> dict[str, Any]:
  """Returns each piece's time as a share of the whole layer's, forward and in a step."""
  row: dict[str, Any] = {"setting": setting, "candidate": candidate}
  for kind in ("forward", "step"):
    pieces = [name.split()[0] for name in names if name.endswith(kind)]
    shares = {
      p: timing.ratio(times, f"{candidate} {p} {kind}", f"{candidate} {kind}") for p in pieces
    }
    row[kind] = shares | {
      "sum": sum(shares.values()),
      "moving": sum(shares[p] for p in MOVING),
      "layer_s": timing.median(times, f"{candidate} {kind}"),
    }
  return row
