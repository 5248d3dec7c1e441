"""Real runs for the tests of reports: python -m tests.support.real_runs FOLDER TEXT

Makes the text in TEXT, and in FOLDER the workdirs of RUNS and a sweep's folder with two arms that
are trained and evaluated, as if a scheduler had run the lines of --dry-run.
"""

import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys

from moe_jax.config import Mesh, override
from moe_jax.start import command_line
from moe_jax.storage import workdir as workdir_lib
from moe_jax.training import run as run_lib
from moe_jax.training import setup as setup_lib
from tests.support import sweeps
from tests.support.scripts import ONE_DEVICE, built
from tests.support.toys import ROOT

# Killed in the middle of a line; the MoE of the sweep has gone on from there.
RUNS = {
  "dense": "sweep/dense/seed0", "moe": "sweep/moe/seed0", "killed": "killed", "one": "one",
  "upcycled": "upcycled", "imported": "imported",
}  # fmt: skip
ARMS = "[arm('dense', {'model.moe.num_experts': 0}), arm('moe')]"
FIELDS = {
  "data.name": "text", "model.ffn_dim": 32, "model.moe.dispatch": "grouped",
  "model.moe.grouped_matmul": "blocked", "model.attention": "reference",
  "optimizer.schedule": "constant", "optimizer.warmup_steps": 0, "train.steps": 6,
  "train.eval_every": 2, "train.checkpoint_every": 2, "train.log_every": 1, "eval.batches": 1,
  "eval.final_batches": 0,
}  # fmt: skip
KILLED_STEP = 5


def real_runs(shared_folder):
  """The folder of the runs, made once for all workers, which only read it."""

  def build(folder):
    text = shared_folder / "real_text"
    command = [sys.executable, "-m", "tests.support.real_runs", str(folder), str(text)]
    done = subprocess.run(command, cwd=ROOT, env=ONE_DEVICE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {"sweep": str(folder.parent / "real_runs/sweep")}

  return built(shared_folder / "real_runs", build).path


def fields(text):
  return FIELDS | {"data.path": str(text)}


def plan(folder, text):
  """Of the sweep."""
  path = sweeps.write_sweep(folder, ARMS, seeds=(0,), target="dense")
  return path, sweeps.make(path, folder / "sweep", overrides=fields(text))


def train_and_die(config, path):
  """Trains in another process, which SIGKILL ends in the middle of a line of metrics.jsonl."""
  child = os.fork()
  if not child:
    append = workdir_lib.append_line

    def append_or_die(file, values):
      if file.name == workdir_lib.METRICS and values["step"] == KILLED_STEP:
        with file.open("a") as lines:
          lines.write(f'{{"step": {KILLED_STEP}, "tra')
        os.kill(os.getpid(), signal.SIGKILL)
      append(file, values)

    workdir_lib.append_line = append_or_die
    run_lib.run(setup_lib.prepare(config), str(path))
  _, status = os.waitpid(child, 0)
  assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL


def main(folder, text):
  for n in range(60):
    path = text / ("even", "odd")[n % 2] / f"{n}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"document {n} is about the number {n}. " * 30)
  base = command_line.load_file("configs/debug.py")
  config = override(base, fields(text), "")
  workdirs = {name: folder / place for name, place in RUNS.items()}
  longer = override(config, {"train.steps": 8}, "")
  train_and_die(longer, workdirs["moe"])  # before jax starts here, because it does not fork
  shutil.copytree(workdirs["moe"], workdirs["killed"])

  import jax

  from moe_jax import sharding
  from moe_jax.analysis import evaluation
  from moe_jax.hf import exporting, families, importing
  from moe_jax.training import upcycle

  for planned in plan(folder, text)[1].runs:
    run_lib.run(setup_lib.prepare(planned.config), str(folder / "sweep" / planned.workdir))
  one = override(config, {"train.steps": 1}, "")
  run_lib.run(setup_lib.prepare(one), str(workdirs["one"]))
  tuned = override(config, {"optimizer.learning_rate": 0.001}, "")
  upcycle.write_upcycled(str(workdirs["dense"]), tuned, str(workdirs["upcycled"]), "copy", 0.0)
  loaded = exporting.load_run(str(workdirs["moe"]), 0)
  exporting.export(loaded, families.FAMILIES["mixtral"], folder / "hf")
  made = importing.plan(str(folder / "hf"), Mesh(data=1))
  here = override(made.config, {"data": config.data, "eval": config.eval})  # not 100 MB of text
  made = made._replace(config=here)
  mesh = sharding.make_mesh(made.config.mesh)
  with jax.set_mesh(mesh):
    importing.save_import(made, importing.read_weights(made, mesh), workdirs["imported"])
  for name, path in workdirs.items():
    options = {"routing": True, "capacity_factors": [1.0, math.inf], "causal": True}
    if name != "killed":
      evaluation.evaluate_run(str(path), 0, "validation", **(options if name == "moe" else {}))


if __name__ == "__main__":
  main(*map(pathlib.Path, sys.argv[1:]))
