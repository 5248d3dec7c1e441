"""The decoder: attention against NumPy, causality, packing, layer patterns, rematerialisation."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.config import Dtype, Remat, override
from moe_jax.kernels.attention import reference_attention
from moe_jax.kernels.mask import CAUSAL
from moe_jax.model import attention, pattern
from moe_jax.moe.routing import Tokens
from tests.support.toys import build, slow_unless, toy_config

pytestmark = pytest.mark.usefixtures("one_device")


def tokens_of(config, batch=2, seed=0):
  L = config.data.seq_len
  tokens = np.random.default_rng(seed).integers(0, config.model.vocab_size, (batch, L))
  return (
    jnp.asarray(tokens, jnp.int32),
    jnp.ones((batch, L), jnp.int32),
    jnp.tile(jnp.arange(L, dtype=jnp.int32), (batch, 1)),
  )


def forward(graph, params, tokens, segments, positions, train=True):
  model = nnx.merge(graph, params)
  bias_ZE = jnp.zeros(pattern.bias_shape(model.model))
  tokens = Tokens(tokens, segments, positions)
  out = model(tokens, bias_ZE, jax.random.key(0), train=train)
  return out.logits_BLV, out.stats


def test_attention_equals_numpy():
  """RoPE, grouped keys, causal and segment mask, in float64, head by head."""
  model = toy_config().model
  layer = attention.AttentionLayer(model, nnx.Rngs(0))
  rng = np.random.default_rng(0)
  B, L, A, H, G = 2, 7, model.head_dim, model.num_heads, model.num_kv_heads
  x_BLD = rng.normal(size=(B, L, model.dim))
  segments = np.array([[1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 1, 1, 1]])
  positions = np.array([[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6]])
  weights = [
    np.asarray(w[...], np.float64) for w in (layer.q_DHA, layer.k_DGA, layer.v_DGA, layer.out_HAD)
  ]

  def rotate(vector, position):
    out = np.zeros(A)
    for i in range(A // 2):
      angle = position * model.rope_base ** (-2 * i / A)
      a, b = vector[i], vector[i + A // 2]
      out[i] = a * np.cos(angle) - b * np.sin(angle)
      out[i + A // 2] = a * np.sin(angle) + b * np.cos(angle)
    return out

  want = np.zeros((B, L, model.dim))
  for b, head, query in np.ndindex(B, H, L):
    q = rotate(x_BLD[b, query] @ weights[0][:, head], positions[b, query])
    keys = [s for s in range(query + 1) if segments[b, s] == segments[b, query]]
    group = head // (H // G)
    scores = [q @ rotate(x_BLD[b, s] @ weights[1][:, group], positions[b, s]) for s in keys]
    p = np.exp(np.array(scores) / np.sqrt(A))
    p /= p.sum()
    value = sum(w * (x_BLD[b, s] @ weights[2][:, group]) for w, s in zip(p, keys, strict=True))
    want[b, query] += value @ weights[3][head]

  def attend(q_BLHA, k_BLGA, v_BLGA, mask):
    return reference_attention(q_BLHA, k_BLGA, v_BLGA, jnp.asarray(segments)), None

  weights = layer.weights(jnp.float32)
  got, _ = attention.grouped_query_attention(
    jnp.asarray(x_BLD, jnp.float32), weights, jnp.asarray(positions), attend, model, CAUSAL
  )
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)  # float32 against float64


def test_no_token_sees_the_future():
  """The last token changes; every earlier logit is equal to the last bit, drops included."""
  config = toy_config(capacity_factor=0.8, eval_capacity_factor=0.8)
  graph, params = build(config)
  tokens, segments, positions = tokens_of(config)
  run = jax.jit(functools.partial(forward, graph, params))
  before, stats = run(tokens, segments, positions)
  after, _ = run(tokens.at[:, -1].set((tokens[:, -1] + 1) % 20), segments, positions)
  np.testing.assert_array_equal(before[:, :-1], after[:, :-1])
  assert (before[:, -1] != after[:, -1]).all()
  assert (stats.kept_E.sum(-1) < stats.routed_E.sum(-1)).all(), "nothing was dropped"


def test_packed_documents_do_not_see_each_other():
  """Two documents in a row give the logits that each has alone (nothing dropped)."""
  config = toy_config(capacity_factor=math.inf)
  graph, params = build(config)
  tokens, _, _ = tokens_of(config, batch=1)
  segments = jnp.array([[1, 1, 1, 1, 2, 2, 2, 2, 2]])
  positions = jnp.array([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
  packed, _ = forward(graph, params, tokens, segments, positions)
  ones = jnp.ones((1, 9), jnp.int32)
  alone, _ = forward(graph, params, tokens[:, 4:], ones[:, :5], positions[:, 4:])
  np.testing.assert_allclose(packed[:, 4:], alone, rtol=1e-5, atol=1e-5)


def test_padding_changes_nothing():
  """Other tokens under padding: the same real logits, counts and losses."""
  config = toy_config(capacity_factor=0.8)
  graph, params = build(config)
  tokens, segments, positions = tokens_of(config)
  segments = segments.at[:, 6:].set(0)
  run = jax.jit(functools.partial(forward, graph, params))
  first, stats = run(tokens, segments, positions)
  second, stats2 = run(tokens.at[:, 6:].set(3), segments, positions)
  np.testing.assert_array_equal(first[:, :6], second[:, :6])
  jax.tree.map(np.testing.assert_array_equal, stats, stats2)
  assert stats.tokens.tolist() == [12, 12] and stats.routed_E.sum(-1).tolist() == [24, 24]


@pytest.mark.parametrize(
  ("layers", "every", "first_dense", "expected"),
  [(4, 1, 0, [0, 1, 2, 3]), (4, 2, 0, [1, 3]), (5, 2, 1, [2, 4]), (4, 1, 3, [3])],
)
def test_layer_patterns(layers, every, first_dense, expected):
  config = toy_config({"model.num_layers": layers}, every=every, first_dense=first_dense)
  assert pattern.moe_layers(config.model) == expected
  graph, params = build(config)
  _, stats = forward(graph, params, *tokens_of(config))
  assert stats.routed_E.shape == (len(expected), 4)
  # The blocks that hold experts, counted in the parameters, are the ones the pattern says.
  routers = [v.shape[0] for path, v in nnx.to_flat_state(params) if path[-1] == "router_DE"]
  dense = [v.shape[0] for path, v in nnx.to_flat_state(params) if path[-1] == "gate_DF"]
  assert sum(routers) == len(expected) and sum(dense) == layers - len(expected)


def loss_and_grads(config, params, tokens):
  graph, _ = build(config)

  def loss(params):
    logits, stats = forward(graph, params, *tokens)
    return jnp.sum(jnp.sin(logits)) + jnp.sum(stats.prob_E**2) + jnp.sum(stats.z), stats

  return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)


@pytest.mark.preflight
@pytest.mark.parametrize("remat", slow_unless([Remat.DOTS, Remat.OFFLOAD], Remat))
def test_remat_changes_no_value(remat):
  config = toy_config(capacity_factor=0.8, every=2)
  _, params = build(config)
  tokens = tokens_of(config)
  plain = loss_and_grads(config, params, tokens)
  config = override(config, {"model": dataclasses.replace(config.model, remat=remat)})
  jax.tree.map(
    # the same sums in another order
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
    plain,
    loss_and_grads(config, params, tokens),
  )


def test_bfloat16_follows_float32():
  config = toy_config(capacity_factor=math.inf)
  graph, params = build(config)
  exact, _ = forward(graph, params, *tokens_of(config))
  config = override(config, {"model.compute_dtype": Dtype.BFLOAT16})
  graph, _ = build(config)
  rounded, _ = forward(graph, params, *tokens_of(config))
  assert rounded.dtype == jnp.float32
  # bfloat16 keeps 8 bits; a token near a tie may take another expert, so compare the bulk
  error = np.abs(np.asarray(rounded - exact))
  assert np.median(error) < 0.02 * np.abs(exact).max()
  assert np.median(error) > 0
