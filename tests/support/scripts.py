"""train.py, eval.py and generate.py as a user starts them, and what they leave in the workdir."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp

from tests.support.toys import ROOT

# As in a user's shell: the package itself must set the threads that collectives need.
WITHOUT_THREADS = {name: value for name, value in os.environ.items() if name != "PJRT_NPROC"}
ONE_DEVICE = WITHOUT_THREADS | {"XLA_FLAGS": ""}


def command(workdir, cache, *arguments, steps=12):
  return [
    sys.executable, "train.py", "--config=configs/debug.py", f"--workdir={workdir}",
    f"--config.data.cache_dir={cache}", f"--config.train.steps={steps}",
    "--config.train.eval_every=4", "--config.train.checkpoint_every=4",
    "--config.train.log_every=1", "--config.model.moe.jitter=0.1",
    "--config.model.moe.bias_update_rate=0.001", *arguments,
  ]  # fmt: skip


def train(workdir, cache, *arguments, steps=12, env=ONE_DEVICE):
  done = subprocess.run(
    command(workdir, cache, *arguments, steps=steps),
    cwd=ROOT, env=env, capture_output=True, text=True, timeout=300,
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
    cwd=ROOT, env=ONE_DEVICE, input=stdin, capture_output=True, text=True, timeout=300,
  )  # fmt: skip


def evaluate(workdir, *arguments, env=ONE_DEVICE):
  done = subprocess.run(
    [sys.executable, "eval.py", f"--workdir={workdir}", *arguments],
    cwd=ROOT, env=env, capture_output=True, text=True, timeout=300,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  return done.stdout, json.loads((workdir / "eval.json").read_text())
