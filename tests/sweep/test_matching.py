"""Twins of equal cost: widths by hand, and all else untouched."""

import importlib

import jax
import numpy as np
import pytest
from flax import nnx

from moe_jax.config import Loss, MoE, Router, override
from moe_jax.config.fields import flatten
from moe_jax.errors import UserError
from moe_jax.model import cost, feedforward
from moe_jax.moe import layer
from moe_jax.sweep.matching import match
from tests.support.toys import toy_config

BY = {"active_params": "active", "flops_per_token": "flops_per_token", "total_params": "total"}


def reference(name):
  """Of a config file, or of the toy with a pattern; toys of one width match to 1% only if large."""
  if not name.startswith("toy"):
    return importlib.import_module(f"configs.{name}").get_config()
  patterns = {
    "toy_first_dense": dict(first_dense=1),
    "toy_every": dict(first_dense=2, every=2, shared_experts=1),
    "toy_noisy": dict(router=Router.NOISY_TOPK),
  }
  return toy_config(
    {"model.dim": 24, "model.num_layers": 4}, num_experts=6, expert_dim=90, **patterns[name]
  )


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize(
  "name",
  ["tiny_moe", "switch_small", "tiny_deepseek", "toy_first_dense", "toy_every", "toy_noisy"],
)
def test_dense_twin_by_hand(name, by):
  """In units of width, 3D weights each: an expert has F, the router E/3, a dense layer ffn_dim.

  The counts differ only there, so the twin's width is the mean over the layers.
  """
  config = reference(name)
  model, layer = config.model, config.model.moe
  experts = layer.num_experts if by == "total_params" else layer.top_k
  routers = 2 if layer.router is Router.NOISY_TOPK else 1
  moe_width = (experts + layer.shared_experts) * layer.expert_dim + routers * layer.num_experts / 3
  num_moe = (model.num_layers - layer.first_dense) // layer.every
  whole = num_moe * moe_width + (model.num_layers - num_moe) * model.ffn_dim
  twin, note = match("dense", by=by).solve(config)
  assert twin.model.ffn_dim == round(whole / model.num_layers)
  counts = [getattr(cost.count(c), BY[by]) for c in (twin, config)]
  assert counts[0] == pytest.approx(counts[1], rel=0.01)
  assert f"model.ffn_dim={twin.model.ffn_dim}, {counts[0]:,.0f}" in note
  assert f"against {counts[1]:,.0f}" in note
  assert ("one ffn_dim for all" in note) == (num_moe < model.num_layers)


def test_counts_by_hand():
  """One case in full, so that the twin's counts do not rest on cost.count alone."""
  config = reference("tiny_moe")  # V 264, D 128, 4 layers, 2 heads on 1 of 64, own head, qk norms
  twin = match("dense", by="flops_per_token")(config)
  attention = 128 * 128 + 2 * 128 * 64 + 128 * 128
  per_layer = attention + 3 * 128 * 387  # K*F + E/3 = 2*192 + 8/3 = 386.7
  matmul = 4 * per_layer + 264 * 128
  assert twin.model.ffn_dim == 387
  assert cost.count(twin).total == matmul + 264 * 128 + 4 * (2 * 128 + 2 * 64) + 128
  # Forward and backward: 6 per weight; and attention over 64.5 keys on average of 128.
  assert cost.count(twin).flops_per_token == 6 * matmul + 3 * 4 * 4 * 128 * 64.5


@pytest.mark.parametrize("name", ["tiny_deepseek", "switch_small", "toy_every"])
def test_the_twin_differs_only_where_it_must(name):
  config = override(reference(name), {"loss.z": 1e-4})
  twin = match("dense", by="active_params")(config)
  before, after = flatten(config), flatten(twin)
  changed = {n for n in before if before[n] != after[n] and not n.startswith("model.moe.")}
  assert changed <= {"model.ffn_dim", "loss.load_balance", "loss.router_z"}
  assert twin.model.moe == MoE() and not twin.model.moe.num_experts
  assert twin.loss == Loss(load_balance=0.0, router_z=0.0, z=1e-4)
  assert config == reference(name) or config.loss.z  # the reference is not changed in place
  assert config.model.moe.num_experts


