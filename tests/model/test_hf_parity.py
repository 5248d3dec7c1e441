"""The MoE blocks of Hugging Face transformers, random weights: same outputs, gradients, experts."""

import functools
import importlib
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax import config as config_lib
from moe_jax import sharding, validation
from moe_jax.config import BalanceScope, Dispatch
from moe_jax.model.feedforward import MoEFFN, moe_feedforward
from moe_jax.moe import counts, dispatch, routers
from moe_jax.moe.layer import router_inputs
from moe_jax.moe.routing import Routing
from moe_jax.training import losses
from tests.support.hf_blocks import B, D, L, arrays, build, close, to_ours, torch
from tests.support.toys import mesh_of


class Peer(NamedTuple):
  package: str  # of transformers.models
  name: str  # of its block and config
  block: str
  theirs: dict  # config fields
  ours: dict  # of config.MoE


def norm_topk(package, name, renormalize):
  """OLMoE and Qwen3-MoE, at sizes that differ."""
  E, K, F, field = {"Olmoe": (7, 3, 6, "intermediate_size"),
                    "Qwen3Moe": (9, 4, 3, "moe_intermediate_size")}[name]  # fmt: skip
  theirs = dict(num_experts=E, num_experts_per_tok=K, norm_topk_prob=renormalize)
  ours = dict(num_experts=E, top_k=K, expert_dim=F, renormalize=renormalize)
  return Peer(package, name, "SparseMoeBlock", theirs | {field: F}, ours)


def deepseek(renormalize):
  return Peer(
    "deepseek_v3", "DeepseekV3", "MoE",
    dict(n_routed_experts=12, num_experts_per_tok=3, moe_intermediate_size=5, n_shared_experts=2,
         n_group=4, topk_group=2, routed_scaling_factor=1.7, norm_topk_prob=renormalize),
    dict(num_experts=12, top_k=3, expert_dim=5, shared_experts=2, expert_groups=4, top_groups=2,
         gate_scale=1.7, renormalize=renormalize, score=config_lib.Score.SIGMOID),
  )  # fmt: skip


PEERS = {
  "mixtral": Peer(
    "mixtral", "Mixtral", "SparseMoeBlock",
    dict(num_local_experts=8, num_experts_per_tok=2, intermediate_size=6),
    dict(num_experts=8, top_k=2, expert_dim=6, renormalize=True),
  ),
  "olmoe": norm_topk("olmoe", "Olmoe", False),
  "olmoe-norm": norm_topk("olmoe", "Olmoe", True),
  "qwen3": norm_topk("qwen3_moe", "Qwen3Moe", False),
  "qwen3-norm": norm_topk("qwen3_moe", "Qwen3Moe", True),
  "deepseek": deepseek(False),
  "deepseek-norm": deepseek(True),
}  # fmt: skip
PATHS = {  # dispatcher, mesh
  "gather": (Dispatch.GATHER, {}),
  "einsum": (Dispatch.EINSUM, {}),
  "dense": (Dispatch.DENSE, {}),
  "grouped": (Dispatch.GROUPED, {}),
  "gather-expert4": (Dispatch.GATHER, dict(expert=4)),
  "grouped-expert4": (Dispatch.GROUPED, dict(expert=4)),
}
CASES = [("mixtral", path) for path in PATHS] + [(peer, "gather") for peer in list(PEERS)[1:]]


def by_expert(expert_TK, gate_TK):
  """Each token's experts and gates, in the order of the experts: theirs is not always by gate."""
  order_TK = np.argsort(expert_TK, axis=1)
  return np.take_along_axis(expert_TK, order_TK, 1), np.take_along_axis(gate_TK, order_TK, 1)


class Result(NamedTuple):
  y_BLD: np.ndarray
  expert_TK: np.ndarray
  gate_TK: np.ndarray
  grads: dict


@functools.cache
def theirs(name):
  """(Result, weights, bias_E)."""
  peer = PEERS[name]
  block = build(peer.package, peer.name + peer.block, peer.name + "Config", **peer.theirs)
  bias_E = np.zeros(peer.ours["num_experts"], np.float32)
  if name.startswith("deepseek"):
    # Scores are in (0, 1), so some chosen sums are negative: both sides mask other groups with -inf
    # (transformers from 5.20 at least), where masking with 0 would choose from them.
    bias_E = np.float32(np.random.default_rng(2).normal(size=bias_E.shape) * 0.4 - 0.8)
    block.gate.e_score_correction_bias.copy_(torch.tensor(bias_E))
  x_BLD, cotangent_BLD, _ = map(torch.tensor, arrays())
  x_BLD.requires_grad_()
  y_BLD = block(x_BLD)
  y_BLD.backward(cotangent_BLD)
  _, gate_TK, expert_TK = block.gate(x_BLD)
  if name.startswith("deepseek"):
    _check_bias_and_groups_matter(block.gate, x_BLD, expert_TK)
  parameters = dict(block.named_parameters())
  grads = to_ours({n: p.grad for n, p in parameters.items()}) | {"x_BLD": x_BLD.grad.numpy()}
  chosen = by_expert(expert_TK.numpy(), gate_TK.detach().numpy())
  return Result(y_BLD.detach().numpy(), *chosen, grads), to_ours(parameters), bias_E


def _check_bias_and_groups_matter(gate, x_BLD, expert_TK):
  sets = expert_TK.sort(dim=1).values
  gate.num_group = gate.topk_group = 1
  assert (gate(x_BLD)[2].sort(dim=1).values != sets).any(dim=1).sum() > 3
  gate.num_group, gate.topk_group = 4, 2
  gate.e_score_correction_bias.zero_()
  assert (gate(x_BLD)[2].sort(dim=1).values != sets).any(dim=1).sum() > 3


