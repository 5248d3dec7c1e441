"""Which scores of attention count, and what becomes of them before the softmax.

This stands between the model and every attention kernel: an option of the scores is a field here.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.config import Model


class Mask(NamedTuple):
  """What the scores of a layer are put through; causal order and documents hold in any case."""

  window: int = 0  # tokens that a query attends to at most, itself the last; 0 is no limit
  soft_cap: float = 0.0  # scores are soft_cap * tanh(score / soft_cap) (Gemma 2); 0 is no cap
  sinks_H: Any = None  # float32, a logit of each head that joins its softmax and has no value
  context: Any = None  # a context.Part where the queries are a part of the sequence of the keys

  def used(self) -> list[str]:
    """Returns the names of the fields that have an effect."""
    fields = self._asdict() | {"sinks_H": self.sinks_H is not None}
    return [name for name, value in fields.items() if value]

  def sees(self, before: jax.Array) -> jax.Array:
    """Returns bool, of any shape: whether a query attends to the key `before` tokens earlier."""
    return (before >= 0) & (before < self.window) if self.window else before >= 0

  def capped(self, scores: jax.Array) -> jax.Array:
    """Returns the float32 scores, which are scaled already, as the softmax takes them."""
    return soft_capped(scores, self.soft_cap)

  def sinks(self, *groups: int) -> jax.Array:
    """Returns the sinks, float32 [*groups] for the heads H in that order."""
    return self.sinks_H.astype(jnp.float32).reshape(groups)


CAUSAL = Mask()


def soft_capped(x: jax.Array, cap: float) -> jax.Array:
  """Returns cap * tanh(x / cap), elementwise (Gemma 2, 2408.00118); x where the cap is 0."""
  return cap * jnp.tanh(x / cap) if cap else x


def of_layer(model: Model, *, is_global: bool) -> Mask:
  """Returns the mask of a layer, without the sinks, which are a layer's weights."""
  return Mask(window=0 if is_global else model.window, soft_cap=model.soft_cap)
