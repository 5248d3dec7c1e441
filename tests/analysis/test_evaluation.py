"""eval.py's options: other capacities, what is refused, and all that it writes of a trained run."""

import functools
import json
import math
from typing import NamedTuple

import jax
import numpy as np
import pytest

from moe_jax import sharding
from moe_jax.analysis import evaluation
from moe_jax.config import Dispatch, Exchange, Mesh, Router, override
from moe_jax.errors import UserError
from moe_jax.moe import dispatch, validation
from moe_jax.training import evaluator
from tests.support.scripts import built, evaluate, python, refused
from tests.support.toy_text import toy_rows, weights
from tests.support.toys import toy_config


def test_a_dropless_run_is_gathered_for_a_capacity_alone():
  own = toy_config(dispatch=Dispatch.GROUPED, exchange=Exchange.ALL_TO_ALL, exchange_factor=2.0)
  moe = validation.at_capacity(own, 1.5).model.moe
  assert (moe.dispatch, moe.eval_capacity_factor) == (Dispatch.GATHER, 1.5)
  assert own.model.moe.dispatch is Dispatch.GROUPED  # the run's own config stays
  assert validation.at_capacity(own, math.inf).model.moe.dispatch is Dispatch.GROUPED
  assert dispatch.with_slots(own.model.moe).eval_capacity_factor == math.inf
  moe = validation.at_capacity(toy_config(dispatch=Dispatch.EINSUM), 0.5).model.moe
  assert (moe.dispatch, moe.eval_capacity_factor) == (Dispatch.EINSUM, 0.5)


@pytest.mark.parametrize(
  ("factors", "routing", "flag"), [([1.0], False, "--capacity_factors"), ([], True, "--routing")]
)
def test_options_about_experts_are_refused_for_a_dense_run(factors, routing, flag):
  dense = toy_config(num_experts=0)
  evaluation.check_options(dense, [], False)
  with pytest.raises(UserError, match=f"{flag}: config.model.moe.num_experts=0"):
    evaluation.check_options(dense, factors, routing)


def test_expert_choice_needs_a_capacity_and_none_is_zero():
  config = toy_config({"loss.load_balance": 0.0}, router=Router.EXPERT_CHOICE, renormalize=False)
  evaluation.check_options(config, [0.5, 2.0], True)
  with pytest.raises(UserError, match="set a finite number"):
    evaluation.check_options(config, [math.inf], True)
  with pytest.raises(UserError, match="must be above 0; inf is no limit"):
    evaluation.check_options(toy_config(), [0.0], True)


def test_a_batch_of_training_need_not_split_over_the_devices_here():
  """Microbatches of two rows, evaluated in batches of eight on eight devices."""
  config = toy_config({"train.accumulation": 4, "eval.batch_size": 8})
  config = override(config, {"mesh": evaluation.mesh_here(config)})
  assert config.mesh.data == 8
  assert validation.at_capacity(config, 1.5).mesh.data == 8


@pytest.mark.slow
def test_no_device_evaluates_a_part_of_a_routing_group():
  """Groups of two rows in batches of eight: four devices, and the numbers of one."""
  config = toy_config(group_size=18, eval_capacity_factor=0.8)
  mesh = evaluation.mesh_here(config)
  assert mesh.data == 4
  rows, totals = toy_rows([30, 3, 17, 25, 40, 9, 28], [0, 1, 0, 1, 0, 1, 1]), []
  assert len(rows) % 8  # so that padding fills the last batch
  for some in (Mesh(data=1), mesh):
    devices = sharding.make_mesh(some)
    with jax.set_mesh(devices):
      total = evaluator.Evaluator(config, rows, devices, 0).total(weights(), np.zeros((2, 4)))
    totals.append(total.sums)
  one, four = totals
  assert 0.05 < 1 - one.moe.kept_E.sum() / one.moe.routed_E.sum() < 0.6
  np.testing.assert_array_equal(four.moe.kept_E, one.moe.kept_E)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), four, one)  # rounding


