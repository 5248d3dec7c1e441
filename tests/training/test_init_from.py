"""A new run begins with the parameters of another run: real checkpoints, and a real second run."""

import contextlib
import dataclasses
import json
import re
import shutil
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_jax import sharding
from moe_jax.analysis import evaluation
from moe_jax.config import (
  Config,
  Data,
  Eval,
  Mesh,
  Model,
  MoE,
  Optimizer,
  OptimizerName,
  Remat,
  Train,
  override,
)
from moe_jax.errors import UserError
from moe_jax.storage import checkpoint
from moe_jax.storage import workdir as workdir_lib
from moe_jax.training import init_from
from moe_jax.training import run as run_lib
from moe_jax.training import setup as setup_lib
from tests.support.scripts import call, checkpoint_of, validation_of
from tests.support.scripts import refused as refused_script


def config_of(text, num_experts=4, learning_rate=0.01, steps=4, **mesh):
  """A model of some thousand parameters for bytes, on the eight simulated devices."""
  return Config(
    model=Model(
      num_layers=2,
      dim=16,
      num_heads=2,
      num_kv_heads=1,
      head_dim=8,
      ffn_dim=24,
      moe=MoE(num_experts=num_experts, expert_dim=16, bias_update_rate=0.01),
    ),
    data=Data(name="text", path=str(text), seq_len=16, batch_size=8),
    optimizer=Optimizer(warmup_steps=0, learning_rate=learning_rate, weight_decay=0.0),
    train=Train(steps=steps, eval_every=2, checkpoint_every=2, keep_latest=2, log_every=1),
    eval=Eval(batches=1),
    mesh=Mesh(**mesh),
  )


@pytest.fixture(scope="module")
def moe_run(text, tmp_path_factory):
  """The workdir of an MoE run that has saved the steps 2 and 4."""
  workdir = tmp_path_factory.mktemp("moe") / "run"
  run_lib.run(setup_lib.prepare(config_of(text)), str(workdir))
  assert workdir_lib.saved_steps(workdir) == [2, 4]
  return workdir


def arrays(tree):
  return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def validation_loss(workdir, step):
  return validation_of(workdir, step)["validation/loss"]


@pytest.mark.parametrize("optimizer", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_state_is_the_checkpoints_on_another_mesh(moe_run, text, tmp_path, optimizer):
  """Bit for bit; step and schedule begin at 0, Adam's count comes with its moments."""
  config = config_of(text, expert=4, data=2)
  source = init_from.find_source(f"{moe_run}:2", optimizer, tmp_path, config)
  assert source == (str(moe_run), 2, optimizer)
  mesh = sharding.make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    setup = setup_lib.make(config, mesh)
    state = init_from.load_source(source, setup.init(), setup.shardings)
    fresh = setup.init()
  want = checkpoint_of(moe_run, 2)
  for got, expected in zip(arrays(state.params), arrays(want["params"]), strict=True):
    np.testing.assert_array_equal(got, expected)
  assert np.abs(want["bias_ZE"]).max() > 0
  np.testing.assert_array_equal(state.bias_ZE, want["bias_ZE"])
  assert state.step == 0
  assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, fresh)

  def part(kind):
    return lambda node: isinstance(node, kind)

  nodes = jax.tree.leaves(state.opt_state, is_leaf=part(optax.ScaleByScheduleState))
  assert [n.count for n in nodes if isinstance(n, optax.ScaleByScheduleState)] == [0]
  nodes = jax.tree.leaves(state.opt_state, is_leaf=part(optax.ScaleByAdamState))
  (adam,) = (n for n in nodes if isinstance(n, optax.ScaleByAdamState))
  assert adam.count == (2 if optimizer else 0)
  assert max(np.abs(m).max() for m in arrays(adam.mu)) > 0 or not optimizer
  saved = [np.shape(x) for x in arrays(want["opt_state"])]
  assert saved == [np.shape(x) for x in arrays(state.opt_state)]


