"""SwiGLU experts that are arrays of their own: inference on a CPU reads only those with rows.

A slice of stacked weights would be copied before it is used, and a gather of the chosen experts
too: three times the memory traffic. Loops over known arrays copy nothing, and those of no rows
read nothing.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp


def swiglu(
  x_ND: jax.Array,
  gate_FD: Sequence[jax.Array],
  up_FD: Sequence[jax.Array],
  down_DF: Sequence[jax.Array],
  sizes_E: jax.Array,
) -> jax.Array:
  """y_ND; see grouped_matmul.grouped_swiglu. Has no gradient.

  Args:
    x_ND: rows, sorted by expert.
    gate_FD, up_FD, down_DF: of each expert, with the output dimension first.
    sizes_E: int32, rows of each expert.
  """
  N, D = x_ND.shape
  sizes = _blocks(N, len(gate_FD))
  end_E = jnp.cumsum(sizes_E)
  # Every expert's last block may pass its end: what it writes there is written again by the next.
  x_ND = jnp.pad(x_ND, ((0, sizes[0]), (0, 0)))
  y_ND = jnp.zeros((N + sizes[0], D), x_ND.dtype)
  for expert, weights in enumerate(zip(gate_FD, up_FD, down_DF, strict=True)):
    rows, first = sizes_E[expert], end_E[expert] - sizes_E[expert]
    for size, smaller in zip(sizes, (*sizes[1:], 0), strict=True):
      # As many blocks as leave no more rows than the smaller size holds.
      blocks = jnp.maximum(rows - smaller + size - 1, 0) // size
      body = functools.partial(_add_block, x_ND=x_ND, first=first, size=size, weights=weights)
      y_ND = jax.lax.fori_loop(0, blocks, body, y_ND)
      rows, first = rows - blocks * size, first + blocks * size
  return y_ND[:N]


def _blocks(rows: int, experts: int) -> tuple[int, ...]:
  """Rows of a block, large and small: twice an expert's share of the rows, and its share.

  Not more than 64, where matmuls are at their speed, so that little is padding. With fewer rows
  than experts most have one row or none, and a product with a vector is the fastest.
  """
  if rows < experts:
    return (1,)
  share = min(_power_of_two(rows // experts), 32)
  return (4, 1) if share <= 2 else (2 * share, share)


def _power_of_two(least: int) -> int:
  return 1 << (least - 1).bit_length()


def _add_block(number, y_ND, *, x_ND, first, size, weights):
  gate_FD, up_FD, down_DF = weights
  start = first + number * size
  x_RD = jax.lax.dynamic_slice_in_dim(x_ND, start, size)
  # Weights times rows: see inference._linear.
  x_DR = jax.lax.optimization_barrier(x_RD.T)
  h_FR = jax.nn.silu(gate_FD @ x_DR) * (up_FD @ x_DR)
  y_DR = jax.lax.optimization_barrier(down_DF @ h_FR)
  return jax.lax.dynamic_update_slice_in_dim(y_ND, y_DR.T, start, 0)
