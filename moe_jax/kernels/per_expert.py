"""Experts that are arrays of their own: at inference a CPU reads only those that have rows.

XLA:CPU copies a slice of stacked weights before it uses it, and a gather of the chosen experts too:
three times the memory traffic. A loop over separate arrays needs no copy, and an expert without
rows runs no iteration, so its weights are never read.

R: rows of one block.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.kernels.activation import Activation


class PerExpert(NamedTuple):
  """The weights of each expert, output dimension first: tuples of one array for each."""

  gates: tuple[jax.Array, ...]  # each [F, D]
  ups: tuple[jax.Array, ...]  # each [F, D]
  downs: tuple[jax.Array, ...]  # each [D, F]


def pack(gate_EDF: jax.Array, up_EDF: jax.Array, down_EFD: jax.Array) -> PerExpert:
  return PerExpert(*(tuple(w.T for w in stacked) for stacked in (gate_EDF, up_EDF, down_EFD)))


def experts(
  x_ND: jax.Array, weights: PerExpert, sizes_E: jax.Array, activation: Activation
) -> jax.Array:
  """y_ND; see experts.experts. Has no gradient."""
  N, D = x_ND.shape
  sizes = _block_sizes(N, len(weights.gates))
  end_E = jnp.cumsum(sizes_E)
  # Every expert's last block may pass its end: what it writes there is written again by the next.
  x_ND = jnp.pad(x_ND, ((0, sizes[0]), (0, 0)))
  y_ND = jnp.zeros((N + sizes[0], D), x_ND.dtype)
  for expert, matrices in enumerate(zip(*weights, strict=True)):
    rows, first = sizes_E[expert], end_E[expert] - sizes_E[expert]
    for size, smaller in zip(sizes, (*sizes[1:], 0), strict=True):
      # As many blocks as leave no more rows than the smaller size holds.
      blocks = jnp.maximum(rows - smaller + size - 1, 0) // size
      body = functools.partial(
        _add_block, x_ND=x_ND, first=first, size=size, matrices=matrices, activation=activation
      )
      y_ND = jax.lax.fori_loop(0, blocks, body, y_ND)
      rows, first = rows - blocks * size, first + blocks * size
  return y_ND[:N]


def _block_sizes(rows: int, num_experts: int) -> tuple[int, ...]:
  """Rows of a block, large and small: twice an expert's share of the rows, and its share.

  Not more than 64, where matmuls are at their speed, so that little is padding. With fewer rows
  than experts most have one row or none, and a product with a vector is the fastest.
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
  matrices: tuple[jax.Array, jax.Array, jax.Array],
  activation: Activation,
) -> jax.Array:
  gate_FD, up_FD, down_DF = matrices
  start = first + number * size
  x_RD = jax.lax.dynamic_slice_in_dim(x_ND, start, size)
  # Weights times rows: see output_first.OutputFirst.product.
  x_DR = jax.lax.optimization_barrier(x_RD.T)
  h_FR = activation(gate_FD @ x_DR, up_FD @ x_DR)
  y_DR = jax.lax.optimization_barrier(down_DF @ h_FR)
  return jax.lax.dynamic_update_slice_in_dim(y_ND, y_DR.T, start, 0)
