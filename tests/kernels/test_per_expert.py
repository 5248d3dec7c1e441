"""Experts in arrays of their own."""

import jax
import numpy as np
import pytest

from moe_jax.kernels import per_expert
from moe_jax.kernels.activation import gated
from moe_jax.kernels.experts import Experts


@pytest.mark.parametrize("rows", [3, 8, 13, 40, 300])  # each pair of block sizes
def test_experts_of_their_own_arrays_by_hand(rows):
  rng = np.random.default_rng(rows)
  E, D, F = 5, 6, 4
  x_ND = rng.normal(size=(rows, D))
  gate, up, down = (rng.normal(size=(E, *shape)) for shape in ((F, D), (F, D), (D, F)))
  for share in ([0.7, 0, 0.2, 0.05, 0.05], [0, 0, 0, 0, 1], [0.2] * 5):
    sizes_E = np.floor(rows * np.array(share)).astype(int)
    sizes_E[np.argmax(share)] += rows - sizes_E.sum()
    expert_N = np.repeat(np.arange(E), sizes_E)
    want = np.stack(
      [
        down[e] @ ((g := gate[e] @ x) / (1 + np.exp(-g)) * (up[e] @ x))
        for e, x in zip(expert_N, x_ND, strict=True)
      ]
    )
    each = (Experts(*map(np.float32, matrices)) for matrices in zip(gate, up, down, strict=True))
    weights = per_expert.PerExpert(tuple(each))
    experts = jax.jit(per_expert.experts_one_by_one, static_argnums=3)
    got = experts(np.float32(x_ND), weights, np.int32(sizes_E), gated)
    # float32, sums of 6 terms, values up to some tens
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
