"""The product of activations with a weight matrix, in either layout of the weight."""

import math

import jax
import jax.numpy as jnp

from moe_jax.kernels import platform
from moe_jax.kernels.gathered import Copies
from moe_jax.kernels.matmul import matmul
from moe_jax.kernels.output_first import OutputFirst

# As in training on one device or on a mesh that splits it, or packed for inference (packing.py).
Weight = jax.Array | Copies | OutputFirst


def linear(
  x: jax.Array, weight: Weight, inner: int = 1, dtype: jnp.dtype | None = None
) -> jax.Array:
  """Returns x[..., *inner] times weight[*inner, *outer], summed over inner, as [..., *outer].

  Args:
    x: activations; all but the last `inner` dimensions are rows.
    weight: the matrix, of the dtype of x.
    inner: number of dimensions that are summed over.
    dtype: of the result and of the sums; None for that of x.
  """
  rows, summed = x.shape[: x.ndim - inner], x.shape[x.ndim - inner :]
  assert weight.shape[:inner] == summed, (x.shape, weight.shape)
  outer = weight.shape[inner:]
  # Rows are flattened to one dimension, and the result's too: XLA computes the input's gradient
  # slowly for more dimensions.
  x_RI = x.reshape(-1, math.prod(summed))
  if isinstance(weight, Copies | OutputFirst):
    y_RO = weight.product(x_RI, dtype)
  elif platform.name() == "cpu":
    y_RO = matmul(x_RI, weight.reshape(x_RI.shape[1], -1), dtype)
  else:
    y_RO = jnp.dot(x_RI, weight.reshape(x_RI.shape[1], -1), preferred_element_type=dtype)
  return y_RO.reshape(*rows, *outer)
