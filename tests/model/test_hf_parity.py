"""Routers and losses of Hugging Face transformers, random weights: same tokens, same gradients.

Whole models are compared in tests/hf/test_families.py.
"""

import functools
import importlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax import sharding
from moe_jax.config import BalanceScope, Config, Data, Mesh, Model, MoE, Router
from moe_jax.model.feedforward import MoEFFN, moe_feedforward
from moe_jax.moe import counts, dispatch, routers, validation
from moe_jax.moe.layer import router_inputs
from moe_jax.moe.routing import Mode, Routing, Tokens
from moe_jax.training import losses

MISSING = "compares with Hugging Face: pip install -e '.[hf]'"
torch = pytest.importorskip("torch", reason=MISSING)
transformers = pytest.importorskip("transformers", reason=MISSING)
B, L, D = 4, 7, 10


def close(got, want, name=""):
  # float32 on both sides, sums of some tens of terms in another order: the differences measured
  # are below 4e-7 of the largest element, and a wrong gate or token misses by 1e-2 or more.
  want = np.asarray(want)
  largest = np.abs(want).max()
  assert largest > 1e-2, f"{name} is zero on both sides"
  np.testing.assert_allclose(got, want, rtol=0, atol=3e-6 * largest, err_msg=name)


def arrays():
  """x_BLD with an offset, so that routing is unbalanced; the cotangent; padding."""
  rng = np.random.default_rng(0)
  x_BLD = rng.normal(size=(B, L, D)) + 0.5 * rng.normal(size=D)
  real_BL = np.arange(L)[None] < np.array([[7], [4], [1], [6]])
  return np.float32(x_BLD), np.float32(rng.normal(size=(B, L, D))), real_BL


def weights_of(moe):
  """Of a layer with experts like Mixtral's."""
  rng, E, F = np.random.default_rng(3), moe.num_experts, moe.expert_dim
  shapes = dict(router_DE=(D, E), gate_EDF=(E, D, F), up_EDF=(E, D, F), down_EFD=(E, F, D))
  return {name: np.float32(0.5 * rng.normal(size=shape)) for name, shape in shapes.items()}


