"""A matrix that lies with its output dimensions first: how a CPU reads it fastest for few rows.

I: inner, the elements summed over. O: outer, those of the result. R: rows.
"""

import dataclasses

import jax
import jax.numpy as jnp

_FEW = 64  # rows, below which the weights go first in the product


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OutputFirst:
  """The weight [*inner, *outer], kept as [*outer, *inner]; `shape` is that of the weight."""

  stored: jax.Array
  inner: int = dataclasses.field(metadata={"static": True})  # number of inner dimensions

  @property
  def shape(self) -> tuple[int, ...]:
    outer = self.stored.ndim - self.inner
    return (*self.stored.shape[outer:], *self.stored.shape[:outer])

  def product(self, x_RI: jax.Array, dtype: jnp.dtype | None) -> jax.Array:
    """y_RO. Of few rows as weights times rows.

    XLA:CPU would turn this into rows times weights, which takes up to three times as long; the
    barriers stop it.
    """
    w_OI = self.stored.reshape(-1, x_RI.shape[1])
    if x_RI.shape[0] > _FEW:
      return jnp.dot(x_RI, w_OI.T, preferred_element_type=dtype)
    x_IR = jax.lax.optimization_barrier(x_RI.T)
    y_OR = jnp.dot(w_OI, x_IR, preferred_element_type=dtype)
    return jax.lax.optimization_barrier(y_OR).T


def pack(weight: jax.Array, inner: int) -> OutputFirst:
  """The same weight, its outer dimensions first."""
  axes = [*range(inner, weight.ndim), *range(inner)]
  return OutputFirst(jnp.transpose(weight, axes), inner)
