"""Computes experts as a loop of plain matmuls over blocks of rows, for CPUs.

The number of blocks follows the load at run time, and a block's activations stay in the processor's
cache between its three matmuls. JAX cannot differentiate loops whose length is unknown when
tracing, so the operation defines its own gradient.

R: rows of one block.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.kernels.activation import Nonlinearity
from moe_jax.kernels.autodiff import SAVED_BY_KERNEL, vary, varying
from moe_jax.kernels.expert_weights import Experts
from moe_jax.kernels.matmul import weight_gradient

# Sizes of a block, in rows. An expert's rows are cut into full blocks of the last size, then one
# block of the smallest size that holds the rest. More sizes waste fewer rows and take longer to
# compile.
_BLOCK_ROWS = (16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def blocked_experts(
  x_ND: jax.Array, weights: Experts, sizes_E: jax.Array, activation: Nonlinearity
) -> jax.Array:
  """Returns y_ND; the arguments are those of experts.experts for sorted rows."""

  def body(block: "_Block", y_ND: jax.Array) -> jax.Array:
    return block.put(y_ND, block.down(activation(*block.gate_and_up(x_ND, weights)), weights))

  return _for_each_block(sizes_E, x_ND.shape[0], _unset(x_ND, x_ND.shape[1]), body)


# x_ND, the arguments of the activation [N, F], the weights, sizes_E
Residuals = tuple[jax.Array, tuple[jax.Array, ...], Experts, jax.Array]


def _forward(
  x_ND: jax.Array, weights: Experts, sizes_E: jax.Array, activation: Nonlinearity
) -> tuple[jax.Array, Residuals]:
  def body(block: "_Block", carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    y_ND, *first_NF = carry
    first_RF = block.gate_and_up(x_ND, weights)
    y_ND = block.put(y_ND, block.down(activation(*first_RF), weights))
    return (y_ND, *map(block.put, first_NF, first_RF))

  F, D = weights.down_EFD.shape[1:]
  unset = (_unset(x_ND, D), *(_unset(x_ND, F) for _ in weights.gate_and_up))
  y_ND, *first_NF = _for_each_block(sizes_E, x_ND.shape[0], unset, body)
  first_NF = checkpoint_name(tuple(first_NF), SAVED_BY_KERNEL)
  return checkpoint_name(y_ND, SAVED_BY_KERNEL), (x_ND, first_NF, weights, sizes_E)


def _backward(
  activation: Nonlinearity, residuals: Residuals, dy_ND: jax.Array
) -> tuple[jax.Array, Experts, None]:
  x_ND, first_NF, weights, sizes_E = residuals

  def body(block: "_Block", carry: tuple[jax.Array, Experts]) -> tuple[jax.Array, Experts]:
    dx_ND, grads = carry
    x_RD, dy_RD = block.rows(x_ND), block.valid_rows(dy_ND)
    dh_RF = jnp.dot(dy_RD, block.weights(weights.down_EFD).T)
    h_RF, elementwise = jax.vjp(activation, *map(block.valid_rows, first_NF))
    first = elementwise(dh_RF)
    dx_RD, *more = (
      jnp.dot(d_RF, block.weights(w_EDF).T)
      for d_RF, (w_EDF, _) in zip(first, weights.gate_and_up, strict=True)
    )
    sums = {"down_EFD": block.add(grads.down_EFD, h_RF, dy_RD)}
    biases = {"down_bias_ED": dy_RD}
    for name, d_RF in zip(("up", "gate"), reversed(first), strict=False):
      sums[f"{name}_EDF"] = block.add(getattr(grads, f"{name}_EDF"), x_RD, d_RF)
      biases[f"{name}_bias_EF"] = d_RF
    if weights.down_bias_ED is not None:
      sums |= {name: block.add_rows(getattr(grads, name), d_RF) for name, d_RF in biases.items()}
    return block.put(dx_ND, sum(more, dx_RD)), grads._replace(**sums)

  init = (_zeros(x_ND, x_ND.dtype), jax.tree.map(lambda w: _zeros(w, jnp.float32), weights))
  dx_ND, grads = _for_each_block(sizes_E, x_ND.shape[0], init, body)
  return dx_ND, jax.tree.map(lambda dw, w: dw.astype(w.dtype), grads, weights), None


blocked_experts.defvjp(_forward, _backward)


class _Block:
  """The `size` rows from `first` on, of which the rows in valid_R belong to `expert`."""

  def __init__(self, size: int, expert: jax.Array, first: jax.Array, valid_R: jax.Array):
    self.size, self.expert, self.first, self.valid_R1 = size, expert, first, valid_R[:, None]

  def rows(self, x_ND: jax.Array) -> jax.Array:
    """Returns the block's rows of x_ND, those of other experts included."""
    return jax.lax.dynamic_slice_in_dim(x_ND, self.first, self.size)

  def valid_rows(self, x_ND: jax.Array) -> jax.Array:
    """Returns the block's rows of x_ND, with 0 in place of rows of other experts."""
    # Rows of other experts, and rows that were never written, must not enter this expert's sums.
    return jnp.where(self.valid_R1, self.rows(x_ND), 0)

  def weights(self, w_EDF: jax.Array) -> jax.Array:
    """Returns the matrix of the block's expert."""
    return jax.lax.dynamic_index_in_dim(w_EDF, self.expert, keepdims=False)

  def gate_and_up(self, x_ND: jax.Array, weights: Experts) -> list[jax.Array]:
    """Returns gate_RF, if the experts have gates, and up_RF of the block."""
    x_RD = self.rows(x_ND)
    return [self._product(x_RD, matrix, bias) for matrix, bias in weights.gate_and_up]

  def down(self, h_RF: jax.Array, weights: Experts) -> jax.Array:
    """Returns the block's y_RD."""
    return self._product(h_RF, weights.down_EFD, weights.down_bias_ED)

  def _product(self, x_RD: jax.Array, w_EDF: jax.Array, bias_EF: jax.Array | None) -> jax.Array:
    y_RF = jnp.dot(x_RD, self.weights(w_EDF))
    return y_RF if bias_EF is None else y_RF + self.weights(bias_EF)[None]

  def put(self, y_ND: jax.Array, y_RD: jax.Array) -> jax.Array:
    """Returns y_ND with the expert's rows of the block replaced by those of y_RD."""
    y_RD = jnp.where(self.valid_R1, y_RD, self.rows(y_ND))
    return jax.lax.dynamic_update_slice_in_dim(y_ND, y_RD, self.first, 0)

  def add(self, dw_EDF: jax.Array, a_RD: jax.Array, b_RF: jax.Array) -> jax.Array:
    """Returns dw_EDF with the product of a_RD, transposed, and b_RF added to the expert's part."""
    dw_DF = weight_gradient(a_RD, b_RF, dw_EDF.dtype) + self.weights(dw_EDF)
    return jax.lax.dynamic_update_index_in_dim(dw_EDF, dw_DF, self.expert, 0)

  def add_rows(self, db_EF: jax.Array, a_RF: jax.Array) -> jax.Array:
    """Returns db_EF with the sum of the rows added to the expert's part."""
    db_F = jnp.sum(a_RF, axis=0, dtype=db_EF.dtype) + self.weights(db_EF)
    return jax.lax.dynamic_update_index_in_dim(db_EF, db_F, self.expert, 0)


