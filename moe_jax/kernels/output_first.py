"""A matrix stored with its output dimensions first, which a CPU reads fastest for few rows.

I: inner, the elements summed over. O: outer, the elements of a row of the result. R: rows.
"""

import dataclasses

import jax
import jax.numpy as jnp

_FEW = 64  # rows, up to which the product is computed as weights times rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OutputFirst:
  """A weight [*inner, *outer] that is stored as [*outer, *inner]."""

  stored: jax.Array
  inner: int = dataclasses.field(metadata={"static": True})  # number of inner dimensions

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of the weight, (*inner, *outer)."""
    outer = self.stored.ndim - self.inner
    return (*self.stored.shape[outer:], *self.stored.shape[:outer])

  def product(self, x_RI: jax.Array, dtype: jnp.dtype | None) -> jax.Array:
    """Returns y_RO in `dtype`, or in the dtype of x_RI if None.

    Few rows are computed as weights times rows. XLA:CPU would rewrite this as rows times weights,
    which takes up to three times as long; the barriers stop XLA from rewriting it.
    """
    w_OI = self.stored.reshape(-1, x_RI.shape[1])
    if x_RI.shape[0] > _FEW:
      return jnp.dot(x_RI, w_OI.T, preferred_element_type=dtype)
    x_IR = jax.lax.optimization_barrier(x_RI.T)
    y_OR = jnp.dot(w_OI, x_IR, preferred_element_type=dtype)
    return jax.lax.optimization_barrier(y_OR).T


def pack_output_first(weight: jax.Array, inner: int) -> OutputFirst:
  """Stores a weight, whose first `inner` dimensions are summed over, with the other ones first."""
  axes = [*range(inner, weight.ndim), *range(inner)]
  return OutputFirst(jnp.transpose(weight, axes), inner)
