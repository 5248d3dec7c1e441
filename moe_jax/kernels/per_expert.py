"""Computes experts whose weights are separate arrays, so that a CPU reads only experts with rows.

XLA:CPU copies a slice of stacked weights before it uses the slice, and it copies a gather of the
chosen experts too: three times the memory traffic. An unrolled loop over separate arrays needs no
copy, and an expert without rows runs no iteration, so its weights are never read.

R: rows of one block.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.kernels.activation import Nonlinearity
from moe_jax.kernels.expert_weights import Experts


class PerExpert(NamedTuple):
  """The weights of each expert as arrays of their own."""

  each: tuple[Experts, ...]  # without the dimension E, and matrices with their output first


def pack_per_expert(weights: Experts) -> PerExpert:
  """Splits stacked weights into one transposed array for each expert."""
  return PerExpert(
    tuple(
      jax.tree.map(lambda w, e=expert: w[e].T, weights) for expert in range(len(weights.up_EDF))
    )
  )


def experts_one_by_one(
  x_ND: jax.Array, weights: PerExpert, sizes_E: jax.Array, activation: Nonlinearity
) -> jax.Array:
  """Returns y_ND; the arguments are those of experts.experts for sorted rows. Has no gradient."""
  N, D = x_ND.shape
  sizes = _block_sizes(N, len(weights.each))
  end_E = jnp.cumsum(sizes_E)
  # An expert's last block may reach into the next expert's rows, which that expert writes again.
  x_ND = jnp.pad(x_ND, ((0, sizes[0]), (0, 0)))
  y_ND = jnp.zeros((N + sizes[0], D), x_ND.dtype)
  for expert, matrices in enumerate(weights.each):
    rows, first = sizes_E[expert], end_E[expert] - sizes_E[expert]
    for size, smaller in zip(sizes, (*sizes[1:], 0), strict=True):
      # So many blocks of this size that the rows left over fit one block of the smaller size.
      blocks = jnp.maximum(rows - smaller + size - 1, 0) // size
      body = functools.partial(
        _add_block, x_ND=x_ND, first=first, size=size, matrices=matrices, activation=activation
      )
      y_ND = jax.lax.fori_loop(0, blocks, body, y_ND)
      rows, first = rows - blocks * size, first + blocks * size
  return y_ND[:N]


def _block_sizes(rows: int, num_experts: int) -> tuple[int, ...]:
  """Returns the rows of a large and a small block: twice an expert's share of the rows, and once.

  Blocks have at most 64 rows: larger ones make matmuls no faster and are padded more. With fewer
  rows than experts, most experts have one row or none, and a product with a vector is fastest.
  """
  if rows < num_experts:
    return (1,)
  share = min(_power_of_two(rows // num_experts), 32)
  return (4, 1) if share <= 2 else (2 * share, share)


def _power_of_two(least: int) -> int:
  return 1 << (least - 1).bit_length()


def _add_block(
  number: jax.Array,
  y_ND: jax.Array,
  *,
  x_ND: jax.Array,
  first: jax.Array,
  size: int,
  matrices: Experts,
  activation: Nonlinearity,
) -> jax.Array:

  def product(w_FD: jax.Array, x_DR: jax.Array, bias_F: jax.Array | None) -> jax.Array:
    return w_FD @ x_DR if bias_F is None else w_FD @ x_DR + bias_F[:, None]

  start = first + number * size
  x_RD = jax.lax.dynamic_slice_in_dim(x_ND, start, size)
  # Weights times rows, as in output_first.OutputFirst.product.
  x_DR = jax.lax.optimization_barrier(x_RD.T)
  h_FR = activation(*(product(w_FD, x_DR, bias_F) for w_FD, bias_F in matrices.gate_and_up))
  y_DR = product(matrices.down_EFD, h_FR, matrices.down_bias_ED)
  y_DR = jax.lax.optimization_barrier(y_DR)
  return jax.lax.dynamic_update_slice_in_dim(y_ND, y_DR.T, start, 0)
