"""Any router, any dispatcher, any mesh: one answer, the NumPy oracle's."""

import functools
import math
import os
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax import config as config_lib
from moe_jax import validation
from moe_jax.config import Dispatch, Exchange, GroupedMatmul, Router
from moe_jax.kernels import blocked
from moe_jax.kernels.experts import Experts
from moe_jax.model.feedforward import DenseFFN, MoEFFN
from moe_jax.moe import counts, dispatch, routers
from moe_jax.moe import layer as layer_lib
from moe_jax.moe.routing import Assignments, LayerInputs, RouterInputs
from moe_jax.training import losses
from tests.support import routings
from tests.support.routings import ROUTINGS, E
from tests.support.toys import mesh_of, toy_config

MESHES = {
  "one": {},
  "expert2": dict(expert=2),
  "expert4": dict(expert=4),
  "expert4-data2": dict(expert=4, data=2),
  "expert2-fsdp2": dict(expert=2, fsdp=2),
  "expert2-tensor2": dict(expert=2, tensor=2),
  "expert2-fsdp2-tensor2": dict(expert=2, fsdp=2, tensor=2),
  "expert8": dict(expert=8),
}
# name: dropless, fields
DISPATCHES = {
  "gather": (False, dict(dispatch=Dispatch.GATHER)),
  "einsum": (False, dict(dispatch=Dispatch.EINSUM)),
  "gather-nothing-drops": (True, dict(dispatch=Dispatch.GATHER)),
  "dense": (True, dict(dispatch=Dispatch.DENSE)),
  "blocked-all-gather": (
    True,
    dict(
      dispatch=Dispatch.GROUPED,
      grouped_matmul=GroupedMatmul.BLOCKED,
      exchange=Exchange.ALL_GATHER,
    ),
  ),
  "ragged-dot-all-to-all": (
    True,
    dict(
      dispatch=Dispatch.GROUPED,
      grouped_matmul=GroupedMatmul.RAGGED_DOT,
      exchange=Exchange.ALL_TO_ALL,
    ),
  ),
}


def layer_loss(x_BLD, weights, rest, cotangent_BLD, moe):
  """oracle.loss by the package; `rest` is the oracle's inputs that have no gradient."""
  real_BL, ids_BL, noise_BLE, bias_E = rest
  logits_BLE = jnp.einsum("BLD,DE->BLE", x_BLD, weights["router_DE"])
  extra = {}
  if moe.router is Router.NOISY_TOPK:
    scale_BLE = jax.nn.softplus(jnp.einsum("BLD,DE->BLE", x_BLD, weights["noise_DE"])) + 0.01
    extra = {"noise_scale": scale_BLE}
  inputs = LayerInputs(logits_BLE, real_BL, ids_BL, bias_E, noise_BLE, extra)
  names = ("gate_EDF", "up_EDF", "down_EFD")
  experts = Experts(*(weights[n] for n in names))
  y_BLD, stats, choices = layer_lib.on_mesh(x_BLD, inputs, experts, moe, train=True, trace=True)
  stacked = jax.tree.map(lambda s: s[None], stats)
  balance = counts.balance(stacked.routed_E, stacked.prob_E, stacked.tokens)[0]
  loss = jnp.sum(y_BLD * cotangent_BLD) + 3 * balance + stats.z / stats.tokens
  loss += 2 * stats.sequence_balance / stats.sequences
  loss += losses.cv_squared_plus_one(stacked.importance_E)[0]
  if moe.router is Router.NOISY_TOPK:
    loss += losses.cv_squared_plus_one(stacked.load_E)[0]
  return loss, (y_BLD, stats, choices, balance)


def run(moe, axes):
  """((loss, outputs), gradients by x_BLD and weights) of the package on a mesh."""
  values, cotangent_BLD = routings.inputs()
  bias_E = values.bias_E if moe.bias_update_rate else np.zeros(E)
  with jax.set_mesh(mesh_of(**axes)):
    to32 = functools.partial(jax.tree.map, lambda a: jnp.asarray(a, jnp.float32))
    rest = (values.real_BL, values.ids_BL, *to32((values.noise_BLE, bias_E)))
    loss = functools.partial(layer_loss, moe=moe)
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    result, (dx, dweights) = step(*to32((values.x_BLD, values.weights)), rest, to32(cotangent_BLD))
  return result, {"x_BLD": dx} | dweights


