"""Where a TPU keeps the numbers of an array.

XLA chooses the order of dimensions in memory by what it computes next, and copies an array whose
users want different ones. It does not see that a copy could be smaller before a sum or a cast, nor
that a matmul writes any order at no cost.
"""

import jax
from jax.experimental.layout import Layout, with_layout_constraint

from moe_jax.kernels import platform


def stored(x: jax.Array, *order: int) -> jax.Array:
  """Returns x, and on a TPU has x and its gradient in memory with the dimensions in this order."""
  if platform.name() != "tpu":
    return x
  return with_layout_constraint(x, Layout(major_to_minor=order))