@pytest.mark.slow
def test_initial_scales_agree():
  """Of the twin's feed-forward and of one expert: their standard deviations times sqrt(fan-in)."""
  config = toy_config({"model.dim": 48}, num_experts=2, top_k=1, renormalize=False, expert_dim=64)
  twin = match("dense", by="active_params")(config)
  assert abs(twin.model.ffn_dim - 64) <= 1

  def scales(weights):
    return {name: np.asarray(w).std() * np.sqrt(w.shape[-2]) for name, w in weights.items()}

  def rngs():
    return nnx.Rngs(jax.random.key(3))

  dense = feedforward.DenseFFN(twin.model, twin.model.ffn_dim, rngs())
  experts = layer.MoELayer(config.model, rngs())
  ours = scales({"gate": dense.gate_DF[...], "up": dense.up_DF[...], "down": dense.down_FD[...]})
  theirs = scales(
    {"gate": experts.gate_EDF[0], "up": experts.up_EDF[0], "down": experts.down_EFD[0]}
  )
  for name in ours:  # 3072 weights: a standard error of 1.3%
    assert ours[name] == pytest.approx(theirs[name], rel=0.05), name
  assert theirs["down"] == pytest.approx(theirs["up"] / 2, rel=0.05)  # 1/sqrt(2 * 2 layers)


@pytest.mark.parametrize("by", BY)
def test_finer_experts_by_hand(by):
  config = reference("tiny_moe")  # 8 experts of 192, top-2
  twin, note = match("moe", by=by, num_experts=16, top_k=4, shared_experts=1).solve(config)
  used, before = (17, 8) if by == "total_params" else (5, 2)
  assert twin.model.moe.expert_dim == round((before * 192 + (8 - 16) / 3) / used)
  assert twin.model.moe.num_experts == 16 and twin.model.moe.shared_experts == 1
  assert "moe twin by" in note
  rest = override(twin, {f"model.moe.{n}": v for n, v in flatten(config.model.moe).items()}, "")
  assert rest == config


def test_widths_that_devices_like():
  config = reference("switch_small")
  assert match("dense", by="flops_per_token", multiple_of=64)(config).model.ffn_dim == 1536
  config = override(config, {"mesh.tensor": 8})
  assert match("dense", by="flops_per_token")(config).model.ffn_dim == 1544  # of 1546.67


@pytest.mark.parametrize(("twin", "of", "why"), [
  (dict(kind="dense", by="flops_per_token", multiple_of=512), "tiny_moe",
   r"within 1%; the nearest, config.model.ffn_dim=512, has"),
  (dict(kind="dense", by="total_params"), "tiny_dense", r"is dense already"),
  (dict(kind="moe", by="total_params"), "tiny_dense", r"give the number of experts"),
  (dict(kind="moe", by="total_params", num_expert=4), "tiny_moe",
   r"num_expert; the nearest is config.model.moe.num_experts"),
  (dict(kind="moe", by="active_params", top_k=9), "tiny_moe", r"top_k=9.*num_experts=8"),
])  # fmt: skip
def test_a_config_that_has_no_such_twin_is_refused(twin, of, why):
  with pytest.raises(UserError, match=why):
    match(**twin)(reference(of))


@pytest.mark.parametrize(("wrong", "why"), [
  (dict(kind="sparse", by="total_params"), "not one of: dense, moe"),
  (dict(kind="dense", by="params"), "active_params, flops_per_token, total_params$"),
  (dict(kind="dense", by="total_params", top_k=1), "drop top_k"),
  (dict(kind="moe", by="total_params", expert_dim=1), "expert_dim is the width that is solved"),
  (dict(kind="dense", by="total_params", multiple_of=0), "at least 1"),
])  # fmt: skip
def test_a_wrong_match_is_refused(wrong, why):
  with pytest.raises(UserError, match=why):
    match(**wrong)
