"""Experts change places when a checkpoint is read, and the run goes on as it would have."""

import re
import shutil

import jax
import numpy as np
import pytest

from moe_jax.analysis import evaluation
from moe_jax.config import Data, Mesh, OptimizerName, Router, Schedule, Train, override
from moe_jax.errors import UserError
from moe_jax.storage import workdir as workdir_lib
from moe_jax.training import optimizers, placement
from moe_jax.training import run as run_lib
from moe_jax.training import setup as setup_lib
from tests.support.toys import set_up, toy_batch, toy_config

AXES = dict(expert=4, data=2)


def test_greedy_by_hand():
  load_E = np.array([0.3, 0.25, 0.2, 0.1, 0.06, 0.04, 0.03, 0.02])
  order_E = placement.balanced(load_E, 2)
  assert order_E.tolist() == [0, 3, 4, 6, 1, 2, 5, 7]  # 0.49 and 0.51, where it was 0.85 and 0.15
  assert placement.balanced(order_E * 0 + 0.125, 4).tolist() == list(range(8))
  # What is no better stays.
  assert placement.balanced(np.array([0.3, 0.2, 0.2, 0.3]), 2).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("name", list(OptimizerName))
def test_a_permuted_state_takes_the_same_steps(name, monkeypatch):
  """With moments, of Adafactor rows and columns, and the bias; each layer in its own order."""
  monkeypatch.setattr(optimizers, "_FACTORED", 8)
  fields = {"optimizer.name": name, "optimizer.clip_norm": 1.0, "loss.load_balance": 0.0}
  config = toy_config(
    fields | {"model.num_layers": 4},
    num_experts=8,
    every=2,
    bias_update_rate=0.05,
    expert_bias=True,
    router_bias=True,
    capacity_factor=4.0,
  )
  config = override(config, {"mesh": Mesh(data=2, expert=4)})
  mesh, state, step = set_up(config, AXES)
  batch = toy_batch(config)
  with jax.set_mesh(mesh):
    setup = setup_lib.make(config, mesh)
    state, _ = step(state, batch)
    state = jax.device_get(state)
    assert np.abs(state.bias_ZE).max() > 0
    order_ZE = np.stack([np.random.default_rng(z).permutation(8) for z in range(2)])

    def shapes(c):
      return setup_lib.make(c, mesh).shapes

    def on_mesh():
      return jax.device_put(state, setup.shardings)

    moved = placement.permuted(on_mesh(), order_ZE, config, shapes)
    assert jax.tree.map(lambda x: x.sharding, moved) == setup.shardings
    want, expected = step(on_mesh(), batch)
    got, values = step(moved, batch)
    back = placement.permuted(got, np.argsort(order_ZE, axis=1), config, shapes)
  np.testing.assert_allclose(values["loss"], expected["loss"], rtol=1e-6)
  loads = np.asarray(values["load_ZE"])
  np.testing.assert_array_equal(loads, np.take_along_axis(expected["load_ZE"], order_ZE, 1))
  assert not np.array_equal(loads, expected["load_ZE"])

  def close(path, a, b):
    scale = np.abs(b).max() if np.size(b) else 0.0
    tolerance = dict(rtol=1e-3, atol=1e-4 * scale + 1e-7)  # of float32 sums in another order
    np.testing.assert_allclose(a, b, **tolerance, err_msg=jax.tree_util.keystr(path))

  jax.tree_util.tree_map_with_path(close, jax.device_get(back), jax.device_get(want))


def config_of(text, steps, **moe):
  config = toy_config({"model.vocab_size": 264}, num_experts=8, **moe)
  fields = {
    "loss.load_balance": 0.0,
    "data": Data(name="text", path=str(text), seq_len=16, batch_size=8),
    "train": Train(steps=steps, eval_every=2, checkpoint_every=2, keep_latest=4, log_every=1),
    "mesh": Mesh(data=2, expert=4),
    "eval.batches": 1,
    "health.window": 2,
    "optimizer.learning_rate": 0.005,
    "optimizer.schedule": Schedule.CONSTANT,
  }
  return override(config, fields)


def train(workdir, config, **options):
  run_lib.run(setup_lib.prepare(config), str(workdir), **options)
  return [x for x in workdir_lib.read_lines(workdir / workdir_lib.METRICS) if "train/loss" in x]


@pytest.fixture(scope="module")
def four_steps(text, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("four") / "run"
  train(workdir, config_of(text, 4))
  return workdir


def test_a_run_goes_on_with_experts_in_other_places(four_steps, text, tmp_path, capsys):
  """Resumed twice, then evaluated: as without, by the experts' own numbers."""
  for name in "ab":
    shutil.copytree(four_steps, tmp_path / name)
  want = train(tmp_path / "a", config_of(text, 8))
  train(tmp_path / "b", config_of(text, 6), place_experts=True)
  said = capsys.readouterr().out
  assert "placement          of a layer's rows the busiest device has" in said
  after, before = map(float, re.search(r"should take (\S+) times .* was (\S+)\n", said).groups())
  assert 1 <= after <= before
  got = train(tmp_path / "b", config_of(text, 8), place_experts=True)
  placed = workdir_lib.read_object(tmp_path / "b" / workdir_lib.PLACEMENT)["placements"]
  assert [p["step"] for p in placed] == [4, 6]
  assert placed[0]["place_ZE"] != [list(range(8))] * 2
  assert_same_run(got, want)
  before, after = (np.mean(x[4]["train/device_overload_Z"]) for x in (want, got))
  assert after < before
  a, b = (evaluation.evaluate_run(str(tmp_path / name), 0, "validation")[0] for name in ("a", "b"))
  np.testing.assert_allclose(b["loss"], a["loss"], rtol=1e-5)
  np.testing.assert_allclose(b["load_ZE"], a["load_ZE"], atol=0.02)


def assert_same_run(got, want):
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a["train/loss"], b["train/loss"], rtol=1e-5)
    # A sum over the experts in another order may turn a near tie.
    np.testing.assert_allclose(a["train/load_ZE"], b["train/load_ZE"], atol=0.02)


@pytest.mark.slow
def test_a_new_run_takes_the_loads_of_its_source(four_steps, text, tmp_path):
  options = dict(init_from_flag=str(four_steps), init_optimizer=True)
  want, got = (
    train(tmp_path / str(placed), config_of(text, 2), **options, place_experts=placed)
    for placed in (False, True)
  )
  assert_same_run(got, want)
  before, after = (np.mean(x[0]["train/device_overload_Z"]) for x in (want, got))
  assert after < before


def test_what_cannot_be_placed_is_refused(text, tmp_path):
  config = config_of(text, 2)
  with pytest.raises(UserError, match="no loads are measured yet"):
    train(tmp_path / "a", config, place_experts=True)
  for fields, named in (
    ({"mesh": Mesh(data=8)}, "mesh.expert=1"),
    ({"model.moe.router": Router.NOISY_TOPK}, "router=noisy_topk"),
    ({"model.moe.expert_groups": 2}, "expert_groups=2"),
  ):
    with pytest.raises(UserError, match=named):
      placement.check(override(config, fields))