def layer_of(moe, **mesh):
  """(weights by name -> MoEFFN) of a valid config."""
  config = config_lib.Config(
    model=config_lib.Model(dim=D, moe=moe),
    data=config_lib.Data(seq_len=L, batch_size=B),
    mesh=config_lib.Mesh(**{"data": 1} | mesh),
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


def moe_of(peer, dispatcher):
  """Nothing drops, as theirs; blocked: auto would measure."""
  return config_lib.MoE(
    capacity_factor=math.inf, eval_capacity_factor=math.inf, dispatch=dispatcher,
    grouped_matmul=config_lib.GroupedMatmul.BLOCKED, **peer.ours,
  )  # fmt: skip


def call(layer, x_BLD, bias_E, real_BL=None):
  real_BL = jnp.ones((B, L), bool) if real_BL is None else real_BL
  ids_BL, key = jnp.zeros((B, L), jnp.int32), jax.random.key(0)
  weights = layer.ffn_weights(x_BLD.dtype, bias_E)
  inputs = router_inputs(x_BLD, real_BL, ids_BL, weights.moe, layer.moe, key, train=False)
  y_BLD, stats, _ = moe_feedforward(x_BLD, real_BL, ids_BL, weights, layer.moe, key, train=False)
  return y_BLD, (stats, inputs)


@pytest.mark.parametrize(("name", "path"), CASES)
def test_block(name, path):
  want, weights, bias_E = theirs(name)
  dispatcher, mesh = PATHS[path]
  moe = moe_of(PEERS[name], dispatcher)
  x_BLD, cotangent_BLD, _ = arrays()

  @jax.jit
  def step(x_BLD, weights):
    def run(x_BLD, weights):
      return call(build_layer(weights), x_BLD, bias_E)

    y_BLD, vjp, (stats, inputs) = jax.vjp(run, x_BLD, weights, has_aux=True)
    routing = routers.route(inputs, moe, 1, capacity=B * L, train=False)
    return y_BLD, stats, routing, vjp(cotangent_BLD)

  with jax.set_mesh(mesh_of(**mesh)):
    build_layer = layer_of(moe, **mesh)
    y_BLD, stats, routing, (dx_BLD, dweights) = step(x_BLD, weights)
  expert_TK, gate_TK = by_expert(
    *(np.asarray(a).reshape(B * L, -1) for a in (routing.expert_N, routing.gate_N))
  )
  np.testing.assert_array_equal(expert_TK, want.expert_TK)
  counts_E = np.bincount(want.expert_TK.reshape(-1), minlength=moe.num_experts)
  assert counts_E.max() > 1.5 * counts_E.mean(), "routing must be unbalanced"
  np.testing.assert_array_equal(stats.routed_E, counts_E)
  np.testing.assert_array_equal(stats.kept_E, counts_E)
  close(gate_TK, want.gate_TK, "gates")
  close(y_BLD, want.y_BLD, "y_BLD")
  grads = dweights | {"x_BLD": dx_BLD}
  assert grads.keys() == want.grads.keys()
  for leaf in grads:
    close(grads[leaf], want.grads[leaf], leaf)


def sums_of(stats, real_BL):
  """Sums of one layer's statistics; there is no language model."""
  layers = jax.tree.map(lambda s: s[None], stats)
  return losses.sums(jnp.zeros((B, L, 2)), jnp.zeros((B, L), jnp.int32), real_BL, layers)


@pytest.mark.parametrize("padded", [False, True])
def test_balance_loss(one_device, padded):
  """Theirs is K at perfect balance. One layer: over several they pool f and P, we mean losses."""
  _, weights, bias_E = theirs("mixtral")
  peer = PEERS["mixtral"]
  K = peer.ours["top_k"]
  module = importlib.import_module("transformers.models.mixtral.modeling_mixtral")
  x_BLD, _, real_BL = arrays()
  real_BL = real_BL if padded else np.ones((B, L), bool)

  router_ED = torch.tensor(weights["router_DE"].T, requires_grad=True)
  logits_TE = torch.tensor(x_BLD).reshape(-1, D) @ router_ED.T
  mask_BL = torch.tensor(real_BL, dtype=torch.int64) if padded else None
  want = module.load_balancing_loss_func((logits_TE,), peer.ours["num_experts"], K, mask_BL) / K
  want.backward()

  build_layer = layer_of(moe_of(peer, Dispatch.GATHER))

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
  fields = dict(num_experts=E, expert_capacity=C, d_ff=6)
  router = build("switch_transformers", "SwitchTransformersTop1Router", "SwitchTransformersConfig",
                 **fields)  # fmt: skip
  module = importlib.import_module(type(router).__module__)
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

  moe = config_lib.MoE(
    num_experts=E, top_k=1, expert_dim=6, renormalize=False, router=config_lib.Router.SWITCH,
    eval_capacity_factor=C * E / L,
  )  # fmt: skip
  assert dispatch.capacity(moe.eval_capacity_factor, L, 1, E) == C
  weights = {"router_DE": router.classifier.weight.detach().numpy().T}
  rng = np.random.default_rng(3)
  for leaf, shape in dict(gate_EDF=(E, D, 6), up_EDF=(E, D, 6), down_EFD=(E, 6, D)).items():
    weights[leaf] = np.float32(rng.normal(size=shape))
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
