"""The nonlinearity of a feed-forward or an expert, which every kernel takes as an argument."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from moe_jax.config import Activation, Model

# (gate, up) -> h, or (up,) -> h of a feed-forward without a gate matrix; all of one shape.
Nonlinearity = Callable[..., jax.Array]


def gated(gate: jax.Array, up: jax.Array) -> jax.Array:
  """Returns silu(gate) * up, elementwise (SwiGLU, 2002.05202)."""
  return jax.nn.silu(gate) * up


def clamped(gate: jax.Array, up: jax.Array, limit: float) -> jax.Array:
  """Returns (up + 1) * gate * sigmoid(1.702 gate), with gate and up clamped (gpt-oss)."""
  gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
  return (up + 1) * gate * jax.nn.sigmoid(1.702 * gate)


def geglu(gate: jax.Array, up: jax.Array) -> jax.Array:
  """Returns gelu(gate) * up, elementwise (GEGLU, 2002.05202)."""
  return jax.nn.gelu(gate) * up


def relu_squared(up: jax.Array) -> jax.Array:
  """Returns max(up, 0)^2, elementwise (2109.08668)."""
  return jnp.square(jax.nn.relu(up))


def nonlinearity(model: Model) -> Nonlinearity:
  """Returns the activation of a model."""
  return _named(model.activation, model.activation_limit)


@functools.cache  # one object for one function, so that what was compiled with it is found again
def _named(name: Activation, limit: float) -> Nonlinearity:
  functions: dict[Activation, Nonlinearity] = {
    Activation.SWIGLU: gated,
    Activation.CLAMPED_SWIGLU: functools.partial(clamped, limit=limit),
    Activation.GEGLU: geglu,
    Activation.RELU_SQUARED: relu_squared,
    Activation.GELU: jax.nn.gelu,
  }
  return functions[name]
