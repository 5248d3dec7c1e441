"""The MoE block against the dense one, gradients of its router, its noise and its precision."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.config import Dispatch, Dtype, GroupedMatmul, Loss, Model, Router, Score, override
from moe_jax.errors import UserError
from moe_jax.model.feedforward import DenseFFN, MoEFFN, feedforward, moe_feedforward
from moe_jax.moe import layer as layer_lib
from moe_jax.moe import validation
from moe_jax.moe.routing import Mode, Tokens
from tests.support.toys import mesh_of, slow_unless, toy_config


def call_layer(layer, x_BLD, *, train=True, seed=0):
  """The layer on real tokens without balancing bias."""
  B, L = x_BLD.shape[:2]
  ids_BL, key = jnp.zeros((B, L), jnp.int32), jax.random.key(seed)
  tokens = Tokens(ids_BL, jnp.ones((B, L), jnp.int32), ids_BL)
  weights = layer.ffn_weights(x_BLD.dtype, jnp.zeros(layer.moe.num_experts))
  return moe_feedforward(x_BLD, tokens, weights, Model(moe=layer.moe), key, Mode(train))[:2]


def call_dense(layer, x_BLD):
  return feedforward(x_BLD, layer.weights(x_BLD.dtype))


@pytest.mark.parametrize("how", slow_unless([Dispatch.GATHER], [Dispatch.GATHER, Dispatch.GROUPED]))
@pytest.mark.parametrize("router", list(Router))
@pytest.mark.parametrize("score", list(Score))
@pytest.mark.parametrize(
  ("top_k", "renormalize"),
  [(1, False), (2, True)]
  + [pytest.param(*case, marks=pytest.mark.slow) for case in ((1, True), (2, False))],
)
def test_the_router_has_a_gradient(top_k, renormalize, score, router, how, one_device):
  """Through the gates alone, in every combination that validate() allows."""
  factor = 2.0 if how is Dispatch.GATHER or router is Router.EXPERT_CHOICE else math.inf
  config = toy_config(
    top_k=top_k,
    renormalize=renormalize,
    score=score,
    router=router,
    dispatch=how,
    capacity_factor=factor,
    eval_capacity_factor=factor,
    grouped_matmul=GroupedMatmul.RAGGED_DOT,
  )
  config = override(config, {"loss": Loss(load_balance=0.0)})
  try:
    validation.validate(config)
  except UserError as refused:
    assert "router" in str(refused) or "renormalize" in str(refused)
    return
  graph, params = nnx.split(MoEFFN(config.model, nnx.Rngs(0)))
  x_BLD = jax.random.normal(jax.random.key(2), (3, 9, 10))

  def loss(params):
    return jnp.sum(jnp.sin(call_layer(nnx.merge(graph, params), x_BLD)[0]))

  for path, grad in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(params)):
    assert np.abs(grad).max() > 1e-5, jax.tree_util.keystr(path)


@pytest.mark.preflight
@pytest.mark.parametrize("how", ["gather", "grouped"])
def test_one_expert_equals_the_dense_layer(how, one_device):
  """E=1, K=1: outputs and gradients of the dense FFN with the same weights."""
  model = toy_config(
    num_experts=1,
    top_k=1,
    capacity_factor=math.inf,
    expert_dim=14,
    dispatch=Dispatch(how),
    grouped_matmul=GroupedMatmul.BLOCKED,
  ).model
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
    return call_dense(nnx.merge(dense_graph, params), x_BLD)

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
  np.testing.assert_allclose(y_BLD, call_dense(one, x_BLD), rtol=1e-5, atol=1e-6)


def test_shared_experts_add_the_dense_layer(one_device):
  """Two shared experts: the routed output plus a dense FFN twice an expert wide."""
  layer = MoEFFN(toy_config(shared_experts=2).model, nnx.Rngs(0))
  assert layer.shared.gate_DF.shape == (10, 2 * 18)
  x_BLD = jax.random.normal(jax.random.key(2), (3, 9, 10))
  with_shared, _ = jax.jit(lambda x: call_layer(layer, x))(x_BLD)
  shared, layer.shared = layer.shared, None
  routed, _ = jax.jit(lambda x: call_layer(layer, x))(x_BLD)
  want = routed + call_dense(shared, x_BLD)
  np.testing.assert_allclose(with_shared, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  "fields",
  [
    dict(jitter=0.3),
    dict(router=Router.NOISY_TOPK),
    dict(router=Router.RANDOM, renormalize=False),
  ],
  ids=["jitter", "noisy", "random"],
)
@pytest.mark.slow
def test_what_is_drawn_does_not_depend_on_the_mesh(fields):
  model = toy_config(**fields).model
  outputs = []
  for axes in ({}, dict(expert=4, data=2)):
    with jax.set_mesh(mesh_of(**axes)):
      layer = MoEFFN(model, nnx.Rngs(0))
      x_BLD = jax.random.normal(jax.random.key(2), (8, 9, model.dim))
      draw = jax.jit(lambda x, seed, m=layer: call_layer(m, x, seed=seed)[0])
      outputs.append(np.asarray(draw(x_BLD, 5)))
      assert np.abs(outputs[-1] - draw(x_BLD, 6)).max() > 1e-4, "nothing was drawn"
  np.testing.assert_allclose(outputs[0], outputs[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  "fields", [dict(jitter=0.3), dict(router=Router.NOISY_TOPK)], ids=["jitter", "noisy"]
)
def test_evaluation_has_no_jitter_and_no_noise(fields, one_device):
  layer = MoEFFN(toy_config(**fields).model, nnx.Rngs(0))
  x_BLD = jax.random.normal(jax.random.key(2), (3, 9, 10))
  draw = jax.jit(lambda x, seed: call_layer(layer, x, train=False, seed=seed)[0])
  np.testing.assert_array_equal(draw(x_BLD, 5), draw(x_BLD, 6))


def test_router_stays_float32_under_bfloat16(one_device):
  model = dataclasses.replace(toy_config().model, compute_dtype=Dtype.BFLOAT16)
  layer = MoEFFN(model, nnx.Rngs(0))
  x_BLD = jax.random.normal(jax.random.key(2), (2, 9, model.dim), jnp.bfloat16)
  tokens = Tokens(jnp.zeros((2, 9), int), jnp.ones((2, 9), int), jnp.zeros((2, 9), int))
  weights = layer.weights(jnp.bfloat16, jnp.zeros(4))
  assert all(w.dtype == jnp.bfloat16 for w in jax.tree.leaves(weights.experts))
  inputs = layer_lib.router_inputs(
    x_BLD, tokens, weights, layer.moe, jax.random.key(0), train=False
  )
  logits = inputs.logits_BLE
  want = np.asarray(x_BLD, np.float64) @ np.asarray(layer.router_DE[...], np.float64)
  assert logits.dtype == jnp.float32
  np.testing.assert_allclose(logits, want, rtol=1e-5, atol=1e-6)  # bfloat16 would miss by 1e-2
  y_BLD, stats = jax.jit(lambda x: call_layer(layer, x))(x_BLD)
  assert y_BLD.dtype == jnp.bfloat16 and stats.routed_E.dtype == jnp.int32