def test_a_mesh_for_any_group():
  for rows in (1, 2, 8):
    assert evaluation.mesh_here(toy_config(group_size=9 * rows)).data == 8 // rows
  # A dense model has no routing groups.
  assert evaluation.mesh_here(toy_config(num_experts=0, group_size=18)).data == 8


# All that eval.py writes of a run with domains.


class Examined(NamedTuple):
  output: str
  result: dict  # eval.json
  routing: dict  # routing.json


@pytest.fixture(scope="module")
def examined(shared_folder):
  """A run of 60 steps on code, prose and bytecode, and eval.py with every option."""

  def build(path):
    trained = python(
      "train.py",
      f"--workdir={path / 'run'}",
      "--config=configs/debug.py",
      "--config.data.name=python_domains",
      "--config.train.keep_latest=3",
      "--config.train.steps=60",
      "--config.train.checkpoint_every=20",
      "--config.train.eval_every=60",
      "--config.eval.final_batches=40",
    )
    assert trained.returncode == 0, trained.stderr
    output, _ = evaluate(path / "run", "--routing", "--causal", "--capacity_factors=0.5,1,2,inf")
    return {"output": output}

  path, said = built(shared_folder / "examined", build)
  files = (json.loads((path / "run" / n).read_text()) for n in ("eval.json", "routing.json"))
  return Examined(said["output"], *files)


@pytest.mark.slow
def test_the_output_names_what_was_measured(examined):
  for words in ("causal loss", "capacity factor 0.5", "repeats first", "domains apart", "bytecode"):
    assert words in examined.output
  causal = examined.result["causal"]  # whose routing is causal
  assert causal["gap"] == 0.0 and causal["tokens"] == 16 * 64
  assert examined.result["flops_per_token"] > 6 * 10_000


@pytest.mark.slow
def test_the_domains_hold_every_token_and_the_loss_is_their_mean(examined):
  result, domains = examined.result, examined.result["domains"]
  assert list(domains) == ["code", "prose", "bytecode"]  # in the order of the data
  assert sum(d["tokens"] for d in domains.values()) == result["tokens"] == 40 * 8 * 64
  weighted = sum(d["loss"] * d["tokens"] for d in domains.values())
  assert weighted / result["tokens"] == pytest.approx(result["loss"], rel=1e-5)


@pytest.mark.slow
def test_a_larger_capacity_drops_less_and_that_of_the_run_has_its_loss(examined):
  points = {point["capacity_factor"]: point for point in examined.result["capacity"]}
  drops = [np.mean(points[factor]["drop_fraction_Z"]) for factor in (0.5, 1, 2, "inf")]
  assert drops[0] > drops[1] > drops[2] and drops[3] == 0
  assert points[2]["loss"] == examined.result["loss"]


@pytest.mark.slow
def test_the_routing_of_the_last_step_is_compared_with_those_before(examined):
  routing = examined.routing
  assert routing["step"] == 60 and [p["step"] for p in routing["saturation"]] == [20, 40]
  assert routing["domains"] == ["code", "prose", "bytecode"] and routing["layers"] == [0, 1]
  for name, shape in {
    "domain_load_ZGE": (2, 3, 4),
    "position_load_ZPE": (2, 8, 4),
    "class_load_ZCE": (2, 6, 4),
    "coactivation_ZEE": (2, 4, 4),
  }.items():
    assert np.shape(routing[name]) == shape
  np.testing.assert_allclose(np.sum(routing["domain_load_ZGE"], axis=-1), 1, atol=1e-5)
  separation_Z = routing["domain_separation_Z"]
  assert min(separation_Z) > 0 and max(separation_Z) < 1
  assert 16_000 < routing["tokens"] <= 16_384  # nearly all that were asked for
  assert [routing["text"]["domain"].count(d) for d in routing["domains"]] == [200] * 3


def test_capacity_factors_that_are_no_numbers_are_refused_in_one_line(whole_run):
  line = refused("eval.py", f"--workdir={whole_run.workdir}", "--capacity_factors=1,x")
  assert "--capacity_factors=1,x: not a list of numbers" in line
