"""The nonlinearity of a feed-forward or an expert, which every kernel takes as an argument."""

from collections.abc import Callable

import jax

Activation = Callable[[jax.Array, jax.Array], jax.Array]  # (gate, up) -> h, all of one shape


def gated(gate: jax.Array, up: jax.Array) -> jax.Array:
  """Returns silu(gate) * up, elementwise (SwiGLU, 2002.05202)."""
  return jax.nn.silu(gate) * up
