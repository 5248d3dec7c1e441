"""MoE models made of dense ones: the same function, the methods that change it, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import sharding
from moe_jax.config import Dispatch, MoE, Router, Score, override
from moe_jax.errors import UserError
from moe_jax.model import pattern, transformer
from moe_jax.moe.routing import Tokens
from moe_jax.training import setup as setup_lib
from moe_jax.training import upcycle
from moe_jax.training.step import compile_step
from tests.support.real_runs import RUNS, real_runs
from tests.support.scripts import call, python, refused
from tests.support.toys import (
  build,
  mesh_of,
  slow_unless,
  toy_batch,
  toy_config,
  with_options,
)

FFN = 36  # of the dense toy


def dense_config():
  return toy_config({"model.ffn_dim": FFN}, num_experts=0)


def moe_config(**fields):
  fields = dict(num_experts=4, top_k=2, expert_dim=FFN, dispatch=Dispatch.GROUPED) | fields
  return override(dense_config(), {"model.moe": MoE(**fields)})


def made(config, method="copy", amount=0.0, dense=None, axes=None):
  """(dense parameters, parameters with experts)."""
  dense = dense or dense_config()
  _, params = build(dense)
  mesh = mesh_of(**(axes or {}))
  with jax.set_mesh(mesh):
    where = sharding.param_shardings(transformer.abstract_params(config.model), mesh)
    key = jax.random.key(1)
    new = jax.jit(
      lambda p: upcycle.upcycle(p, dense.model, config.model, method, amount, key),
      out_shardings=where,
    )(params)
  return params, new


def logits(model, params, batch, axes=None):
  mesh = mesh_of(**(axes or {}))
  with jax.set_mesh(mesh):
    tokens = Tokens.of_batch(sharding.place(batch, mesh))
    bias_ZE, key = jnp.zeros(pattern.bias_shape(model)), jax.random.key(0)

    @jax.jit
    def forward(params):
      out = transformer.forward(model, params, bias_ZE, tokens, key, train=False)
      return out.logits_BLV

    return np.asarray(forward(params))[batch.segments_BL > 0]  # experts compute no padding


SAME = {
  "copies": (dict(), {}),
  "gather": (dict(dispatch=Dispatch.GATHER, eval_capacity_factor=4.0), {}),
  "dense dispatch": (dict(dispatch=Dispatch.DENSE), {}),
  "three of five": (dict(num_experts=5, top_k=3), {}),
  "halves": (dict(num_experts=8, top_k=4, expert_dim=FFN // 2), {}),
  "thirds, one copy": (dict(num_experts=3, top_k=3, expert_dim=FFN // 3), {}),
  "scaled gates": (dict(num_experts=6, top_k=3, expert_dim=FFN // 3, gate_scale=2.5), {}),
  "sigmoid": (dict(score=Score.SIGMOID), {}),
  "every second layer": (dict(every=2), {}),
  "halves on a mesh": (dict(num_experts=8, top_k=4, expert_dim=FFN // 2), dict(expert=4)),
  "a mesh of all axes": (dict(), dict(expert=2, fsdp=2, tensor=2)),
}


@pytest.mark.parametrize("name", slow_unless(["halves on a mesh"], SAME))
def test_it_begins_as_the_dense_model(name):
  fields, axes = SAME[name]
  config = moe_config(**fields)
  assert upcycle.is_exact(config.model, "copy")
  params, new = made(config, axes=axes)
  batch = toy_batch(config)
  want = logits(dense_config().model, params, batch)
  got = logits(config.model, new, batch, axes)
  np.testing.assert_allclose(got, want, rtol=0, atol=3e-6 * np.abs(want).max())


@pytest.mark.slow
def test_every_option_of_the_attention_comes_along():
  dense, config = (
    override(c, {"model": with_options(c.model), "model.moe": c.model.moe})
    for c in (dense_config(), moe_config())
  )
  params, new = made(config, dense=dense)
  batch = toy_batch(config)
  np.testing.assert_allclose(
    logits(config.model, new, batch), logits(dense.model, params, batch), rtol=0, atol=1e-5
  )


@pytest.mark.parametrize(("method", "amount"), [("noise", 0.1), ("drop", 0.5)])
def test_the_other_methods_change_the_experts(method, amount):
  config = moe_config()
  assert not upcycle.is_exact(config.model, method)
  params, new = made(config, method, amount)
  dense = {sharding.path_of(p): x for p, x in jax.tree_util.tree_leaves_with_path(params)}
  moe = {sharding.path_of(p): x for p, x in jax.tree_util.tree_leaves_with_path(new)}
  where = ("scans", "0", "blocks", "0", "ffn")
  kept = []
  for name, old, axis in (
    ("gate_EDF", "gate_DF", 2),
    ("up_EDF", "up_DF", 2),
    ("down_EFD", "down_FD", 1),
  ):
    got, want = np.asarray(moe[*where, name][0]), np.asarray(dense[*where, old][0])
    assert not np.array_equal(got[0], got[1])
    assert np.std(got) == pytest.approx(np.std(want), rel=0.2)
    if method == "drop":
      same = (got == want).all(axis=3 - axis)
      assert same.sum() == 4 * FFN // 2  # half of the units of each expert
      kept.append(same)
    else:
      assert np.std(got - want) == pytest.approx(0.1 * np.std(want), rel=0.1)
  if method == "drop":  # the same units of all three matrices, other ones in each expert
    np.testing.assert_array_equal(kept[0], kept[1])
    np.testing.assert_array_equal(kept[0], kept[2])
    assert not np.array_equal(kept[0][0], kept[0][1])


@pytest.mark.slow
def test_it_trains():
  """The loss falls from that of the dense model, and the copies part."""
  config = moe_config()
  _, new = made(config)
  mesh = mesh_of()
  with jax.set_mesh(mesh):
    setup = setup_lib.make(config, mesh)
    state = setup.init()._replace(params=new)
    step = compile_step(setup)
    batch = sharding.to_global(toy_batch(config), mesh)
    losses = []
    for _ in range(8):
      state, metrics = step(state, batch)
      losses.append(float(metrics["loss"]))
  assert losses[-1] < losses[0] - 0.1
  experts = next(
    np.asarray(x[0])
    for p, x in jax.tree_util.tree_leaves_with_path(state.params)
    if "up_EDF" in jax.tree_util.keystr(p)
  )
  assert not np.array_equal(experts[0], experts[1])


REFUSED = {
  "no experts": ({"model.moe": MoE()}, "num_experts=0"),
  "shared": ({"model.moe.shared_experts": 1}, "shared_experts=1"),
  "another width": ({"model.num_layers": 4}, "config.model.num_layers=4"),
  "no divisor": ({"model.moe.expert_dim": 10}, "expert_dim=10 does not divide"),
  "another scale": ({"model.attention_scale": 0.5}, "attention_scale=0.5"),
  "parts by chance": (
    {"model.moe.expert_dim": FFN // 2, "model.moe.router": Router.RANDOM},
    "router=random does not choose by score",
  ),
  "a copy cut by groups": (
    {
      "model.moe.expert_dim": FFN // 2,
      "model.moe.num_experts": 6,
      "model.moe.expert_groups": 2,
    },
    "a token that has one of its groups",
  ),
  "too few": ({"model.moe.expert_dim": FFN // 4}, "top_k=2 is not a multiple"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(name):
  fields, said = REFUSED[name]
  with pytest.raises(UserError, match=said):
    upcycle.check_upcycling(dense_config().model, override(moe_config(), fields).model)


def test_a_run_that_has_experts_is_refused():
  with pytest.raises(UserError, match="name a dense run"):
    upcycle.check_upcycling(moe_config().model, moe_config().model)


def test_gates_that_do_not_sum_to_one_are_no_copy():
  assert not upcycle.is_exact(moe_config(renormalize=False).model, "copy")
  assert not upcycle.is_exact(moe_config(top_k=1).model, "copy")


@pytest.mark.slow
def test_by_command_and_then_trained(shared_folder, tmp_path):
  """The MoE twin of a dense run, and a step of training from there."""
  dense = real_runs(shared_folder) / RUNS["dense"]
  moe = [
    "--config=configs/debug.py", "--config.data.batch_size=8", "--config.train.steps=1",
    "--config.optimizer.warmup_steps=0", "--config.eval.batches=1",
    "--config.eval.final_batches=1", "--config.model.ffn_dim=32",
    "--config.model.moe.expert_dim=16", "--config.model.moe.dispatch=grouped",
  ]  # fmt: skip
  up = f"--workdir={tmp_path / 'up'}"
  done = python("-m", "moe_jax.training.upcycle", f"--from={dense}", *moe, up)
  assert not done.returncode, done.stderr
  assert "one of 2 parts" in done.stdout and "what that run does, to rounding" in done.stdout
  new = f"--workdir={tmp_path / 'moe'}"
  began = call("train.py", *moe, f"--init_from={tmp_path / 'up'}", new)
  assert not began.returncode and "begins with" in began.stdout, began
  # The same config on the folder of weights: it must not begin with random ones.
  before = sorted(p.name for p in (tmp_path / "up").iterdir())
  for more in ((), ("--resume_step=0",)):
    said = refused("train.py", *moe, up, *more)
    assert "imported or upcycled" in said
  assert sorted(p.name for p in (tmp_path / "up").iterdir()) == before
