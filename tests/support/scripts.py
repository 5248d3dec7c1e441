"""train.py, eval.py and generate.py as a user starts them, and what they leave in the workdir."""

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from moe_jax.data import cache as cache_lib
from tests.support import xla
from tests.support.toys import ROOT

# As in a user's shell: the package itself must set the threads that collectives need.
WITHOUT_THREADS = {name: value for name, value in os.environ.items() if name != "PJRT_NPROC"}
ONE_DEVICE = WITHOUT_THREADS | {"XLA_FLAGS": xla.flags()}
EIGHT_DEVICES = WITHOUT_THREADS | {"XLA_FLAGS": xla.flags(devices=8)}


# So that runs of any number of steps are one program, which is compiled once.
CONSTANT = "--config.optimizer.schedule=constant"


def command(workdir, cache, *arguments, steps=12):
  return [
    sys.executable, "train.py", "--config=configs/debug.py", f"--workdir={workdir}",
    f"--cache_dir={cache}", f"--config.train.steps={steps}",
    "--config.train.eval_every=4", "--config.train.checkpoint_every=4",
    "--config.train.log_every=1", "--config.model.moe.jitter=0.1", CONSTANT,
    "--config.model.moe.bias_update_rate=0.001", *arguments,
  ]  # fmt: skip


def train(workdir, cache, *arguments, steps=12, env=ONE_DEVICE):
  done = subprocess.run(
    command(workdir, cache, *arguments, steps=steps),
    cwd=ROOT, env=env, capture_output=True, text=True, timeout=600,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  return done.stdout


def losses_of(workdir):
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def checkpoint_of(workdir, step):
  path = (workdir / "checkpoints" / str(step) / "state").absolute()
  with ocp.PyTreeCheckpointer() as reader:
    shapes = reader.metadata(path).item_metadata.tree
    args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
    return reader.restore(path, restore_args=args)


def generate(*arguments, stdin=""):
  return subprocess.run(
    [sys.executable, "generate.py", *arguments],
    cwd=ROOT, env=ONE_DEVICE, input=stdin, capture_output=True, text=True, timeout=600,
  )  # fmt: skip


def evaluate(workdir, *arguments, env=ONE_DEVICE):
  done = subprocess.run(
    [sys.executable, "eval.py", f"--workdir={workdir}", *arguments],
    cwd=ROOT, env=env, capture_output=True, text=True, timeout=600,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  return done.stdout, json.loads((workdir / "eval.json").read_text())


class Run(NamedTuple):
  workdir: pathlib.Path
  output: str  # of the command that made it


class Built(NamedTuple):
  path: pathlib.Path
  said: dict[str, Any]  # what the function that built it returned


def built(path: pathlib.Path, build: Callable[[pathlib.Path], dict[str, Any]]) -> Built:
  """A folder that `build` fills once, whichever of the workers asks first; the others wait."""

  def run(partial):
    (partial / "said.json").write_text(json.dumps(build(partial)))

  cache_lib.build_once(path, run)
  return Built(path, json.loads((path / "said.json").read_text()))


def validation_of(workdir, step):
  """The line of metrics.jsonl that the evaluation in training wrote at a step."""
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return next(v for v in lines if v["step"] == step and "validation/loss" in v)


def refused(script):
  """The one line that a process says which ends with code 2."""
  done = subprocess.run(
    script, cwd=ROOT, env=ONE_DEVICE, capture_output=True, text=True, timeout=600
  )
  assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
  return done.stderr