# Of each number of devices; the grid takes one of those of 4 and one of those of 8, by turns.
BY_DEVICES = (
  ["one"], ["expert2"], ["expert4", "expert2-fsdp2", "expert2-tensor2"],
  ["expert4-data2", "expert2-fsdp2-tensor2", "expert8"],
)  # fmt: skip


def grid():
  """Every routing x dispatch x {1, 2, 4, 8} devices, and one routing with two dispatches on every
  mesh. MOE_JAX_GRID=all takes every mesh for all. Everyday: each routing with two dispatches, each
  dispatch with four routings, on one mesh; and one routing on every mesh. The rest is slow."""
  for row, routing in enumerate(ROUTINGS):
    for column, dispatch_name in enumerate(DISPATCHES):
      number = zlib.crc32(f"{routing} {dispatch_name}".encode())
      chosen = [meshes[number % len(meshes)] for meshes in BY_DEVICES]
      everyday = chosen[number // 3 % len(chosen)]
      every_mesh = routing == "deepseek" and dispatch_name in ("gather", "blocked-all-gather")
      if every_mesh or os.environ.get("MOE_JAX_GRID") == "all":
        chosen = list(MESHES)
      for mesh in chosen:
        slow = mesh != everyday or (row + column) % 3
        if routing == "deepseek" and dispatch_name == "gather":
          slow = False
        yield pytest.param(
          routing, dispatch_name, mesh, id=f"{routing}-{dispatch_name}-{mesh}",
          marks=[pytest.mark.slow] if slow else [],
        )  # fmt: skip


@pytest.fixture
def small_blocks(monkeypatch):
  """So that a few rows make several full blocks and a rest; fewer sizes compile sooner."""
  monkeypatch.setattr(blocked, "_ROWS", (4, 12))


@pytest.mark.parametrize(("routing", "dispatch_name", "mesh"), list(grid()))
def test_every_path_equals_the_oracle(routing, dispatch_name, mesh, small_blocks):
  dropless, fields = DISPATCHES[dispatch_name]
  _, want, want_grads = routings.expected(routing, dropless)
  moe = routings.moe_config(routing, dropless=dropless, **fields)
  (_, (y_BLD, stats, choices, balance)), grads = run(moe, MESHES[mesh])
  # float32 sums of some tens of terms of order 1 to 10
  close = functools.partial(np.testing.assert_allclose, rtol=3e-4, atol=3e-4)
  close(y_BLD, want.y_BLD)  # so the same assignments were dropped
  for name in ("routed_E", "kept_E", "kept_K", "routed_P", "kept_P"):
    np.testing.assert_array_equal(getattr(stats, name), getattr(want, name), err_msg=name)
  np.testing.assert_array_equal(choices.kept_BLE.reshape(-1, E), want.kept_TE)
  np.testing.assert_array_equal(choices.routed_BLE.reshape(-1, E), want.gate_TE > 0)
  close(choices.gate_BLE.reshape(-1, E), want.gate_TE)
  assert stats.tokens == want.tokens and stats.sequences == want.sequences
  assert stats.overflow == 0
  for name in (
    "prob_E", "importance_E", "gate_kept", "load_E", "z", "entropy", "sequence_balance",
  ):  # fmt: skip
    close(getattr(stats, name), getattr(want, name), err_msg=name)
  close(balance, want.balance)
  for name, grad in want_grads.items():
    close(grads[name], grad, err_msg=name)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_the_grid_is_worth_running(routing):
  """Uneven loads, drops where there is a capacity, and a gradient for every weight."""
  for dropless in (False, True):
    chosen, result, grads = routings.expected(routing, dropless)
    dropped = 1 - np.mean([kept for _, _, kept in chosen])
    if routing == "expert-choice":
      assert dropped == 0
    else:
      assert result.routed_E.max() > 1.15 * result.routed_E.mean()
      assert dropped == 0 if dropless else 0.05 < dropped < 0.6
    for name, grad in grads.items():
      assert np.abs(grad).max() > 1 or (name == "noise_DE" and routing != "noisy")


@pytest.mark.preflight
@pytest.mark.parametrize("routing", ROUTINGS)
def test_the_set_of_drops_is_the_oracles(routing):
  """Assignment by assignment: who was kept, not only how many."""
  values, _ = routings.inputs()
  moe = routings.moe_config(routing)
  logits_TE = (values.x_BLD @ values.weights["router_DE"]).reshape(-1, E)
  scale_TE = np.log1p(np.exp(values.x_BLD @ values.weights["noise_DE"])).reshape(-1, E) + 0.01
  bias_E = values.bias_E if moe.bias_update_rate else np.zeros(E)
  capacity = dispatch.capacity(moe.capacity_factor, moe.group_size, moe.top_k, E)
  got = set()
  for start in range(0, len(logits_TE), moe.group_size):
    part = slice(start, start + moe.group_size)
    inputs = RouterInputs(
      jnp.float32(logits_TE[part]), jnp.array(values.real_BL.reshape(-1)[part]),
      jnp.array(values.ids_BL.reshape(-1)[part]), jnp.float32(bias_E),
      jnp.float32(values.noise_BLE.reshape(-1, E)[part]),
      {"noise_scale": jnp.float32(scale_TE[part])},
    )  # fmt: skip
    spec = routers.ROUTERS[moe.router]
    assigned = spec.function(inputs, moe, **dict(capacity=capacity) if spec.takes_capacity else {})
    slots = dispatch.capacity_slots(assigned, E, 1, capacity)
    for token, expert, real, kept, slot in zip(
      *map(np.asarray, (assigned.token_N, assigned.expert_N, assigned.real_N, slots.kept_N,
                        slots.slot_N)), strict=True
    ):  # fmt: skip
      assert kept == (slot < E * capacity) and (not kept or slot // capacity == expert)
      if real:
        got.add((int(token) + start, int(expert), bool(kept)))
  assert got == set(routings.expected(routing, False)[0])


@pytest.mark.parametrize("how", [Dispatch.GATHER, Dispatch.GROUPED])
@pytest.mark.parametrize("router", list(Router))
@pytest.mark.parametrize("score", list(config_lib.Score))
@pytest.mark.parametrize(("top_k", "renormalize"), [(1, False), (1, True), (2, True), (2, False)])
def test_the_router_has_a_gradient(top_k, renormalize, score, router, how, one_device):
  """Through the gates alone, in every combination that validate() allows."""
  factor = 2.0 if how is Dispatch.GATHER or router is Router.EXPERT_CHOICE else math.inf
  config = toy_config(
    top_k=top_k, renormalize=renormalize, score=score, router=router, dispatch=how,
    capacity_factor=factor, eval_capacity_factor=factor, grouped_matmul=GroupedMatmul.RAGGED_DOT,
  )  # fmt: skip
  config.loss = config_lib.Loss(load_balance=0.0)
  try:
    validation.validate(config)
  except config_lib.UserError as refused:
    assert "router" in str(refused) or "renormalize" in str(refused)
    return
  graph, params = nnx.split(MoEFFN(config.model, nnx.Rngs(0)))
  x_BLD = jax.random.normal(jax.random.key(2), (3, 9, 10))

  def loss(params):
    return jnp.sum(jnp.sin(call_layer(nnx.merge(graph, params), x_BLD)[0]))

  for path, grad in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(params)):
    assert np.abs(grad).max() > 1e-5, jax.tree_util.keystr(path)


def test_drops_by_hand():
  """T=4, E=2, K=1, C=1: the second token of each expert is dropped, padding takes no slot."""
  assigned = by_hand([0, 1, 0, 1], [True, False, True, True])
  layout = layout_by_hand(tokens=4, capacity=1)
  x_TD = jnp.arange(8.0).reshape(4, 2)
  rows = dispatch.gather_pack(x_TD, assigned, layout)
  slots = rows.slots
  assert slots.kept_N.tolist() == [True, False, False, True]
  assert slots.slot_N.tolist() == [0, 2, 2, 1]  # 2 = E*C: no slot
  assert slots.assignment_S.tolist() == [0, 3]
  assert rows.x.tolist() == [[[0, 1]], [[6, 7]]]  # [E, C, D]
  combined_TD = dispatch.gather_combine(rows.x, assigned, slots, layout)
  assert combined_TD.tolist() == [[0, 1], [0, 0], [0, 0], [6, 7]]


def test_sorted_rows_by_hand():
  """The same assignments without a capacity: expert 0 has rows 0 and 1, expert 1 has row 2."""
  slots, sizes_E = dispatch.sorted_slots(by_hand([0, 1, 0, 1], [True, False, True, True]), 2)
  assert sizes_E.tolist() == [2, 1]
  assert slots.slot_N.tolist() == [0, 4, 1, 2]
  assert slots.assignment_S.tolist() == [0, 2, 3, 4]


def by_hand(experts, real):
  T = len(experts)
  return Assignments(jnp.arange(T), jnp.array(experts), jnp.ones(T), jnp.array(real))


def layout_by_hand(tokens, capacity):
  """One group, two experts, K=1."""
  return dispatch.Layout(
    tokens=tokens, groups=1, experts=2, capacity=capacity, slots=True, choices=1,
    in_token_order=True, exchange_factor=0.0,
  )  # fmt: skip


@pytest.mark.parametrize("dispatcher", ["gather", "einsum"])
def test_combine_reads_no_empty_slot(dispatcher):
  """Empty slots hold whatever an expert made of nothing: here NaN, which would show."""
  assigned = by_hand([0, 0, 1], [True, True, True])
  slots = dispatch.capacity_slots(assigned, 2, 1, capacity=3)
  y_ECD = jnp.full((2, 3, 5), jnp.nan).at[0, :2].set(1.0).at[1, 0].set(2.0)
  if dispatcher == "einsum":  # multiplies by a one-hot, so its experts must make 0 of 0
    y_ECD = jnp.nan_to_num(y_ECD)
  combine = dispatch.DISPATCHERS[Dispatch(dispatcher)].combine
  y_TD = combine(y_ECD, assigned, slots, layout_by_hand(tokens=3, capacity=3))
  np.testing.assert_array_equal(y_TD, [[1.0] * 5, [1.0] * 5, [2.0] * 5])


def test_unset_memory_does_not_show(monkeypatch, small_blocks):
  """The blocked matmuls' scratch filled with NaN: outputs and gradients are those of any other."""
  moe = routings.moe_config(
    "deepseek", dropless=True, dispatch=Dispatch.GROUPED, grouped_matmul=GroupedMatmul.BLOCKED
  )
  filled = []

  def empty(shape, dtype):
    filled.append(shape)
    return jnp.full(shape, jnp.nan, dtype)

  monkeypatch.setattr(jax.lax, "empty", empty)
  (_, (y_BLD, *_)), grads = run(moe, {})
  _, want, want_grads = routings.expected("deepseek", True)
  assert len(filled) >= 3
  np.testing.assert_allclose(y_BLD, want.y_BLD, rtol=3e-4, atol=3e-4)
  for name, grad in want_grads.items():
    np.testing.assert_allclose(grads[name], grad, rtol=3e-4, atol=3e-4, err_msg=name)


@pytest.mark.parametrize(
  ("factor", "expected_capacity"),
  [(1.0, 4), (1.25, 5), (1.3, 6), (1.1, 5), (math.inf, 16), (9.0, 16), (0.01, 1)],
)
def test_capacity_by_hand(factor, expected_capacity):
  assert dispatch.capacity(factor, tokens=16, top_k=2, num_experts=8) == expected_capacity


@pytest.mark.parametrize("how", list(Dispatch))
@pytest.mark.parametrize("router", [Router.TOPK, Router.EXPERT_CHOICE])
def test_a_dispatch_that_never_drops_ignores_the_capacity_factor(how, router):
  """Unless the router takes the capacity: expert choice has one with every dispatcher."""
  moe = config_lib.MoE(num_experts=8, router=router, dispatch=how, capacity_factor=0.5)
  dropless = how in (Dispatch.GROUPED, Dispatch.DENSE) and router is Router.TOPK
  assert dispatch.layout_of(moe, (3, 16), train=True).capacity == (16 if dropless else 2)


def test_balance_loss_is_one_when_balanced_for_every_k():
  for experts, K in ((4, 1), (8, 2), (64, 8)):
    even = counts.balance(jnp.full((1, experts), K), jnp.ones((1, experts)), jnp.array([experts]))
    np.testing.assert_allclose(even, [1.0], rtol=1e-6)
    np.testing.assert_allclose(
      losses.cv_squared_plus_one(jnp.full((1, experts), 0.3)), 1.0, rtol=1e-6
    )
  routed_E, prob_E = jnp.zeros((1, 64), int).at[0, 0].set(8 * 64), jnp.zeros((1, 64))
  collapsed = counts.balance(routed_E, prob_E.at[0, 0].set(64.0), jnp.array([64]))
  np.testing.assert_allclose(collapsed, [64.0], rtol=1e-6)


def test_a_lost_statistic_raises():
  stats = counts.zeros(1, 4, 1)
  sums = losses.sums(jnp.zeros((1, 1, 3)), jnp.zeros((1, 1), int), jnp.ones((1, 1), bool), stats)
  with pytest.raises(ValueError, match="1 of 2 MoE layers"):
    losses.total(sums, config_lib.Loss(), num_moe_layers=2)


def call_layer(layer, x_BLD, *, train=True, seed=0):
  """The layer on real tokens without balancing bias."""
  B, L = x_BLD.shape[:2]
  ids_BL, key = jnp.zeros((B, L), jnp.int32), jax.random.key(seed)
  bias_E = jnp.zeros(layer.moe.num_experts)
  return layer(x_BLD, jnp.ones((B, L), bool), ids_BL, bias_E, key, train=train)[:2]


@pytest.mark.preflight
@pytest.mark.parametrize("how", ["gather", "grouped"])
def test_one_expert_equals_the_dense_layer(how, one_device):
  """E=1, K=1: outputs and gradients of the dense FFN with the same weights."""
  model = toy_config(
    num_experts=1, top_k=1, capacity_factor=math.inf, expert_dim=14,
    dispatch=Dispatch(how), grouped_matmul=GroupedMatmul.BLOCKED,
  ).model  # fmt: skip
  moe_graph, moe_params = nnx.split(MoEFFN(model, nnx.Rngs(0)))
  dense_graph, dense_params = nnx.split(DenseFFN(model, 14, nnx.Rngs(1)))
  x_BLD = jax.random.normal(jax.random.key(2), (3, 9, model.dim))

  def moe(weights, x_BLD):
    names = ("gate_EDF", "up_EDF", "down_EFD")
    experts = {n: moe_params[n].replace(w[None]) for n, w in zip(names, weights, strict=True)}
    layer = nnx.merge(moe_graph, nnx.State(experts | {"router_DE": moe_params["router_DE"]}))
    return call_layer(layer, x_BLD)[0]

  def plain(weights, x_BLD):
    names = ("gate_DF", "up_DF", "down_FD")
    params = nnx.State({n: dense_params[n].replace(w) for n, w in zip(names, weights, strict=True)})
    return nnx.merge(dense_graph, params)(x_BLD)

  weights = tuple(dense_params[n][...] for n in ("gate_DF", "up_DF", "down_FD"))
  results = []
  for layer_fn in (jax.jit(moe), jax.jit(plain)):
    y, vjp = jax.vjp(layer_fn, weights, x_BLD)
    results.append((y, vjp(jnp.cos(y))))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *results)


