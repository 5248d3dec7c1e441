"""A run made before the package had rooms: it evaluates, generates and goes on to the same numbers.

tests/golden_run is its workdir after 4 steps, without plots, and expected.json what that version
then said: its evaluation, logits after the ids, and the losses of two more steps. It may change
when checkpoints change on purpose; then say in CHANGELOG.md how to convert older ones.
"""

import json
import pathlib
import shutil

import numpy as np
import pytest

import moe_jax
from moe_jax.analysis import evaluation
from moe_jax.config import override
from moe_jax.storage import workdir as workdir_lib
from moe_jax.training import run as run_lib
from moe_jax.training import setup as setup_lib

GOLDEN = pathlib.Path(__file__).parent / "golden_run"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())


@pytest.fixture
def run(tmp_path, monkeypatch):
  """A copy of the run, beside the text that it was trained on."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / "text").mkdir()
  for n in range(40):
    text = f"document {n} is about the number {n}. " * 40
    (tmp_path / "text" / f"{n}.txt").write_text(text)
  shutil.copytree(GOLDEN, tmp_path / "run")
  return tmp_path / "run"


def test_it_evaluates_and_generates(run):
  """Nothing is written to the cache that its config.json names: its programs would be run."""
  text = (run / "config.json").read_text()
  elsewhere = run.parent / "elsewhere"
  (run / "config.json").write_text(text.replace('"cache_dir": ""', f'"cache_dir": "{elsewhere}"'))
  assert str(elsewhere) in (run / "config.json").read_text()
  result, _ = evaluation.evaluate_run(str(run), 0, "validation")
  # float32 on another processor
  assert result["loss"] == pytest.approx(EXPECTED["eval_loss"], rel=1e-5)
  np.testing.assert_allclose(result["max_vio_Z"], EXPECTED["max_vio_Z"], rtol=1e-3)
  model = moe_jax.load(run)
  logits_LV = model.logits(EXPECTED["ids"])
  np.testing.assert_allclose(logits_LV[-1, :12], EXPECTED["logits"], rtol=1e-4, atol=1e-4)
  assert not elsewhere.exists()


def test_it_goes_on(run):
  """Optimizer, balancing bias, data order and router state are all read from the old files."""
  config = workdir_lib.read_config(run)
  # where it runs may change: here, all simulated devices
  config = override(config, {"train.steps": 6, "mesh.data": -1})
  run_lib.run(setup_lib.prepare(config), str(run))
  lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
  losses = {str(line["step"]): line["train/loss"] for line in lines if "train/loss" in line}
  for step, loss in EXPECTED["train_loss"].items():
    assert losses[step] == pytest.approx(loss, rel=1e-5), step
