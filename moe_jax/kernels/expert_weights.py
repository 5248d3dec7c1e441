"""The weights of a device's experts, as every kernel but the packed one takes them."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.kernels.activation import Nonlinearity

MATRICES = ("gate_EDF", "up_EDF", "down_EFD")  # of experts with gates and without biases


class Experts(NamedTuple):
  """The stacked weights of E feed-forwards, in the compute dtype."""

  gate_EDF: jax.Array | None  # None where the activation has no gate
  up_EDF: jax.Array
  down_EFD: jax.Array
  gate_bias_EF: jax.Array | None = None
  up_bias_EF: jax.Array | None = None
  down_bias_ED: jax.Array | None = None

  @property
  def gate_and_up(self) -> list[tuple[jax.Array, jax.Array | None]]:
    """The matrices from D to F, each with its bias: gate, if there is one, and up."""
    pairs = [(self.gate_EDF, self.gate_bias_EF), (self.up_EDF, self.up_bias_EF)]
    return [(matrix, bias) for matrix, bias in pairs if matrix is not None]


def with_grouped_matmul(
  matmul: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
  x_ND: jax.Array,
  weights: Experts,
  sizes_E: jax.Array,
  activation: Nonlinearity,
) -> jax.Array:
  """Computes experts.experts of sorted rows with a grouped matmul of (x, w, sizes_E).

  Rows past sum(sizes_E) get the bias of the last expert.
  """

  def product(x_ND: jax.Array, matrix: jax.Array, bias: jax.Array | None) -> jax.Array:
    y_NF = matmul(x_ND, matrix, sizes_E)
    if bias is None:
      return y_NF
    return y_NF + jnp.repeat(bias, sizes_E, axis=0, total_repeat_length=len(y_NF))

  h_NF = activation(*(product(x_ND, matrix, bias) for matrix, bias in weights.gate_and_up))
  return product(h_NF, weights.down_EFD, weights.down_bias_ED)
