"""The kernels of the experts against a plain loop, odd sizes and gradients included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import config as config_lib
from moe_jax import sharding
from moe_jax.config import Dispatch, GroupedMatmul
from moe_jax.kernels import blocked, choose, per_expert
from moe_jax.kernels.activation import gated
from moe_jax.kernels.experts import Experts, experts
from tests.support.toys import set_up, toy_batch, toy_config

BACKENDS = [GroupedMatmul.BLOCKED, GroupedMatmul.RAGGED_DOT]
SIZES = {
  "uneven": [7, 0, 50, 1, 33],
  "rows left over": [7, 0, 20, 1, 3],
  "all to one": [0, 0, 0, 91, 0],
  "nothing": [0, 0, 0, 0, 0],
  "equal": [18, 18, 18, 18, 18],
}
N, D, F, E = 91, 6, 4, 5


@pytest.fixture(
  params=[(4, 12), pytest.param(blocked._BLOCK_ROWS, marks=pytest.mark.slow)],
  ids=["small blocks", "blocks"], autouse=True,
)  # fmt: skip
def rows(request, monkeypatch):
  monkeypatch.setattr(blocked, "_BLOCK_ROWS", request.param)


def arrays(*shapes):
  rng = np.random.default_rng(0)
  return [np.float32(rng.normal(size=s)) for s in shapes]


def relu_squared(gate, up):
  return jnp.maximum(gate, 0) ** 2 + 0 * up


def clamped(gate, up):
  return jax.nn.silu(jnp.minimum(gate, 1.0)) * jnp.clip(up, -1.0, 1.0)


def plain_loop(arrays, sizes, dy_ND, activation):
  """(y of the experts' rows, gradients of x and the weights) of each expert by itself, float32."""

  def ffn(x_ND, gate_EDF, up_EDF, down_EFD):
    starts, parts = np.cumsum(sizes) - sizes, []
    for e, (a, n) in enumerate(zip(starts, sizes, strict=True)):
      x_RD = x_ND[a : a + n]
      parts.append(activation(x_RD @ gate_EDF[e], x_RD @ up_EDF[e]) @ down_EFD[e])
    return jnp.concatenate(parts)

  y_ND, vjp = jax.vjp(ffn, *arrays)
  return y_ND, vjp(dy_ND[: sum(sizes)])


@pytest.mark.parametrize("kernel", BACKENDS)
@pytest.mark.parametrize(
  ("case", "activation"),
  [*((case, gated) for case in SIZES), ("uneven", clamped), ("rows left over", relu_squared)],
)
def test_equals_a_plain_loop(case, kernel, activation):
  """Values and gradients of every kernel and activation; the rows past the experts' give none."""
  sizes = np.array(SIZES[case])
  used = sizes.sum()
  *values, dy_ND = arrays((N, D), (E, D, F), (E, D, F), (E, F, D), (N, D))

  def ffn(x_ND, *weights):
    y_ND = experts(x_ND, jnp.array(sizes), Experts(*weights), kernel, activation)
    # What is past the experts' rows is undefined; reading it would be a bug.
    return jnp.where((jnp.arange(N) < used)[:, None], y_ND, 0)

  y_ND, vjp = jax.vjp(jax.jit(ffn), *values)
  grads = vjp(dy_ND)
  want, want_grads = plain_loop(values, sizes, dy_ND, activation)
  np.testing.assert_allclose(y_ND[:used], want, rtol=1e-4, atol=1e-5)  # float32 sums
  for got, expected in zip(grads, want_grads, strict=True):
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("activation", [gated, clamped])
def test_slots_and_packed_experts_take_every_activation(activation):
  """The slots of a capacity layout, and the arrays of inference, against rows sorted by expert."""
  R = 6
  x_ERD, gate_EDF, up_EDF, down_EFD = arrays((E, R, D), (E, D, F), (E, D, F), (E, F, D))
  weights, sizes_E = Experts(gate_EDF, up_EDF, down_EFD), jnp.full((E,), R)
  want = experts(
    x_ERD.reshape(-1, D), sizes_E, weights, GroupedMatmul.RAGGED_DOT, activation
  ).reshape(E, R, D)
  slots = experts(x_ERD, None, weights, GroupedMatmul.AUTO, activation)
  np.testing.assert_allclose(slots, want, rtol=1e-4, atol=1e-5)
  packed = per_expert.pack(gate_EDF, up_EDF, down_EFD)
  rows = experts(x_ERD.reshape(-1, D), sizes_E, packed, GroupedMatmul.AUTO, activation)
  np.testing.assert_allclose(rows.reshape(E, R, D), want, rtol=1e-4, atol=1e-5)


def test_bfloat16_sums_in_float32():
  """Weight gradients of 600 rows in blocks: as one matmul's, not as a chain of rounded sums."""
  x_ND, dy_ND = (jnp.bfloat16(a) for a in arrays((600, D), (600, D)))
  weights = Experts(*(jnp.ones((1, *s), jnp.bfloat16) for s in ((D, F), (D, F), (F, D))))

  def ffn(weights):
    return experts(x_ND, jnp.array([600]), weights, GroupedMatmul.BLOCKED)

  _, vjp = jax.vjp(jax.jit(ffn), weights)
  (got,) = vjp(dy_ND)
  h_NF = np.float64(gated(x_ND @ weights.gate_EDF[0], x_ND @ weights.up_EDF[0]))
  want = h_NF.T @ np.float64(dy_ND)
  assert got.down_EFD.dtype == jnp.bfloat16
  # One rounding of the result, and one of each of its 600 terms' activation.
  np.testing.assert_allclose(np.float64(got.down_EFD[0]), want, rtol=2**-7, atol=0.1)


def test_remat_dots_keeps_the_blocked_activations():
  """The backward pass under remat=dots runs none of the forward pass's loops again."""
  loops = {}
  for remat in config_lib.Remat:
    config = toy_config(dispatch=Dispatch.GROUPED, grouped_matmul=GroupedMatmul.BLOCKED)
    config.model.remat = remat
    mesh, state, step = set_up(config, {})
    with jax.set_mesh(mesh):
      lowered = step.lower(state, sharding.to_global(toy_batch(config), mesh))
    loops[remat.value] = lowered.as_text().count("stablehlo.while")
  # One more: the rows' places are found again, from one saved matmul (the router's).
  assert loops["dots"] <= loops["none"] + 1 < loops["full"] - 1


def test_a_kernel_of_another_platform_is_one_line():
  config = toy_config(dispatch=Dispatch.GROUPED)
  config.model.moe.grouped_matmul = GroupedMatmul.TRITON
  with pytest.raises(config_lib.UserError, match=r"grouped_matmul=triton: it runs on gpu, not on"):
    choose.resolve(config, {})