def test_a_run_begins_with_it_resumes_and_says_so(moe_run, text, tmp_path, capsys):
  """At a learning rate of nearly 0 the new run has the loss of the checkpoint, on another mesh."""
  config = override(
    config_of(text, learning_rate=1e-12, steps=2, expert=2, fsdp=4),
    {"model.moe.bias_update_rate": 0.0},
  )
  new = tmp_path / "new"
  run_lib.run(setup_lib.prepare(config), str(new), init_from_flag=f"{moe_run}:2")
  assert f"{new} begins with the parameters of {moe_run}, step 2" in capsys.readouterr().out
  record = json.loads((new / "init.json").read_text())
  assert record == {"workdir": str(moe_run), "step": 2, "optimizer": False}
  # float32 sums in another order, and two steps of at most 1e-12 for each weight
  assert validation_loss(new, 2) == pytest.approx(validation_loss(moe_run, 2), rel=1e-5)
  assert workdir_lib.read_lines(new / "metrics.jsonl")[0]["step"] == 1

  config = override(config, {"train.steps": 3})
  run_lib.run(setup_lib.prepare(config), str(new), init_from_flag=str(moe_run))
  said = capsys.readouterr().out
  assert f"resuming {new} at step 2 from its own checkpoint; it began with the parameters" in said
  config = override(config, {"train.steps": 4})
  for flag, optimizer in ((f"{moe_run}:4", False), (str(moe_run), True), (str(new), False)):
    with pytest.raises(UserError, match="has a checkpoint of its own, step 3, and began with the"):
      run_lib.run(
        setup_lib.prepare(config), str(new), init_from_flag=flag, init_optimizer=optimizer
      )
  with pytest.raises(UserError, match="step 4, and began with random parameters"):
    init_from.find_source(str(new), False, moe_run, config)


@pytest.mark.slow
def test_a_dense_run_begins_with_a_dense_run(text, tmp_path, capsys):
  """And goes on without biases to save, and its evaluation has no loads."""
  config = override(config_of(text, num_experts=0, steps=2), {"model.moe.bias_update_rate": 0.0})
  run_lib.run(setup_lib.prepare(config), str(tmp_path / "old"))
  config = override(
    config, {"optimizer": dataclasses.replace(config.optimizer, learning_rate=1e-12)}
  )
  run_lib.run(
    setup_lib.prepare(config), str(tmp_path / "new"), init_from_flag=str(tmp_path / "old")
  )
  losses = [validation_loss(tmp_path / run, 2) for run in ("old", "new")]
  assert losses[0] == pytest.approx(losses[1], rel=1e-5)
  config = override(config, {"train.steps": 3})
  run_lib.run(setup_lib.prepare(config), str(tmp_path / "new"))
  assert "resuming" in capsys.readouterr().out
  result, _ = evaluation.evaluate_run(str(tmp_path / "new"), 0, "validation")
  assert result["step"] == 3 and "load_ZE" not in result


def test_a_run_cut_off_before_its_first_checkpoint_begins_again_as_recorded(
  moe_run, text, tmp_path
):
  record = {"workdir": str(moe_run), "step": 2, "optimizer": True}
  workdir_lib.write_object(tmp_path / workdir_lib.INIT, record)
  assert init_from.find_source("", False, tmp_path, config_of(text)) == tuple(record.values())
  assert init_from.find_source(str(moe_run), False, tmp_path, config_of(text)).step == 4
  assert init_from.find_source("", False, tmp_path / "another", config_of(text)) is None


def test_what_does_not_fit_is_one_line(moe_run, text, tmp_path):
  config = config_of(text)
  (tmp_path / "empty").mkdir()

  def refused(said, flag=str(moe_run), optimizer=False):
    with pytest.raises(UserError, match=said):
      run_lib.run(
        setup_lib.prepare(config),
        str(tmp_path / "new"),
        init_from_flag=flag,
        init_optimizer=optimizer,
      )
    assert not (tmp_path / "new").exists()  # a refused start leaves nothing behind

  refused("none: no checkpoint there", str(tmp_path / "none"))
  refused("empty: no checkpoint there", str(tmp_path / "empty"))
  refused(r":3: no checkpoint of that step; there are \[2, 4\]", f"{moe_run}:3")
  refused(r":0: no checkpoint of that step; there are \[2, 4\]", f"{moe_run}:0")
  refused("--init_optimizer needs --init_from", "", True)
  config = override(config, {"optimizer.name": OptimizerName.MUON})
  refused(
    "name=muon and clip_norm=1.0 do not fit the state of that run's name=adamw", optimizer=True
  )
  config = override(config, {"model.moe.num_experts": 8})
  refused(r"down_EFD is \[2, 4, 16, 16\] there and \[2, 8, 16, 16\] here, .* and 1 more; set")
  config = override(config, {"model.moe.num_experts": 0, "model.moe.bias_update_rate": 0.0})
  refused(r"router_DE is .* there and absent here|.*\d more; set config.model as that run has it")


MODEL = "config.model.rope_base=500.0 (there: 10000.0), config.model.moe.top_k=1 (there: 2)"