def _for_each_block(
  sizes_E: jax.Array, num_rows: int, init: Any, body: Callable[[_Block, Any], Any]
) -> Any:
  """Applies carry = body(block, carry) to blocks that together hold every expert's rows."""
  rows = [*(r for r in _BLOCK_ROWS if r < num_rows), num_rows][: len(_BLOCK_ROWS)]
  start_E = jnp.cumsum(sizes_E) - sizes_E
  full_E = sizes_E // rows[-1]
  full_end_E = jnp.cumsum(full_E)
  rest_E = sizes_E - full_E * rows[-1]
  # Sorts the experts by the kind of block, an index into `rows`, that holds their rest; an expert
  # without a rest has no block and comes last.
  kind_E = jnp.where(rest_E > 0, jnp.searchsorted(jnp.array(rows), rest_E), len(rows))
  by_kind_E = jnp.argsort(kind_E)
  first_of_kind = jnp.searchsorted(kind_E[by_kind_E], jnp.arange(len(rows) + 1))

  def run(
    size: int,
    number: jax.Array,
    find_expert: Callable[[jax.Array], jax.Array],
    find_first: Callable[[jax.Array, jax.Array], jax.Array],
    carry: Any,
  ) -> Any:
    def step(j: jax.Array, carry: Any) -> Any:
      expert = find_expert(j)
      first = find_first(expert, j)
      moved = jnp.minimum(first, num_rows - size)  # so that the block ends within the rows
      row_R = moved + jnp.arange(size)
      valid_R = (row_R >= first) & (row_R < start_E[expert] + sizes_E[expert])
      return body(_Block(size, expert, moved, valid_R), carry)

    return jax.lax.fori_loop(jnp.zeros_like(number), number, step, carry)

  def full_expert(j: jax.Array) -> jax.Array:
    return jnp.searchsorted(full_end_E, j, side="right")

  def full_first(expert: jax.Array, j: jax.Array) -> jax.Array:
    return start_E[expert] + (j - full_end_E[expert] + full_E[expert]) * rows[-1]

  def rest_expert(kind: int, j: jax.Array) -> jax.Array:
    return by_kind_E[first_of_kind[kind] + j]

  def rest_first(expert: jax.Array, j: jax.Array) -> jax.Array:
    return start_E[expert] + full_E[expert] * rows[-1]

  carry = run(rows[-1], full_end_E[-1], full_expert, full_first, init)
  for kind, size in enumerate(rows):
    carry = run(
      size,
      first_of_kind[kind + 1] - first_of_kind[kind],
      functools.partial(rest_expert, kind),
      rest_first,
      carry,
    )
  return carry


def _unset(x_ND: jax.Array, columns: int) -> jax.Array:
  """Returns uninitialised rows, so that no time is spent on rows that are never written."""
  return vary(jax.lax.empty((x_ND.shape[0], columns), x_ND.dtype), varying(x_ND))


def _zeros(like: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
  return vary(jnp.zeros(like.shape, dtype), varying(like))
