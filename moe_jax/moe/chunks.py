"""The way to the experts and back in chunks of tokens, and by an exact path if a buffer overflows.

Letters: T tokens of one device and N their assignments, as in layer.py.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax import sharding
from moe_jax.config import ExchangeFallback, MoE
from moe_jax.kernels.autodiff import vary_alike
from moe_jax.kernels.experts import ExpertWeights
from moe_jax.moe import exchange
from moe_jax.moe.dispatch import Layout
from moe_jax.moe.routing import Assignments

Result = tuple[jax.Array, jax.Array]  # y_TD and bool kept_N
# (x_TD, assignments, experts, layout) of a device's tokens, or of a chunk of them
Way = Callable[[jax.Array, Assignments, ExpertWeights, Layout], Result]


def run(
  way: Way,
  moe: MoE,
  x_TD: jax.Array,
  assigned: Assignments,
  experts: ExpertWeights,
  layout: Layout,
) -> Result:
  """Sends a device's tokens along the way, as moe.exchange_chunks and exchange_fallback say."""
  # Validation has seen the run's batches; an evaluation may have others.
  chunks = math.gcd(moe.exchange_chunks, layout.units)
  devices = jax.sharding.get_abstract_mesh().shape["expert"]
  exact = moe.exchange_fallback is ExchangeFallback.EXACT and devices > 1
  if chunks == 1 and not exact:
    return way(x_TD, assigned, experts, layout)
  # Marked here, so that gradients are summed over the mesh once, and not in each chunk.
  floats = vary_alike((x_TD, assigned.gate_N, experts))

  def attempt(floats: Any, assigned: Assignments) -> Result:
    return _in_chunks(way, chunks, floats, assigned, layout)

  if not exact:
    return attempt(floats, assigned)
  # So many that buffers for any load are no larger than those that have overflowed.
  least = math.ceil(chunks * devices / moe.exchange_factor)
  whole = layout.units
  enough = next((n for n in range(max(least, 1), whole) if not whole % n), whole)

  def again(floats: Any, assigned: Assignments) -> jax.Array:
    return _in_chunks(way, enough, floats, assigned, layout._replace(exchange_factor=0.0))[0]

  return _or_again(attempt, again, floats, assigned)


def _in_chunks(way: Way, chunks: int, floats: Any, assigned: Assignments, layout: Layout) -> Result:
  """Sends the tokens in turn, and computes each chunk again for its gradient."""
  x_TD, gate_N, experts = floats
  assigned = assigned._replace(gate_N=gate_N)
  if chunks == 1:
    return way(x_TD, assigned, experts, layout)
  part = layout._replace(tokens=layout.tokens // chunks, groups=max(layout.groups // chunks, 1))
  assigned = assigned._replace(token_N=assigned.token_N % part.tokens)
  split = jax.tree.map(lambda a: a.reshape(chunks, -1, *a.shape[1:]), (x_TD, assigned))

  @jax.checkpoint
  def one(_: None, chunk: tuple[jax.Array, Assignments]) -> tuple[None, Result]:
    return None, way(*chunk, experts, part)

  y_CTD, kept_CN = jax.lax.scan(one, None, split)[1]
  return y_CTD.reshape(x_TD.shape), kept_CN.reshape(-1)


def _or_again(
  attempt: Callable[[Any, Assignments], Result],
  again: Callable[[Any, Assignments], jax.Array],
  floats: Any,
  assigned: Assignments,
) -> Result:
  """Returns the result of `attempt`; of `again`, with nothing lost, if a device of any lost a row.

  By autodiff the conditional would keep, and return gradients of, all weights, zeros mostly.
  """

  @jax.custom_vjp
  def either(floats: Any, assigned: Assignments) -> Result:
    return forward(floats, assigned)[0]

  def forward(floats: Any, assigned: Assignments) -> tuple[Result, Any]:
    y_TD, back, kept_N = jax.vjp(lambda f: attempt(f, assigned), floats, has_aux=True)
    lost = exchange.sum_over(sharding.BATCH_AXES, jnp.sum(assigned.real_N & ~kept_N)) > 0
    y_TD = jax.lax.cond(lost, lambda: again(floats, assigned), lambda: y_TD)
    return (y_TD, kept_N | lost & assigned.real_N), (back, lost, floats, assigned)

  def backward(kept: Any, gradients: Any) -> Any:
    (back, lost, floats, assigned), dy_TD = kept, gradients[0]
    first = back(dy_TD)[0]

    def second() -> Any:
      return jax.vjp(lambda f: again(f, assigned), floats)[1](dy_TD)[0]

    return jax.lax.cond(lost, second, lambda: first), None

  either.defvjp(forward, backward)
  return either(floats, assigned)
