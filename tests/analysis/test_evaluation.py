"""eval.py's options: other capacities, what is refused, and all that it writes of a trained run."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from moe_jax.analysis import evaluation
from moe_jax.config import Dispatch, Exchange, Router, UserError
from tests.support.toys import ROOT, toy_config


def test_other_capacities():
  dropless = toy_config(
    dispatch=Dispatch.GROUPED, exchange=Exchange.ALL_TO_ALL, exchange_factor=2.0,
    capacity_factor=0.0, eval_capacity_factor=0.0,
  )  # fmt: skip
  moe = evaluation.at_capacity(dropless, 1.5).model.moe
  assert (moe.dispatch, moe.eval_capacity_factor) == (Dispatch.GATHER, 1.5)
  assert evaluation.at_capacity(dropless, 0.0).model.moe == dropless.model.moe
  moe = evaluation.at_capacity(toy_config(dispatch=Dispatch.EINSUM), 0.5).model.moe
  assert (moe.dispatch, moe.eval_capacity_factor) == (Dispatch.EINSUM, 0.5)
  assert dropless.model.moe.dispatch is Dispatch.GROUPED  # the run's own config stays


def test_what_has_no_meaning_is_refused():
  dense = toy_config(num_experts=0)
  evaluation.check(dense, [], False)
  for factors, routing, flag in (([1.0], False, "--capacity_factors"), ([], True, "--routing")):
    with pytest.raises(UserError, match=f"{flag}: config.model.moe.num_experts=0"):
      evaluation.check(dense, factors, routing)
  chosen = toy_config(router=Router.EXPERT_CHOICE, renormalize=False)
  chosen.loss.load_balance = 0.0
  evaluation.check(chosen, [0.5, 2.0], True)
  with pytest.raises(UserError, match="set it above 0"):
    evaluation.check(chosen, [0.0], True)


def run(script, workdir, *arguments):
  done = subprocess.run(
    [sys.executable, script, f"--workdir={workdir}", *arguments],
    cwd=ROOT, env=os.environ | {"XLA_FLAGS": ""}, capture_output=True, text=True, timeout=300,
  )  # fmt: skip
  return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_a_trained_run_says_all_of_it(tmp_path):
  arguments = [
    "--config=configs/debug.py", "--config.data.name=python_domains",
    f"--config.data.cache_dir={tmp_path / 'cache'}", "--config.train.keep_latest=3",
    "--config.train.steps=60", "--config.train.checkpoint_every=20", "--config.train.eval_every=60",
    "--config.eval.final_batches=40",
  ]  # fmt: skip
  assert run("train.py", tmp_path / "run", *arguments)[0] == 0
  flags = ("--routing", "--causal", "--capacity_factors=0.5,1,2,0")
  code, said, error = run("eval.py", tmp_path / "run", *flags)
  assert code == 0, error
  for words in ("causal loss", "capacity factor 0.5", "repeats first", "domains apart", "bytecode"):
    assert words in said
  result, routing = (json.loads((tmp_path / "run" / n).read_text())
                     for n in ("eval.json", "routing.json"))  # fmt: skip
  assert list(result["domains"]) == ["code", "prose", "bytecode"]
  assert sum(d["tokens"] for d in result["domains"].values()) == result["tokens"] == 40 * 8 * 64
  weighted = sum(d["loss"] * d["tokens"] for d in result["domains"].values())
  assert weighted / result["tokens"] == pytest.approx(result["loss"], rel=1e-5)
  points = {point["capacity_factor"]: point for point in result["capacity"]}
  drops = [np.mean(points[factor]["drop_fraction_Z"]) for factor in (0.5, 1, 2)]
  assert drops[0] > drops[1] > drops[2] and np.mean(points[0]["drop_fraction_Z"]) == 0
  assert points[2]["loss"] == result["loss"]  # the run's own factor
  assert result["causal"]["gap"] == 0.0 and result["causal"]["tokens"] == 16 * 64
  assert result["flops_per_token"] > 6 * 10_000
  # Routing: shapes, shares and what it was traced from.
  assert routing["step"] == 60 and [p["step"] for p in routing["saturation"]] == [20, 40]
  assert routing["domains"] == ["code", "prose", "bytecode"] and routing["layers"] == [0, 1]
  for name, shape in (("domain_load_ZGE", (2, 3, 4)), ("position_load_ZPE", (2, 8, 4)),
                      ("class_load_ZCE", (2, 6, 4)), ("coactivation_ZEE", (2, 4, 4))):  # fmt: skip
    assert np.shape(routing[name]) == shape
  np.testing.assert_allclose(np.sum(routing["domain_load_ZGE"], axis=-1), 1, atol=1e-5)
  assert min(routing["domain_separation_Z"]) > 0 and max(routing["domain_separation_Z"]) < 1
  assert 16_000 < routing["tokens"] <= 16_384
  assert [routing["text"]["domain"].count(d) for d in routing["domains"]] == [200] * 3
  code, _, error = run("eval.py", tmp_path / "run", "--capacity_factors=1,x")
  assert code == 2 and error.count("\n") == 1
  assert "--capacity_factors=1,x: not a list of numbers" in error
