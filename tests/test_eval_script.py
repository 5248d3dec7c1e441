"""eval.py: loss, bits per byte, loads and plots of a run; other meshes; mistakes."""

import shutil

import numpy as np
import pytest

from moe_jax.storage import workdir as workdir_lib
from tests.support.scripts import (
  built,
  call,
  command,
  evaluate,
  losses_of,
  refused,
  result_of,
  train,
  validation_of,
)


@pytest.fixture(scope="module")
def evaluated(shared_folder, whole_run):
  """eval.py on a workdir that holds all it needs, and again on another split."""

  def build(path):
    workdir = shutil.copytree(whole_run.workdir, path / "run")
    output, result = evaluate(workdir)
    files = {p.name: p.read_bytes()[:4].hex() for p in workdir.glob("*.png")}
    call("eval.py", f"--workdir={workdir}", "--split=test")
    other = result_of(workdir)
    (path / "mine").mkdir()
    for number in range(20):
      (path / f"mine/{number}.txt").write_text(f"def f(x):\n  return x + {number}\n" * 200)
    done = call("eval.py", f"--workdir={workdir}", f"--data.path={path / 'mine'}")
    assert not done.returncode, done.stderr
    assert result_of(workdir) == other  # which stays that of the run's own text
    mine = workdir_lib.read_object(workdir / workdir_lib.EVAL_DATA)
    return {"output": output, "result": result, "pictures": files, "other": other, "mine": mine}

  return built(shared_folder / "evaluated", build).said


def test_the_losses_by_hand(evaluated, whole_run):
  """Of four batches of eight rows of 64; separators are tokens of no byte."""
  result, trained = evaluated["result"], validation_of(whole_run.workdir, 12)
  assert result["loss"] == pytest.approx(trained["validation/loss"], rel=1e-6)
  assert result["perplexity"] == pytest.approx(np.exp(result["loss"]), rel=1e-6)
  assert result["tokens"] == 4 * 8 * 64 >= result["bytes"] > 0.9 * result["tokens"]
  bits = result["loss"] * result["tokens"] / np.log(2) / result["bytes"]
  assert result["bits_per_byte"] == pytest.approx(bits, rel=1e-6)
  assert 0.5 < result["gzip_bits_per_byte"] < 4


def test_the_load_of_each_layer_adds_up_to_one(evaluated):
  load_ZE = evaluated["result"]["load_ZE"]
  np.testing.assert_allclose(np.sum(load_ZE, axis=1), 1.0, rtol=1e-5)
  assert np.shape(load_ZE) == (2, 4)


def test_the_output_names_the_numbers_and_plots_are_drawn(evaluated):
  for word in (
    "parameters",
    "active",
    "tokens/s",
    "bits per byte",
    "gzip -9",
    "dropped",
    "MaxVio",
    "entropy",
    "dead",
  ):
    assert word in evaluated["output"]
  for name in ("loss.png", "load.png", "balance.png"):
    assert bytes.fromhex(evaluated["pictures"][name]) == b"\x89PNG"


def test_every_evaluation_names_its_data(evaluated):
  assert evaluated["result"]["data"] == evaluated["other"]["data"] != evaluated["mine"]["data"]
  assert evaluated["mine"]["data"].startswith("text ") and evaluated["mine"]["data"][-4:] == "mine"
  assert f"validation set of {evaluated['result']['data']}: " in evaluated["output"]
  assert evaluated["mine"]["loss"] != evaluated["result"]["loss"]


def test_another_split_has_another_loss(evaluated):
  other = evaluated["other"]
  assert other["split"] == "test" and other["loss"] != evaluated["result"]["loss"]


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--workdir=/nowhere"], "no run; train one first"),
    (["--step=5", "--workdir=WORKDIR"], "--step=5: no such checkpoint; there are"),
    ([], "--workdir is missing"),
  ],
)
def test_eval_refuses_in_one_line(whole_run, arguments, message):
  given = [a.replace("WORKDIR", str(whole_run.workdir)) for a in arguments]
  assert message in refused("eval.py", *given)


@pytest.mark.slow
def test_eight_devices_evaluate_groups_of_two_rows_as_one_device_does(tmp_path, cache):
  """That drop a quarter."""
  flags = ("--config.model.moe.group_size=128", "--config.model.moe.eval_capacity_factor=1.0")
  train(tmp_path / "run", cache, *flags)
  one = validation_of(tmp_path / "run", 12)
  call("eval.py", f"--workdir={tmp_path / 'run'}", "--capacity_factors=0.5")
  many = result_of(tmp_path / "run")
  assert many["loss"] == pytest.approx(one["validation/loss"], rel=1e-6)
  drops_Z = one["validation/drop_fraction_Z"]
  assert many["drop_fraction_Z"] == pytest.approx(drops_Z, abs=1e-3)
  assert np.mean(drops_Z) > 0.05 and many["capacity"]


@pytest.mark.slow
def test_an_expert_parallel_run_trains_and_evaluates_as_on_one_device(tmp_path, cache, whole_run):
  """The command of the README on the eight devices here; then eval.py on one device."""
  workdir, mesh = tmp_path / "run", ("--config.mesh.expert=4", "--config.mesh.data=2")
  assert call(*command(workdir, cache, *mesh)[1:]).returncode == 0
  got, want = losses_of(workdir), losses_of(whole_run.workdir)
  # Rounding grows from step to step; after 12 it is still far below the fall of the loss.
  assert got == pytest.approx(want, rel=2e-3)
  assert got[1] == pytest.approx(want[1], rel=1e-6)
  (_, result), trained = evaluate(workdir), validation_of(workdir, 12)
  assert result["loss"] == pytest.approx(trained["validation/loss"], rel=1e-5)
  # One token near a tie may go the other way: 1 of 4096 assignments.
  np.testing.assert_allclose(result["load_ZE"], trained["validation/load_ZE"], atol=1e-3)