def test_another_model_of_the_same_shapes_is_refused_unless_it_is_named(moe_run, text, tmp_path):
  """Kernels, and what is done in training alone, make no other model."""
  config = override(
    config_of(text),
    {
      "model.rope_base": 500.0,
      "model.moe.top_k": 1,
      "model.remat": Remat.FULL,
      "model.moe.jitter": 0.1,
      "model.moe.bias_update_rate": 0.0,
    },
  )
  named = ["model.rope_base", "model.moe.top_k"]

  def found(*names):
    return init_from.find_source(str(moe_run), False, tmp_path, config, names)

  remedy = f"take that run's with --config={moe_run}, or name each of these fields on the command"
  with pytest.raises(UserError, match=re.escape(f"another model: {MODEL}; {remedy}")):
    found()
  with pytest.raises(UserError, match=r"another model: config.model.rope_base=500.0 \(there: 10"):
    found(named[1])
  assert found(*named) == (str(moe_run), 4, False)
  # A run that was cut off before its first checkpoint was asked at its start.
  workdir_lib.write_object(tmp_path / workdir_lib.INIT, found(*named)._asdict())
  assert init_from.find_source("", False, tmp_path, config) == (str(moe_run), 4, False)


def test_the_command_line_takes_a_runs_config_and_names_what_is_another(moe_run, tmp_path):
  """Its config, whatever the defaults are, and overrides on top."""
  run, begun = f"--config={moe_run}", (f"--init_from={moe_run}", f"--workdir={tmp_path / 'new'}")
  done = call("train.py", run, "--config.train.steps=1", "--config.model.moe.top_k=1", "--diff")
  assert done.returncode == 0, done.stderr
  lines = done.stdout.splitlines()
  for line in (
    "model.dim = 16   (default 192)",
    "model.moe.top_k = 1   (default 2)",
    "train.steps = 1   (default 1000)",
  ):
    assert f"config.{line}" in lines
  steps = "--config.train.steps=1", "--config.optimizer.learning_rate=1e-12"
  done = call("train.py", run, *steps, *begun, "--config.model.rope_base=500")
  assert f"begins with the parameters of {moe_run}, step 4" in done.stdout, done
  stored = workdir_lib.read_config(tmp_path / "new")
  assert (stored.model.rope_base, stored.model.moe.num_experts) == (500.0, 4)
  (tmp_path / "folder").mkdir()
  line = refused_script("train.py", f"--config={tmp_path / 'folder'}")
  assert f"--config={tmp_path / 'folder'}: no such file and no workdir of a run" in line


class Saved(NamedTuple):
  weights_D: jax.Array


@pytest.mark.parametrize(
  ("losses", "kept", "best"),
  [
    ((np.nan, 2.0, np.nan, np.inf), [2, 4], 2),
    ((np.nan, np.inf), [2], 2),
    ((3.0, 2.0, 2.5), [2, 3], 2),
    ((np.nan, np.nan), [2], None),
  ],
)
def test_the_best_step_has_a_loss_that_is_a_number(tmp_path, losses, kept, best):
  """inf is the loss of a step that was saved without an evaluation; nan that of a broken model."""
  # Closed also where an assertion fails: Python would wait for Orbax's threads for minutes.
  with contextlib.closing(checkpoint.Checkpointer.writing(tmp_path, 1, 1)) as saver:
    assert saver.best_step() is None
    for step, loss in enumerate(losses, 1):
      saver.save(step, Saved(jnp.ones(2)), step, loss)
      saver.wait()
    assert saver.best_step() == best
    assert set(saver.steps()) == set(kept)


@pytest.mark.slow
def test_the_remedy_of_a_run_that_blew_up_works(moe_run, text, tmp_path):
  """What the error message says to do, with a lower learning rate, trains."""
  config, old = config_of(text, steps=6), tmp_path / "old"
  shutil.copytree(moe_run, old)
  config = override(config, {"optimizer.learning_rate": 1e30})
  workdir_lib.write_config(old, config)
  with pytest.raises(UserError, match="not finite at step 5") as error:
    run_lib.run(setup_lib.prepare(config), str(old))
  line = str(error.value)
  assert error.value.code == 6
  assert "lower config.optimizer.learning_rate=1e+30 in a new run" in line
  remedy = re.search(r"--workdir=NEW --init_from=(\S+:4) ", line)
  assert remedy, line
  config = override(config, {"optimizer.learning_rate": 1e-3})
  run_lib.run(setup_lib.prepare(config), str(tmp_path / "new"), init_from_flag=remedy[1])
  assert validation_loss(tmp_path / "new", 6) < validation_loss(moe_run, 4)


def test_the_command_line_has_the_flags(tmp_path):
  new = f"--workdir={tmp_path / 'new'}"
  flags = ["--init_from=none", "--init_optimizer", "--profile=9:10"]
  line = refused_script("train.py", "--config=configs/debug.py", new, *flags)
  assert line.startswith("error: --init_from=none: no checkpoint there")