def layer_of(moe):
  """(weights by name -> MoEFFN) of a valid config."""
  config = Config(
    model=Model(dim=D, moe=moe),
    data=Data(seq_len=L, batch_size=B),
    mesh=Mesh(data=1),
  )
  validation.validate(config)
  graph, params = nnx.split(MoEFFN(config.model, nnx.Rngs(0)))

  def with_weights(weights):
    named = {sharding.param_name(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}
    assert {n: a.shape for n, a in named.items()} == {n: a.shape for n, a in weights.items()}
    return nnx.merge(
      graph,
      jax.tree.map_with_path(lambda path, _: weights[sharding.param_name(path)], params),
    )

  return with_weights


def call(layer, x_BLD, bias_E, real_BL=None):
  real_BL = jnp.ones((B, L), bool) if real_BL is None else real_BL
  ids_BL, key = jnp.zeros((B, L), jnp.int32), jax.random.key(0)
  tokens, model = Tokens(ids_BL, real_BL.astype(jnp.int32), ids_BL), Model(moe=layer.moe)
  weights = layer.ffn_weights(x_BLD.dtype, bias_E)
  inputs = router_inputs(x_BLD, tokens, weights.moe, layer.moe, key, train=False)
  y_BLD, stats, _ = moe_feedforward(x_BLD, tokens, weights, model, key, Mode(train=False))
  return y_BLD, (stats, inputs)


def sums_of(stats, real_BL):
  """Sums of one layer's statistics; there is no language model."""
  layers = jax.tree.map(lambda s: s[None], stats)
  return losses.sums(jnp.zeros((B, L)), jnp.zeros((B, L)), real_BL, layers)


@pytest.mark.parametrize("padded", [False, True])
def test_balance_loss(one_device, padded):
  """Theirs is K at perfect balance. One layer: over several they pool f and P, we mean losses."""
  E, K = 8, 2
  moe = MoE(num_experts=E, top_k=K, expert_dim=6)
  weights, bias_E = weights_of(moe), np.zeros(E, np.float32)
  module = importlib.import_module("transformers.models.mixtral.modeling_mixtral")
  x_BLD, _, real_BL = arrays()
  real_BL = real_BL if padded else np.ones((B, L), bool)

  router_ED = torch.tensor(weights["router_DE"].T, requires_grad=True)
  logits_TE = torch.tensor(x_BLD).reshape(-1, D) @ router_ED.T
  mask_BL = torch.tensor(real_BL, dtype=torch.int64) if padded else None
  want = module.load_balancing_loss_func((logits_TE,), E, K, mask_BL) / K
  want.backward()

  build_layer = layer_of(moe)

  @jax.jit
  @jax.value_and_grad
  def balance(router_DE):
    layer = build_layer(weights | {"router_DE": router_DE})
    _, (stats, _) = call(layer, x_BLD, bias_E, real_BL)
    return losses.load_balance(sums_of(stats, real_BL), BalanceScope.GLOBAL)[0]

  got, drouter_DE = balance(weights["router_DE"])
  assert want > 1.1, "routing must be unbalanced"
  close(got, want.detach(), "balance")
  close(drouter_DE, router_ED.grad.T, "router_DE")


class SwitchOutputs(NamedTuple):
  y_BLD: jax.Array
  stats: counts.MoeStats
  routing: Routing
  slots: dispatch.Slots
  balance: jax.Array
  z: jax.Array


def test_switch(one_device):
  """Router, dropped tokens and losses; not the block: their experts are ReLU MLPs."""
  E, C = 5, 2
  module = importlib.import_module(
    "transformers.models.switch_transformers.modeling_switch_transformers"
  )
  config = transformers.SwitchTransformersConfig(
    hidden_size=D, num_experts=E, expert_capacity=C, d_ff=6
  )
  router = module.SwitchTransformersTop1Router(config).eval()
  with torch.no_grad():
    weight = router.classifier.weight
    weight.copy_(torch.tensor(0.5 * np.random.default_rng(1).normal(size=weight.shape)))
  x_BLD, cotangent_BLD, _ = arrays()
  cotangent_BL = cotangent_BLD[..., 0]
  their_x = torch.tensor(x_BLD, requires_grad=True)
  kept_BLE, gate_BL1, logits_BLE = router(their_x)
  kept_BLE = kept_BLE.numpy().astype(bool)
  dropped = 1 - kept_BLE.sum() / (B * L)
  assert 0.1 < dropped < 0.7 and kept_BLE.sum(axis=1).max() == C, "nothing to compare"
  probs_BLE = torch.softmax(logits_BLE, dim=-1)
  want = [
    module.load_balancing_loss_func(probs_BLE, probs_BLE.argmax(dim=-1)),
    module.router_z_loss_func(logits_BLE),
  ]
  # The gates of kept tokens, and both losses.
  gated = gate_BL1[..., 0] * torch.tensor(cotangent_BL * kept_BLE.any(axis=-1))
  (gated.sum() + 3 * want[0] + want[1]).backward()

  moe = MoE(
    num_experts=E,
    top_k=1,
    expert_dim=6,
    renormalize=False,
    router=Router.SWITCH,
    eval_capacity_factor=C * E / L,
  )
  assert dispatch.capacity(moe.eval_capacity_factor, L, 1, E) == C
  weights = weights_of(moe) | {"router_DE": router.classifier.weight.detach().numpy().T}
  build_layer = layer_of(moe)

  @jax.jit
  @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
  def step(x_BLD, router_DE):
    layer = build_layer(weights | {"router_DE": router_DE})
    y_BLD, (stats, inputs) = call(layer, x_BLD, jnp.zeros(E))
    routing = routers.route(inputs, moe, B, capacity=C, train=False)
    slots = dispatch.capacity_slots(routing.assignments, E, B, C)
    sums = sums_of(stats, jnp.ones((B, L), bool))
    # Their balance loss averages over the rows.
    balance = losses.load_balance(sums, BalanceScope.SEQUENCE)[0]
    z = stats.z / stats.tokens
    gate_T = jnp.zeros(B * L).at[routing.token_N].add(slots.kept_N * routing.gate_N)
    loss = jnp.sum(gate_T * cotangent_BL.reshape(-1)) + 3 * balance + z
    return loss, SwitchOutputs(y_BLD, stats, routing, slots, balance, z)

  (_, got), (dx_BLD, drouter_DE) = step(x_BLD, weights["router_DE"])
  stats, routing, slots = got.stats, got.routing, got.slots
  token_N = np.asarray(routing.token_N)
  np.testing.assert_array_equal(token_N, np.arange(B * L))  # K = 1, by position
  np.testing.assert_array_equal(routing.expert_N, probs_BLE.argmax(dim=-1).reshape(-1))
  close(routing.gate_N, gate_BL1.detach().reshape(-1), "gates")
  np.testing.assert_array_equal(slots.kept_N, kept_BLE.any(axis=-1).reshape(-1))
  # The layer drops the same tokens: their rows are zero.
  np.testing.assert_array_equal((got.y_BLD != 0).any(axis=-1), kept_BLE.any(axis=-1))
  np.testing.assert_array_equal(stats.kept_E, kept_BLE.sum(axis=(0, 1)))
  close(routing.probs_TE.reshape(B, L, E), probs_BLE.detach(), "probabilities")
  close(got.balance, want[0].detach(), "balance")
  close(got.z, want[1].detach(), "z")
  close(dx_BLD, their_x.grad, "x_BLD")
  close(drouter_DE, router.classifier.weight.grad.T, "router_DE")
