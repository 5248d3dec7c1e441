"""Sweep files of a few arms, and their plans."""

import os
import pathlib
import subprocess
import sys
import textwrap

from moe_jax.sweep import plan as plan_lib
from tests.support import xla
from tests.support.scripts import built
from tests.support.toys import ROOT


def write_sweep(folder, arms, **more):
  fields = "".join(f", {name}={value!r}" for name, value in more.items())
  text = f"""
    '''Is it so?

    Why it could be.
    '''
    from moe_jax.sweep import Sweep, arm, match, product, zipped


    def get_sweep():
      return Sweep(base="configs/debug.py", arms={arms}{fields})
  """
  path = folder / "sweep_file.py"
  path.write_text(textwrap.dedent(text).lstrip())
  return str(path)


def make(path, out="runs/x", *, arms=(), seeds=(), overrides=None):
  overrides = overrides or {}
  return plan_lib.make_plan(path, pathlib.Path(out), arms=arms, seeds=seeds, overrides=overrides)


GOOD = (
  "[arm('first', {'eval.final_batches': 1, 'train.steps': 150}),"
  " arm('second', {'eval.final_batches': 1, 'train.steps': 150, 'optimizer.b2': 0.9})]"
)
BAD = (
  "[arm('diverges', {'optimizer.learning_rate': 1e30}),"
  " arm('too_large', {'model.moe.expert_dim': 2_000_000_000})]"
)
SECONDS = 1800
TWO = "[arm('base'), arm('none', {'loss.load_balance': 0.0})]"

ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PJRT_NPROC"}
ENVIRONMENT["XLA_FLAGS"] = xla.flags()


def start_real(folder, cache, arms, *options, **more):
  """Starts sweep.py on arms of configs/debug.py, in folder/out, with a line for each step."""
  path = write_sweep(folder, arms, seeds=(0,), **more)
  fields = [f"--cache_dir={cache}", "--config.train.log_every=1"]
  return subprocess.Popen(
    [sys.executable, "sweep.py", f"--sweep={path}", f"--out={folder / 'out'}", *fields, *options],
    cwd=ROOT,
    env=ENVIRONMENT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,
  )


def end(process):
  """How a sweep ended; one that takes too long is stopped."""
  try:
    output, errors = process.communicate(timeout=SECONDS)
  except subprocess.TimeoutExpired:
    process.terminate()  # and the run of the sweep with it
    process.communicate()
    raise
  return {"code": process.returncode, "output": output, "errors": errors}


def whole_sweep(shared_folder, cache):
  """A sweep that nothing disturbs but its own arms, two of which fail; built once, in out/."""

  def build(folder):
    return end(start_real(folder, cache, f"{GOOD} + {BAD}", evaluate=("--routing",)))

  return built(shared_folder / "whole_sweep", build)
