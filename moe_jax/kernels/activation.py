"""The nonlinearity between the matrices of a feed-forward or an expert; every kernel takes it."""

from collections.abc import Callable

import jax

Activation = Callable[[jax.Array, jax.Array], jax.Array]  # (gate, up) -> h, all of one shape


def gated(gate: jax.Array, up: jax.Array) -> jax.Array:
  """h = silu(gate) * up, SwiGLU (2002.05202). Elementwise: another one is an edit here."""
  return jax.nn.silu(gate) * up
