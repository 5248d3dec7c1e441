"""Fills rows that nobody should read, so that a result shows it if somebody does."""

import jax
import jax.numpy as jnp
import pytest

from moe_jax.config import Dispatch, MoE
from moe_jax.kernels import experts as kernels
from moe_jax.moe import dispatch

# Where rows of nothing are multiplied by 0, as in the gradient of an expert's weights. There
# kernels/experts.py asks for finite rows, and elsewhere NaN stands.
JUNK = 1e3


def fill(monkeypatch: pytest.MonkeyPatch, moe: MoE) -> set[str]:
  """Fills them in every MoE layer from now on, and returns a set of what was filled.

  Rows without an assignment, in the slots of experts, past the last sorted row, and in the buffers
  that travel between devices; what an expert makes of such rows; and the scratch of kernels.
  """
  filled: set[str] = set()
  gather_rows, experts, sliced = dispatch.gather_rows, kernels.experts, dispatch.DISPATCHERS

  def filled_rows(x_TD, assigned, slots, layout):
    travels = layout.slots and not sliced[moe.dispatch].slots
    filled.add("buffers" if travels else "rows")
    empty_S = slots.assignment_S == assigned.token_N.shape[0]
    x_SD = gather_rows(x_TD, assigned, slots, layout)
    return jnp.where(empty_S[:, None], jnp.nan if travels else JUNK, x_SD)

  def filled_outputs(x, sizes_E, weights, *kernel):
    filled.add("outputs")
    y = experts(x, sizes_E, weights, *kernel)
    if sizes_E is not None:
      unread = jnp.arange(x.shape[0]) >= jnp.sum(sizes_E)
    else:
      unread = jnp.all(x == (0 if moe.dispatch is Dispatch.EINSUM else JUNK), axis=-1)
    # The one-hot matrices of einsum multiply them by 0, and those of dense have none.
    value = jnp.nan if moe.dispatch in (Dispatch.GATHER, Dispatch.GROUPED) else JUNK
    return jnp.where(unread[..., None], value, y)

  def filled_scratch(shape, dtype):
    filled.add("scratch")
    return jnp.full(shape, jnp.nan, dtype)

  monkeypatch.setattr(dispatch, "gather_rows", filled_rows)
  monkeypatch.setattr(kernels, "experts", filled_outputs)
  monkeypatch.setattr(jax.lax, "empty", filled_scratch)
  return filled
