"""A training step: golden numbers, every mesh, the balancing bias, what the devices exchange."""

import importlib
import re

import jax
import numpy as np
import pytest

from moe_jax import config as config_lib
from moe_jax import sharding
from tests.support.toys import (
  ROOT,
  biased_config,
  gradients,
  set_up,
  slow_unless,
  toy_batch,
  toy_config,
)

CONFIGS = sorted(p.stem for p in (ROOT / "configs").glob("*.py"))
MESHES = {
  "data8": dict(data=8),
  "expert4-data2": dict(expert=4, data=2),
  "expert2-fsdp2-tensor2": dict(expert=2, fsdp=2, tensor=2),
  "fsdp2-expert4": dict(fsdp=2, expert=4),
  "tensor2-data2": dict(tensor=2, data=2),
}


def take_step(config, axes):
  """Gradients, metrics and the state after two steps, on the host."""
  mesh, state, step = set_up(config, axes)
  batch = toy_batch(config)
  with jax.set_mesh(mesh):
    batch = sharding.to_global(batch, mesh)
    grads = jax.jit(lambda s, b: gradients(s, b, config))(state, batch)
    grads = jax.device_get(grads)
    state, first = step(state, batch)
    state, second = step(state, batch)
    assert step._cache_size() == 1
    return grads, jax.device_get(first), jax.device_get(second), jax.device_get(state)


def compare(got, want, atol):
  def one(path, a, b):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=atol, err_msg=jax.tree_util.keystr(path))

  jax.tree_util.tree_map_with_path(one, got, want)


def weighty(config):
  """Balance and z-losses heavy enough that an error in them shows."""
  config.loss = config_lib.Loss(load_balance=1.0, router_z=0.1, z=0.1)
  return config


@pytest.fixture(scope="module")
def one_device_result():
  return take_step(weighty(toy_config(capacity_factor=0.8)), {})


@pytest.mark.preflight
@pytest.mark.parametrize("mesh", slow_unless(["expert2-fsdp2-tensor2"], MESHES))
def test_every_mesh_takes_the_same_step(mesh, one_device_result):
  want = one_device_result
  assert 0.05 < want[1]["drop_fraction_Z"].mean() < 0.6 and want[1]["max_vio_Z"].min() > 0.3
  got = take_step(weighty(toy_config(capacity_factor=0.8)), MESHES[mesh])
  compare(got[0], want[0], atol=1e-6)  # float32 rounding of gradients of order 0.01 to 1
  for name in ("load_ZE", "drop_fraction_Z"):  # of equal counts; XLA may divide by a reciprocal
    np.testing.assert_allclose(got[1][name], want[1][name], rtol=3e-7, atol=1e-7)
  compare(got[1], want[1], atol=1e-6)
  compare(got[2], want[2], atol=1e-4)
  # Adam divides by the gradient's own size, so rounding of a tiny one is a part of a full step.
  compare(got[3].params, want[3].params, atol=0.05 * 0.01)


@pytest.mark.preflight
@pytest.mark.parametrize("mesh", slow_unless(["one"], ["one", "expert4"]))
def test_accumulation_is_the_full_batch(mesh):
  """Loss, balance, drops and gradients of 2 microbatches are those of the batch at once."""
  axes = {} if mesh == "one" else dict(expert=4)
  results = []
  for accumulation in (1, 2):
    config = weighty(toy_config(capacity_factor=0.8))
    config.train.accumulation = accumulation
    results.append(take_step(config, axes))
  compare(results[1][0], results[0][0], atol=1e-6)
  compare(results[1][1], results[0][1], atol=1e-6)


def compiled_text(remat, axes):
  config = toy_config()
  config.model.remat = remat
  mesh, state, step = set_up(config, axes)
  with jax.set_mesh(mesh):
    batch = sharding.to_global(toy_batch(config), mesh)
    return step.lower(state, batch).compile().as_text()


@pytest.mark.parametrize(
  ("remat", "count"),
  [(config_lib.Remat.NONE, 4), pytest.param(config_lib.Remat.FULL, 6, marks=pytest.mark.slow)],
)
def test_all_to_alls_in_the_compiled_step(remat, count):
  """2 forward and 2 backward, 2 more under full remat (the scanned body stands for each layer)."""
  text = compiled_text(remat, dict(expert=4, data=2))
  assert len(re.findall(r" all-to-all(?:-start)?\(", text)) == count
  # Experts stay where they are: nothing gathers a tensor of all E experts' weights.
  E, D, F = 4, 10, 18
  gathered = re.findall(r"= \S*?\[([\d,]+)\]\S* all-gather(?:-start)?\(", text)
  for shape in gathered:
    sizes = sorted(int(n) for n in shape.split(",") if n != "1")
    assert not {E, D, F} <= set(sizes), f"all-gather of expert weights: [{shape}]"


