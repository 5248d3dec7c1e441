"""Logits far from zero, rows of padding, one expert, one token: all that comes out is finite."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import (
  BalanceScope,
  Dispatch,
  Dtype,
  GroupedMatmul,
  Loss,
  Model,
  MoE,
  Router,
  Score,
)
from moe_jax.errors import UserError
from moe_jax.kernels.experts import Experts
from moe_jax.moe import dispatch, exchange, layer, routers, validation
from moe_jax.moe.routing import LayerInputs, Mode, RouterInputs
from moe_jax.training import losses, metrics
from tests.support.routings import ROUTINGS
from tests.support.toys import mesh_of, slow_unless, toy_config

FAR = np.array([-1e4, -200.0, -95.0, -60.0, -3.0, 0.0, 3.0, 60.0, 1e4], np.float32)


def log_score(logits, score):
  """In float64."""
  if score is Score.SOFTMAX:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
  return np.minimum(logits, 0) - np.log1p(np.exp(-np.abs(logits)))


def shares(logs):
  shares = np.exp(logs - logs.max(axis=1, keepdims=True))
  return shares / shares.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("dtype", list(Dtype))
@pytest.mark.parametrize("score", list(Score))
def test_gates_far_from_zero_are_those_of_float64(score, dtype):
  """Experts 1 and 2 are alike, 0 and 3 worse: each takes a half, whatever its score rounds to.

  A float32 holds no sigmoid below -87, and 1e-20 is more than that of -60.
  """
  logits_TE = FAR[:, None] + np.array([-5.0, 0.0, 0.0, -6.0], np.float32)
  moe = MoE(num_experts=4, top_k=2, score=score, router_dtype=dtype)

  def gates(logits_TE):
    inputs = RouterInputs(logits_TE, jnp.ones(9, bool), jnp.zeros(9, jnp.int32), jnp.zeros(4))
    routing = routers.topk(inputs, moe)
    return routing.gate_N.reshape(-1, 2), routing.expert_N.reshape(-1, 2), routing.probs_TE

  gate_TK, expert_TK, probs_TE = gates(logits_TE)
  jacobian_TKTE = np.asarray(jax.jacobian(lambda x: gates(x)[0])(logits_TE))
  rounded_TE = logits_TE.astype(dtype.value).astype(np.float64)
  log_TE, exact = log_score(rounded_TE, score), dtype is Dtype.FLOAT32
  # Of logits of 60 every sigmoid is 1, so that all four experts are alike, and any may be chosen.
  different = [t for t in range(9) if not np.isclose(log_TE[t, 0], log_TE[t, 1])]
  assert len(different) >= 6
  assert all(sorted(expert_TK[t].tolist()) == [1, 2] for t in different)
  np.testing.assert_allclose(gate_TK, 0.5, rtol=1e-6)
  np.testing.assert_allclose(probs_TE, shares(log_TE), atol=1e-6 if exact else 0.05)
  # d gate_i / d logit_j = gate_i (delta_ij - gate_j) d log score_j / d logit_j
  slope_T = np.exp(-np.logaddexp(0, FAR)) if score is Score.SIGMOID else np.ones(9)
  for t in different:
    got = np.take_along_axis(jacobian_TKTE[t, :, t], np.asarray(expert_TK[t])[None], axis=1)
    want = slope_T[t] * np.array([[0.25, -0.25], [-0.25, 0.25]])
    np.testing.assert_allclose(got, want, atol=1e-6 if exact else 0.01)
  assert np.isfinite(jacobian_TKTE).all()


@pytest.mark.parametrize("score", list(Score))
@pytest.mark.parametrize("fields", [{}, dict(expert_groups=2, top_groups=1)], ids=str)
def test_experts_whose_scores_round_to_zero_keep_their_order(score, fields):
  logits_TE = np.array([[0, -300, -200, -190], [-400, -300, -200, -190]], np.float32)
  logits_TE -= 100 * (score is Score.SIGMOID)
  moe = MoE(num_experts=4, top_k=2, score=score, **fields)
  inputs = RouterInputs(logits_TE, jnp.ones(2, bool), jnp.zeros(2, jnp.int32), jnp.zeros(4))
  first, second = np.asarray(routers.topk(inputs, moe).expert_N).reshape(2, 2).tolist()
  assert (first, second) == ([0, 1] if fields else [0, 3], [3, 2])


B, L, D, F = 8, 5, 6, 4
LOSS = Loss(load_balance=1.0, router_z=1e-3, importance=1.0)


def extreme_logits(E):
  """Another extreme in each row."""
  normal = np.random.default_rng(0).normal(size=(B, L, E))
  rows = [
    np.sign(normal[0]) * 1e4, normal[1] * 1e4, 0 * normal[2], normal[3] - 1e4, normal[4] + 1e4,
    normal[5] - 95, normal[6] * 1e-30, normal[7],
  ]  # fmt: skip
  return np.stack(rows).astype(np.float32)


def computed(moe, logits_BLE, real_BL, axes):
  """Everything that the layer, the losses and the metrics make, and all gradients."""
  rng, E = np.random.default_rng(1), moe.num_experts

  def normal(*shape):
    return rng.normal(size=shape).astype(np.float32)

  shape = real_BL.shape
  experts = Experts(normal(E, D, F), normal(E, D, F), normal(E, F, D))
  x_BLD, noise_BLE, cotangent_BLD = normal(*shape, D), normal(*shape, E), normal(*shape, D)
  extra, loss = {}, LOSS
  if moe.router is Router.NOISY_TOPK:
    extra = {"noise_scale": np.full((*shape, E), 0.01, np.float32)}
    loss = dataclasses.replace(LOSS, load=1.0)
  ids_BL = np.arange(real_BL.size, dtype=np.int32).reshape(shape)

  def total(x_BLD, logits_BLE, experts):
    inputs = LayerInputs(logits_BLE, real_BL, ids_BL, jnp.zeros(E), noise_BLE, extra)
    y_BLD, stats, _ = layer.on_mesh(x_BLD, inputs, experts, Model(moe=moe), Mode(train=True))
    stats = jax.tree.map(lambda x: x[None], stats)
    sums = losses.sums(jnp.zeros(shape), jnp.zeros(shape), real_BL, stats)
    by_row = losses.load_balance(sums, BalanceScope.SEQUENCE)[0]
    all_losses = losses.total(sums, loss, 1)
    value = jnp.sum(y_BLD * cotangent_BLD) + all_losses.total + by_row
    return value, (y_BLD, all_losses, metrics.moe_metrics(stats))

  with jax.set_mesh(mesh_of(**axes)):
    step = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))
    return jax.device_get(step(x_BLD, logits_BLE, experts))


def assert_finite(tree):
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    assert np.isfinite(leaf).all(), jax.tree_util.keystr(path)


def moe_of(name, E=4, **fields):
  routing, factor, _ = ROUTINGS[name]
  routing = routing | (dict(expert_groups=2, top_groups=2) if name == "deepseek" else {})
  return MoE(num_experts=E, expert_dim=F, capacity_factor=factor, **routing | fields)


@pytest.mark.parametrize("routing", slow_unless(["deepseek"], ROUTINGS))
def test_extreme_logits_give_finite_numbers(routing):
  real_BL = np.arange(L)[None] < np.array([5, 5, 4, 3, 5, 5, 0, 1])[:, None]
  ((_, aux), gradients) = computed(moe_of(routing), extreme_logits(4), real_BL, {})
  assert_finite((aux, gradients))
  assert np.abs(gradients[2].up_EDF).max() > 0.1


BLOCKED = dict(dispatch=Dispatch.GROUPED, grouped_matmul=GroupedMatmul.BLOCKED)
ODD = {
  "one expert": ("switch", dict(E=1), (B, L), {}),
  "all experts": ("mixtral", dict(top_k=4), (B, L), {}),
  "one token": ("mixtral", {}, (B, 1), {}),
  "one token, sigmoid": ("deepseek", {}, (B, 1), {}),
  "experts choose, one token": ("expert-choice", {}, (B, 1), {}),
  "huge gates": ("deepseek", dict(gate_scale=1e4), (B, L), {}),
  "router in bfloat16": ("mixtral", dict(router_dtype=Dtype.BFLOAT16), (B, L), {}),
  "sigmoid in bfloat16": ("deepseek", dict(router_dtype=Dtype.BFLOAT16), (B, L), {}),
  "short groups": ("mixtral", dict(group_size=1), (B, L), {}),
  "on a mesh": ("deepseek", BLOCKED, (B, L), dict(expert=2, data=2)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ODD)
def test_odd_sizes_give_finite_numbers(name):
  routing, fields, shape, axes = ODD[name]
  moe = moe_of(routing, **fields)
  logits_BLE = extreme_logits(moe.num_experts)[:, : shape[1]]
  assert_finite(computed(moe, logits_BLE, np.ones(shape, bool), axes))


@pytest.mark.parametrize(
  ("real_rows", "routing"),
  [(0, "mixtral")]
  + [
    pytest.param(rows, name, marks=pytest.mark.slow)
    for rows in (0, 1)
    for name in ("noisy", "deepseek", "expert-choice", "sinkhorn")
  ],
)
def test_devices_with_nothing_but_padding_give_finite_numbers(real_rows, routing):
  """All devices, or all but the first; of nothing every loss is 0."""
  real_BL = np.broadcast_to(np.arange(B)[:, None] < real_rows, (B, L))
  found = computed(
    moe_of(routing, **BLOCKED), np.zeros((B, L, 4), np.float32), real_BL, dict(expert=2, data=2)
  )
  assert_finite(found)
  (_, (y_BLD, all_losses, _)), gradients = found
  assert not y_BLD[real_rows:].any() and y_BLD[:real_rows].any() == bool(real_rows)
  assert (all_losses.load_balance > 0) == bool(real_rows)
  if not real_rows:
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves((all_losses, gradients)))


@pytest.mark.parametrize("field", ["gate_scale", "bias_update_rate"])
def test_a_number_that_leads_out_of_float32_is_refused(field):
  with pytest.raises(UserError, match=f"config.model.moe.{field}=1e.30 must be .*most"):
    validation.validate(toy_config(**{field: 1e30}))


def test_the_largest_capacity_factor_is_a_slot_for_every_token():
  assert dispatch.capacity(1.7e308, tokens=1000, top_k=8, num_experts=2) == 1000
  assert exchange._buffer_rows(1.7e308, 1000, 5000) == 5000
