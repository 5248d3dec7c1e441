"""Any router, any dispatcher, any mesh: one answer, the NumPy oracle's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from conftest import mesh_of, toy_config
from flax import nnx

from moe_jax import config as config_lib
from moe_jax import dispatch, expert_parallel, losses, routers
from moe_jax.moe import MoELayer
from moe_jax.transformer import DenseFFN

B, L, D, E, F = 8, 9, 6, 8, 4

# name: router fields, capacity factor (of T*K/E), routing group
ROUTINGS = {
  "switch": (dict(router=config_lib.Router.SWITCH, top_k=1, renormalize=False), 1.3, 9),
  "mixtral": (dict(top_k=2, renormalize=True), 0.9, 9),
  "top3-raw-short-groups": (dict(top_k=3, renormalize=False), 0.7, 3),
  "mixtral-nothing-drops": (dict(top_k=2, renormalize=True), 0.0, 9),
}
MESHES = {
  "one": {},
  "expert2": dict(expert=2),
  "expert4-data2": dict(expert=4, data=2),
  "expert8": dict(expert=8),
  "expert2-fsdp2-tensor2": dict(expert=2, fsdp=2, tensor=2),
}


@functools.cache
def inputs():
  """float32 values held in float64; a skewed router, as a learned one is; ragged padding."""
  rng = np.random.default_rng(0)
  offset_D = rng.normal(size=D)
  x_BLD = rng.normal(size=(B, L, D)) + offset_D
  router_DE = rng.normal(size=(D, E)) + np.outer(offset_D, np.linspace(1.2, -0.4, E))
  weights = [router_DE] + [rng.normal(size=s) for s in ((E, D, F), (E, D, F), (E, F, D))]
  real_BL = np.arange(L)[None] < rng.integers(4, L + 1, B)[:, None]
  cotangent_BLD = rng.normal(size=(B, L, D))
  as_float32 = [np.float32(a).astype(np.float64) for a in (x_BLD, *weights, cotangent_BLD)]
  return as_float32[0], real_BL, as_float32[1:5], as_float32[5]


@functools.cache
def expected(name):
  fields, factor, group = ROUTINGS[name]
  x_BLD, real_BL, weights, cotangent_BLD = inputs()
  options = dict(
    top_k=fields["top_k"], renormalize=fields["renormalize"], factor=factor, group=group
  )
  result = oracle.moe_layer(x_BLD, real_BL, weights, **options)
  return result, oracle.gradients(x_BLD, real_BL, weights, cotangent_BLD, **options)


def moe_config(name, dispatcher):
  fields, factor, group = ROUTINGS[name]
  return config_lib.MoE(
    num_experts=E, expert_dim=F, capacity_factor=factor, group_size=group,
    dispatch=config_lib.Dispatch(dispatcher), **fields,
  )  # fmt: skip


def layer_loss(x_BLD, weights, real_BL, cotangent_BLD, moe):
  logits_BLE = jnp.einsum("BLD,DE->BLE", x_BLD, weights[0])
  experts = expert_parallel.Experts(*weights[1:])
  y_BLD, stats = expert_parallel.moe_ffn(x_BLD, logits_BLE, real_BL, experts, moe, train=True)
  stacked = jax.tree.map(lambda s: s[None], stats)
  balance = losses.load_balance(stacked, moe.top_k)[0]
  loss = jnp.sum(y_BLD * cotangent_BLD) + 3 * balance + stats.z / stats.tokens
  return loss, (y_BLD, stats, balance)


CASES = [
  (routing, dispatcher)
  for routing, (_, factor, _) in ROUTINGS.items()
  for dispatcher in (["gather", "einsum"] if factor else ["gather", "einsum", "dense"])
]


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize(("routing", "dispatcher"), CASES)
def test_every_path_equals_the_oracle(routing, dispatcher, mesh):
  result, grads = expected(routing)
  if ROUTINGS[routing][1]:
    assert 0.05 < len(result.dropped) / result.routed_E.sum() < 0.6, "a grid without drops"
  assert result.routed_E.max() > 1.5 * result.routed_E.mean(), "routing must be unbalanced"
  x_BLD, real_BL, weights, cotangent_BLD = inputs()
  moe = moe_config(routing, dispatcher)
  with jax.set_mesh(mesh_of(**MESHES[mesh])):
    args = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (x_BLD, weights))
    loss = functools.partial(layer_loss, moe=moe)
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (_, (y_BLD, stats, balance)), (dx_BLD, dweights) = step(
      *args, real_BL, cotangent_BLD.astype(np.float32)
    )
  # float32 sums of some tens of terms of order 1 to 10
  close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-4)
  close(y_BLD, result.y_BLD)  # so the same assignments were dropped
  np.testing.assert_array_equal(stats.routed_E, result.routed_E)
  np.testing.assert_array_equal(stats.kept_E, result.kept_E)
  assert stats.tokens == result.tokens
  close(stats.prob_E, result.prob_E)
  close(stats.z, result.z)
  close(stats.entropy, result.entropy)
  close(balance, result.balance)
  names = ("x", "router", "gate", "up", "down")
  for got, want, name in zip((dx_BLD, *dweights), grads, names, strict=True):
    assert np.abs(want).max() > 1e-2, f"no gradient reaches {name}"
    close(got, want, err_msg=name)


def test_drops_by_hand():
  """T=4, E=2, K=1, C=1: the second token of each expert is dropped, padding takes no slot."""
  routing = routers.Routing(
    token_N=jnp.arange(4), expert_N=jnp.array([0, 1, 0, 1]), gate_N=jnp.ones(4),
    real_N=jnp.array([True, False, True, True]), probs_TE=jnp.ones((4, 2)) / 2,
  )  # fmt: skip
  slots = dispatch.assign_slots(routing, num_experts=2, capacity=1)
  assert slots.kept_N.tolist() == [True, False, False, True]
  assert slots.slot_N.tolist() == [0, 2, 2, 1]  # 2 = E*C: no slot
  x_TD = jnp.arange(8.0).reshape(4, 2)
  dispatcher = dispatch.DISPATCHERS[config_lib.Dispatch.GATHER]
  packed_ECD = dispatcher.pack(x_TD, routing, slots, 2, 1)
  assert packed_ECD.tolist() == [[[0, 1]], [[6, 7]]]
  assert dispatcher.combine(packed_ECD, routing, slots, 4).tolist() == [
    [0, 1], [0, 0], [0, 0], [6, 7],
  ]  # fmt: skip


@pytest.mark.parametrize("dispatcher", ["gather", "einsum"])
def test_combine_reads_no_empty_slot(dispatcher):
  """Empty slots hold whatever an expert made of nothing: here NaN, which would show."""
  routing = routers.Routing(
    jnp.arange(3), jnp.array([0, 0, 1]), jnp.ones(3), jnp.ones(3, bool), jnp.ones((3, 2)) / 2
  )
  slots = dispatch.assign_slots(routing, 2, capacity=3)
  y_ECD = jnp.full((2, 3, 5), jnp.nan).at[0, :2].set(1.0).at[1, 0].set(2.0)
  if dispatcher == "einsum":  # multiplies by a one-hot, so its experts must make 0 of 0
    y_ECD = jnp.nan_to_num(y_ECD)
  y_TD = dispatch.DISPATCHERS[config_lib.Dispatch(dispatcher)].combine(y_ECD, routing, slots, 3)
  np.testing.assert_array_equal(y_TD, [[1.0] * 5, [1.0] * 5, [2.0] * 5])


@pytest.mark.parametrize(
  ("factor", "expected_capacity"),
  [(1.0, 4), (1.25, 5), (1.3, 6), (1.1, 5), (0, 16), (9.0, 16), (0.01, 1)],
)
def test_capacity_by_hand(factor, expected_capacity):
  assert dispatch.capacity(factor, tokens=16, top_k=2, num_experts=8) == expected_capacity


def test_switch_and_mixtral_gates_by_hand(one_device):
  logits_TE = jnp.log(jnp.array([[0.5, 0.1, 0.4], [0.2, 0.7, 0.1]]))
  real_T = jnp.ones(2, bool)
  switch = routers.switch(
    logits_TE, real_T, config_lib.MoE(num_experts=3, top_k=1, renormalize=False)
  )
  assert switch.expert_N.tolist() == [0, 1]
  np.testing.assert_allclose(switch.gate_N, [0.5, 0.7], rtol=1e-6)
  mixtral = routers.topk(logits_TE, real_T, config_lib.MoE(num_experts=3, top_k=2))
  assert mixtral.token_N.tolist() == [0, 0, 1, 1]
  assert mixtral.expert_N.tolist() == [0, 2, 1, 0]
  np.testing.assert_allclose(mixtral.gate_N, [5 / 9, 4 / 9, 7 / 9, 2 / 9], rtol=1e-6)


def test_balance_loss_is_one_when_balanced_for_every_k():
  for E, K in ((4, 1), (8, 2), (64, 8)):
    stats = expert_parallel.MoeStats(
      tokens=jnp.array([E]), routed_E=jnp.full((1, E), K), kept_E=jnp.full((1, E), K),
      prob_E=jnp.ones((1, E)), z=jnp.zeros(1), entropy=jnp.zeros(1),
    )  # fmt: skip
    np.testing.assert_allclose(losses.load_balance(stats, K), [1.0], rtol=1e-6)
  collapsed = stats._replace(
    routed_E=jnp.zeros((1, 64), int).at[0, 0].set(8 * 64),
    prob_E=jnp.zeros((1, 64)).at[0, 0].set(64),
  )
  np.testing.assert_allclose(losses.load_balance(collapsed, 8), [64.0], rtol=1e-6)


def test_a_lost_statistic_raises():
  stats = expert_parallel.MoeStats(*(jnp.zeros((1, 4)) for _ in range(6)))
  sums = losses.Sums(jnp.zeros(()), jnp.zeros(()), jnp.ones((), int), stats._replace(
    tokens=jnp.ones(1)))  # fmt: skip
  with pytest.raises(ValueError, match="1 of 2 MoE layers"):
    losses.total(sums, config_lib.Loss(), config_lib.MoE(num_experts=4), num_moe_layers=2)


def test_one_expert_equals_the_dense_layer(one_device):
  """E=1, K=1: outputs and gradients of the dense FFN with the same weights."""
  model = toy_config(
    num_experts=1, top_k=1, renormalize=False, capacity_factor=1.0, expert_dim=14
  ).model
  moe_graph, moe_params = nnx.split(MoELayer(model, nnx.Rngs(0)))
  dense_graph, dense_params = nnx.split(DenseFFN(model, nnx.Rngs(1)))
  x_BLD = jax.random.normal(jax.random.key(2), (3, 9, model.dim))

  def moe(weights, x_BLD):
    names = ("gate_EDF", "up_EDF", "down_EFD")
    experts = {n: moe_params[n].replace(w[None]) for n, w in zip(names, weights, strict=True)}
    layer = nnx.merge(moe_graph, nnx.State(experts | {"router_DE": moe_params["router_DE"]}))
    return layer(x_BLD, jnp.ones((3, 9), bool), jax.random.key(0), train=True)[0]

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


def test_jitter_does_not_depend_on_the_mesh():
  model = toy_config(jitter=0.3).model
  outputs = []
  for axes in ({}, dict(expert=4, data=2)):
    with jax.set_mesh(mesh_of(**axes)):
      layer = MoELayer(model, nnx.Rngs(0))
      x_BLD = jax.random.normal(jax.random.key(2), (8, 9, model.dim))
      logits = jax.jit(lambda x, layer=layer: layer.router_logits(x, jax.random.key(5), train=True))
      outputs.append(np.asarray(logits(x_BLD)))
      quiet = np.asarray(layer.router_logits(x_BLD, jax.random.key(5), train=False))
  np.testing.assert_allclose(outputs[0], outputs[1], rtol=1e-5, atol=1e-6)
  assert np.abs(outputs[0] - quiet).max() > 1e-3


def test_router_stays_float32_under_bfloat16(one_device):
  model = toy_config().model
  model.compute_dtype = config_lib.Dtype.BFLOAT16
  layer = MoELayer(model, nnx.Rngs(0))
  x_BLD = jax.random.normal(jax.random.key(2), (2, 9, model.dim), jnp.bfloat16)
  logits = layer.router_logits(x_BLD, jax.random.key(0), train=False)
  want = np.asarray(x_BLD, np.float64) @ np.asarray(layer.router_DE[...], np.float64)
  assert logits.dtype == jnp.float32
  np.testing.assert_allclose(logits, want, rtol=1e-5, atol=1e-6)  # bfloat16 would miss by 1e-2
  call = jax.jit(lambda x: layer(x, jnp.ones((2, 9), bool), jax.random.key(0), train=True))
  y_BLD, stats = call(x_BLD)
  assert y_BLD.dtype == jnp.bfloat16 and stats.routed_E.dtype == jnp.int32