@pytest.mark.slow
def test_fsdp_gathers_but_not_over_expert():
  """With an fsdp axis the experts' D is gathered, E is not: 1 of 4 experts on each device."""
  text = compiled_text(config_lib.Remat.NONE, dict(expert=4, fsdp=2))
  gathered = re.findall(r"= \S*?\[([\d,]+)\]\S* all-gather(?:-start)?\(", text)
  sizes = [sorted(int(n) for n in shape.split(",") if n != "1") for shape in gathered]
  assert [10, 18] in sizes, "expected all-gathers of one expert's D x F"
  assert not any({4, 10, 18} <= set(size) for size in sizes)


def shrink(config):
  """The same structure in a few thousand parameters: pattern, routing, precision and remat stay."""
  model, moe = config.model, config.model.moe
  model.num_kv_heads, model.num_heads = 2, 2 * model.num_heads // model.num_kv_heads
  model.dim, model.head_dim, model.ffn_dim, model.vocab_size = 16, 4, 8, 264
  model.num_layers = moe.first_dense + 2 * moe.every
  moe.expert_dim, moe.group_size = 8, min(moe.group_size, 16)
  config.data.seq_len, config.data.batch_size = 16, 8
  return config


@pytest.mark.parametrize("name", slow_unless(["mixtral_8x7b"], CONFIGS))
def test_every_config_takes_a_step_at_toy_size(name):
  config = shrink(importlib.import_module(f"configs.{name}").get_config())
  axes = dict(expert=4, data=2) if config.model.moe.num_experts else dict(data=8)
  mesh, state, step = set_up(config, axes)
  with jax.set_mesh(mesh):
    _, metrics = step(state, sharding.to_global(toy_batch(config), mesh))
  # A uniform guess, plus half the variance (1 at most) of a new model's logits.
  assert abs(float(metrics["loss"]) - np.log(264)) < 0.8
  assert float(metrics["grad_norm"]) > 1e-3
  assert ("load_ZE" in metrics) == bool(config.model.moe.num_experts)


@pytest.mark.parametrize(
  ("axes", "accumulation", "remat"),
  [
    pytest.param({}, 1, "full", marks=pytest.mark.slow),
    (dict(expert=4, data=2), 1, "none"),
    pytest.param(dict(fsdp=2, tensor=2), 1, "none", marks=pytest.mark.slow),
    pytest.param({}, 4, "none", marks=pytest.mark.slow),
  ],
)
@pytest.mark.preflight
def test_bias_is_one_update_of_the_whole_batch(axes, accumulation, remat):
  """From the loads of all devices and microbatches, once, also under rematerialisation."""
  config = biased_config()
  config.train.accumulation = accumulation
  config.model.remat = config_lib.Remat(remat)
  mesh, state, step = set_up(config, axes)
  batch = toy_batch(config)
  with jax.set_mesh(mesh):
    state, metrics = step(state, sharding.to_global(batch, mesh))
  load_ZE = np.asarray(metrics["load_ZE"])
  sign_ZE = np.sign(np.round(0.25 - load_ZE, 7))
  want = 0.05 * (sign_ZE - sign_ZE.mean(axis=1, keepdims=True))
  np.testing.assert_allclose(state.bias_ZE, want, atol=1e-7)
  assert np.abs(want).max() > 0.01


@pytest.mark.slow
def test_bias_balances_the_load():
  """Loss-free balancing does what it is for: MaxVio falls without any auxiliary loss."""
  config = biased_config(rate=0.005)
  config.optimizer.learning_rate = 1e-6
  mesh, state, step = set_up(config, {})
  history = []
  with jax.set_mesh(mesh):
    batch = sharding.to_global(toy_batch(config), mesh)
    for _ in range(60):
      state, metrics = step(state, batch)
      history.append(float(metrics["max_vio_Z"].mean()))
  assert history[0] > 0.3 and np.mean(history[-5:]) < 0.5 * history[0]


GOLDEN = {
  "loss": 3.1745267,
  "total_loss": 3.1940303,
  "load_balance": 1.1408308,
  "router_z": 8.0953712,
  "z": 10.1013975,
  "grad_norm": 1.1406245,
  "param_norm": 21.9083958,
  "drop_fraction_Z": 0.0819672,
  "max_vio_Z": 0.4426229,
  "router_entropy_Z": 0.8607019,
}


def test_golden_first_step():
  """The numbers of one step of the toy config.

  If this fails and you meant to change the numbers (an init, a loss, a default), print the new
  ones, put them here, and say why in the commit. If you did not mean to, you have found a bug.
  """
  config = toy_config()
  mesh, state, step = set_up(config, {})
  with jax.set_mesh(mesh):
    _, metrics = step(state, toy_batch(config))
  got = {name: float(np.mean(metrics[name])) for name in GOLDEN}
  # float32 rounding; one token that takes another expert would show as 8e-3 in the drops
  np.testing.assert_allclose(list(got.values()), list(GOLDEN.values()), rtol=1e-4, err_msg=str(got))