@pytest.mark.preflight
@pytest.mark.parametrize("how", list(Dispatch))
def test_identical_experts_equal_any_one_of_them(how, one_device):
  """With gates that sum to 1 the routing is not to be seen; dropless, or with room for all."""
  model = toy_config(capacity_factor=math.inf, eval_capacity_factor=math.inf, dispatch=how).model
  layer = MoEFFN(model, nnx.Rngs(0))
  layer.router_DE[...] = 30 * layer.router_DE[...]
  for weight in (layer.gate_EDF, layer.up_EDF, layer.down_EFD):
    weight[...] = jnp.broadcast_to(weight[...][:1], weight.shape)
  one = DenseFFN(model, model.moe.expert_dim, nnx.Rngs(1))
  one.gate_DF[...], one.up_DF[...] = layer.gate_EDF[...][0], layer.up_EDF[...][0]
  one.down_FD[...] = layer.down_EFD[...][0]
  x_BLD = jax.random.normal(jax.random.key(2), (3, 9, model.dim))
  y_BLD, stats = jax.jit(lambda x: call_layer(layer, x))(x_BLD)
  assert stats.routed_E.max() > 1.15 * stats.routed_E.mean()
  np.testing.assert_allclose(y_BLD, one(x_BLD), rtol=1e-5, atol=1e-6)


