"""The kernels of the experts against a plain loop, odd sizes and gradients included."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import Activation, Dispatch, GroupedMatmul, Model, Remat
from moe_jax.kernels import blocked, per_expert
from moe_jax.kernels.activation import Nonlinearity, gated, geglu, nonlinearity, relu_squared
from moe_jax.kernels.experts import Experts, experts
from tests.support.toys import lower_step, toy_config

BACKENDS = [GroupedMatmul.BLOCKED, GroupedMatmul.RAGGED_DOT]
SIZES = {
  "uneven": [7, 0, 50, 1, 33],
  "rows left over": [7, 0, 20, 1, 3],
  "all to one": [0, 0, 0, 91, 0],
  "nothing": [0, 0, 0, 0, 0],
  "equal": [18, 18, 18, 18, 18],
}
N, D, F, E = 91, 6, 4, 5


BLOCKS, SMALL_BLOCKS = blocked._BLOCK_ROWS, (4, 12)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  monkeypatch.setattr(blocked, "_BLOCK_ROWS", SMALL_BLOCKS)


def arrays(*shapes):
  rng = np.random.default_rng(0)
  return [np.float32(rng.normal(size=s)) for s in shapes]


class Kind(NamedTuple):
  """An activation, and whether the experts have biases."""

  activation: Nonlinearity
  biases: bool = False

  def weights(self):
    names = {"gate_EDF": (E, D, F), "up_EDF": (E, D, F), "down_EFD": (E, F, D)}
    if self.biases:
      names |= {"gate_bias_EF": (E, F), "up_bias_EF": (E, F), "down_bias_ED": (E, D)}
    found = dict(zip(names, arrays(*names.values()), strict=True))
    if self.activation in (relu_squared, jax.nn.gelu):
      found |= {name: None for name in found if name.startswith("gate")}
    return Experts(**found)


# Every word of Activation: each second one with biases.
KINDS = {
  word.value: Kind(nonlinearity(Model(activation=word, activation_limit=1.0)), bool(number % 2))
  for number, word in enumerate(Activation)
}


@functools.cache
def plain_loop(case, kind):
  """(y of the experts' rows, gradients of x and the weights) of each expert by itself, float32."""
  sizes, activation = np.array(SIZES[case]), KINDS[kind].activation

  def product(x_RD, matrix_EDF, bias_EF, e):
    return x_RD @ matrix_EDF[e] + (0 if bias_EF is None else bias_EF[e][None])

  def ffn(x_ND, weights):
    starts, parts = np.cumsum(sizes) - sizes, []
    first = [(weights.gate_EDF, weights.gate_bias_EF)] if weights.gate_EDF is not None else []
    for e, (a, n) in enumerate(zip(starts, sizes, strict=True)):
      x_RD = x_ND[a : a + n]
      pairs = [*first, (weights.up_EDF, weights.up_bias_EF)]
      h_RF = activation(*(product(x_RD, w, b, e) for w, b in pairs))
      parts.append(product(h_RF, weights.down_EFD, weights.down_bias_ED, e))
    return jnp.concatenate(parts)

  @jax.jit
  def both(x_ND, weights, dy_ND):
    y_ND, vjp = jax.vjp(ffn, x_ND, weights)
    return y_ND, vjp(dy_ND[: sum(sizes)])

  x_ND, dy_ND = arrays((N, D), (N, D))
  return both(x_ND, KINDS[kind].weights(), dy_ND)


@functools.cache
def compiled(kernel, kind, blocks):
  """One program for all sizes; `blocks` are those in force, which it is compiled with."""

  @jax.jit
  def both(x_ND, weights, sizes_E, dy_ND):
    def ffn(x_ND, weights):
      y_ND = experts(x_ND, sizes_E, weights, kernel, KINDS[kind].activation)
      # What is past the experts' rows is undefined; reading it would be a bug.
      return jnp.where((jnp.arange(N) < sizes_E.sum())[:, None], y_ND, 0)

    y_ND, vjp = jax.vjp(ffn, x_ND, weights)
    return y_ND, vjp(dy_ND)

  return both


@pytest.mark.parametrize("kernel", BACKENDS)
@pytest.mark.parametrize(
  ("case", "kind"),
  [
    *((case, "swiglu") for case in SIZES),
    *(("rows left over", kind) for kind in KINDS if kind != "swiglu"),
    ("nothing", "clamped_swiglu"),
  ],
)
def test_equals_a_plain_loop(case, kernel, kind):
  """Values and gradients of every kernel and activation; the rows past the experts' give none."""
  sizes_E, (x_ND, dy_ND) = np.array(SIZES[case]), arrays((N, D), (N, D))
  run = compiled(kernel, kind, blocked._BLOCK_ROWS)
  y_ND, grads = run(x_ND, KINDS[kind].weights(), sizes_E, dy_ND)
  want, want_grads = plain_loop(case, kind)
  # float32 sums; gelu takes a small difference of tanh and 1, and compilers round tanh otherwise
  atol = 3e-4 if KINDS[kind].activation in (geglu, jax.nn.gelu) else 3e-5
  np.testing.assert_allclose(y_ND[: sizes_E.sum()], want, rtol=1e-4, atol=atol)
  jax.tree.map(
    lambda got, expected: np.testing.assert_allclose(got, expected, rtol=1e-4, atol=atol),
    grads,
    want_grads,
  )


@pytest.mark.parametrize("kind", KINDS)
def test_slots_and_packed_experts_take_every_activation(kind):
  """The slots of a capacity layout, and the arrays of inference, against rows sorted by expert."""
  R = 6
  activation = KINDS[kind].activation

  @jax.jit
  def answers(x_ERD, weights):
    x_ND, sizes_E, packed = (
      x_ERD.reshape(-1, D),
      jnp.full((E,), R),
      per_expert.pack_per_expert(weights),
    )
    want = experts(x_ND, sizes_E, weights, GroupedMatmul.RAGGED_DOT, activation)
    slots = experts(x_ERD, None, weights, GroupedMatmul.AUTO, activation)
    return want, slots, experts(x_ND, sizes_E, packed, GroupedMatmul.AUTO, activation)

  want, slots, rows = answers(*arrays((E, R, D)), KINDS[kind].weights())
  np.testing.assert_allclose(slots.reshape(-1, D), want, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(rows, want, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["uneven", "nothing"])
def test_blocks_of_their_real_size(case, monkeypatch):
  monkeypatch.setattr(blocked, "_BLOCK_ROWS", BLOCKS)
  test_equals_a_plain_loop(case, GroupedMatmul.BLOCKED, "swiglu")


@pytest.mark.parametrize(
  "blocks", [SMALL_BLOCKS, pytest.param(BLOCKS, marks=pytest.mark.slow)], ids=["small", "real"]
)
def test_bfloat16_sums_in_float32(blocks, monkeypatch):
  """Weight gradients of 600 rows in blocks: as one matmul's, not as a chain of rounded sums."""
  monkeypatch.setattr(blocked, "_BLOCK_ROWS", blocks)
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
  for remat in Remat:
    config = toy_config(
      {"model.remat": remat}, dispatch=Dispatch.GROUPED, grouped_matmul=GroupedMatmul.BLOCKED
    )
    loops[remat.value] = lower_step(config).as_text().count("stablehlo.while")
  # One more: the rows' places are found again, from one saved matmul (the router's).
  assert loops["dots"] <= loops["none"] + 1 < loops["full"] - 1
