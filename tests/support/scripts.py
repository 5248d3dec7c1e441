"""train.py, eval.py and generate.py as a user starts them, and what they leave in the workdir."""

import contextlib
import io
import json
import logging as python_logging
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from moe_jax.storage import cache as cache_lib
from tests.support import xla
from tests.support.toys import ROOT

# As in a user's shell: the package itself must set the threads that collectives need.
WITHOUT_THREADS = {name: value for name, value in os.environ.items() if name != "PJRT_NPROC"}
ONE_DEVICE = WITHOUT_THREADS | {"XLA_FLAGS": xla.flags()}


# So that runs of any number of steps are one program, which is compiled once.
CONSTANT = "--config.optimizer.schedule=constant"


def command(workdir, cache, *arguments, steps=12):
  return [
    sys.executable,
    "train.py",
    "--config=configs/debug.py",
    f"--workdir={workdir}",
    f"--cache_dir={cache}",
    f"--config.train.steps={steps}",
    "--config.train.eval_every=4",
    "--config.train.checkpoint_every=4",
    "--config.train.log_every=1",
    "--config.model.moe.jitter=0.1",
    CONSTANT,
    "--config.model.moe.bias_update_rate=0.001",
    *arguments,
  ]


def python(*arguments, **options):
  """A real process of Python after its end, with one device."""
  how = dict(cwd=ROOT, env=ONE_DEVICE, capture_output=True, text=True, timeout=600)
  return subprocess.run([sys.executable, *map(str, arguments)], **how | options)


def train(workdir, cache, *arguments, steps=12):
  done = python(*command(workdir, cache, *arguments, steps=steps)[1:])
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


def evaluate(workdir, *arguments):
  done = python("eval.py", f"--workdir={workdir}", *arguments)
  assert done.returncode == 0, done.stderr
  return done.stdout, result_of(workdir)


def result_of(workdir):
  return json.loads((workdir / "eval.json").read_text())


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

  cache_lib.build_once(path, run, pathlib.Path.exists)
  return Built(path, json.loads((path / "said.json").read_text()))


def validation_of(workdir, step):
  """The line of metrics.jsonl that the evaluation in training wrote at a step."""
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return next(v for v in lines if v["step"] == step and "validation/loss" in v)


class Ended(NamedTuple):
  returncode: int
  stdout: str
  stderr: str


def call(script: str, *arguments: str, imports_jax: bool = True) -> Ended:
  """A script in this process, with its devices, and without the seconds that a start takes.

  What a script changes in its process is put back. What the system's streams, signals and exit
  codes do is for real processes to show.

  Args:
    imports_jax: False takes jax and all of ours away: to import jax is an error then.
  """
  stdout, stderr = io.StringIO(), io.StringIO()
  with (
    _as_before(),
    contextlib.nullcontext() if imports_jax else _nothing_imported(),
    contextlib.chdir(ROOT),
    contextlib.redirect_stdout(stdout),
    contextlib.redirect_stderr(stderr),
    warnings.catch_warnings(),
    mock.patch.object(sys, "argv", [script, *map(str, arguments)]),
  ):
    warnings.simplefilter("ignore", DeprecationWarning)  # as Python does in a process
    try:
      runpy.run_path(script, run_name="__main__")
      code = 0
    except SystemExit as end:
      code = end.code or 0
  texts = (s.getvalue().replace("\r\n", "\n").replace("\r", "\n") for s in (stdout, stderr))
  return Ended(code, *texts)  # with the ends of lines that subprocess.run(text=True) reads


@contextlib.contextmanager
def _as_before():
  """Puts back what a script sets: logging, signals, hooks, the environment, and jax's options."""
  verbosity, root = logging.get_verbosity(), python_logging.root.level
  handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
  names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
  options = {name: getattr(jax.config, name) for name in names}
  with mock.patch.dict(os.environ), mock.patch.object(sys, "unraisablehook", sys.unraisablehook):
    try:
      yield
    finally:
      for number, handler in handlers.items():
        signal.signal(number, handler)
      for name, value in options.items():
        jax.config.update(name, value)
      python_logging.root.removeHandler(logging.get_absl_handler())
      python_logging.root.setLevel(root)
      logging.set_verbosity(verbosity)


@contextlib.contextmanager
def _nothing_imported():
  """Takes our modules away, so that they are imported again, and all that is made of jax."""
  made_of_jax = ("jax", "jaxlib", "flax", "optax", "orbax")

  def taken():
    return [n for n in sys.modules if n.split(".")[0] in ("moe_jax", "configs", *made_of_jax)]

  modules = {name: sys.modules.pop(name) for name in taken()}
  sys.modules.update(dict.fromkeys(made_of_jax))
  try:
    yield
  finally:
    for name in taken():
      del sys.modules[name]
    sys.modules.update(modules)


def refused(script, *arguments, imports_jax=True):
  """The one line that a script says which ends with code 2."""
  done = call(script, *arguments, imports_jax=imports_jax)
  assert done.returncode == 2 and done.stderr.count("\n") == 1, done
  assert done.stderr.startswith("error: ") and not done.stdout, done
  return done.stderr