def test_shared_experts_add_the_dense_layer(one_device):
  """Two shared experts: the routed output plus a dense FFN twice an expert wide."""
  layer = MoEFFN(toy_config(shared_experts=2).model, nnx.Rngs(0))
  assert layer.shared.gate_DF.shape == (10, 2 * 18)
  x_BLD = jax.random.normal(jax.random.key(2), (3, 9, 10))
  with_shared, _ = jax.jit(lambda x: call_layer(layer, x))(x_BLD)
  shared, layer.shared = layer.shared, None
  routed, _ = jax.jit(lambda x: call_layer(layer, x))(x_BLD)
  np.testing.assert_allclose(with_shared, routed + shared(x_BLD), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  "fields",
  [
    dict(jitter=0.3),
    dict(router=Router.NOISY_TOPK),
    dict(router=Router.RANDOM, renormalize=False),
  ],
  ids=["jitter", "noisy", "random"],
)
def test_what_is_drawn_does_not_depend_on_the_mesh(fields):
  model = toy_config(**fields).model
  outputs = []
  for axes in ({}, dict(expert=4, data=2)):
    with jax.set_mesh(mesh_of(**axes)):
      layer = MoEFFN(model, nnx.Rngs(0))
      x_BLD = jax.random.normal(jax.random.key(2), (8, 9, model.dim))
      y = {
        seed: jax.jit(lambda x, s=seed, m=layer: call_layer(m, x, seed=s)[0])(x_BLD)
        for seed in (5, 6)
      }
      outputs.append(np.asarray(y[5]))
      assert np.abs(y[5] - y[6]).max() > 1e-4, "nothing was drawn"
  np.testing.assert_allclose(outputs[0], outputs[1], rtol=1e-5, atol=1e-6)


def test_evaluation_has_no_jitter_and_no_noise(one_device):
  for fields in (dict(jitter=0.3), dict(router=Router.NOISY_TOPK)):
    layer = MoEFFN(toy_config(**fields).model, nnx.Rngs(0))
    x_BLD = jax.random.normal(jax.random.key(2), (3, 9, 10))
    y = [
      jax.jit(lambda x, s=seed, m=layer: call_layer(m, x, train=False, seed=s)[0])(x_BLD)
      for seed in (5, 6)
    ]
    np.testing.assert_array_equal(*y)


def test_router_stays_float32_under_bfloat16(one_device):
  model = toy_config().model
  model.compute_dtype = config_lib.Dtype.BFLOAT16
  layer = MoEFFN(model, nnx.Rngs(0))
  x_BLD = jax.random.normal(jax.random.key(2), (2, 9, model.dim), jnp.bfloat16)
  real_BL, ids_BL = jnp.ones((2, 9), bool), jnp.zeros((2, 9), int)
  weights = layer.weights(layer.dtype, jnp.zeros(4))
  assert all(w.dtype == jnp.bfloat16 for w in weights.experts)
  inputs = layer_lib.router_inputs(
    x_BLD, real_BL, ids_BL, weights, layer.moe, jax.random.key(0), train=False
  )
  logits = inputs.logits_BLE
  want = np.asarray(x_BLD, np.float64) @ np.asarray(layer.router_DE[...], np.float64)
  assert logits.dtype == jnp.float32
  np.testing.assert_allclose(logits, want, rtol=1e-5, atol=1e-6)  # bfloat16 would miss by 1e-2
  y_BLD, stats = jax.jit(lambda x: call_layer(layer, x))(x_BLD)
  assert y_BLD.dtype == jnp.bfloat16 and stats.routed_E.dtype == jnp.int32
