"""What a user waits for: --help, --describe, compiling, the first step; and a run's peak memory.

Each is a process of its own. The budgets are those of a laptop with two CPUs, of which the tests
allow twice as much (tests/benchmarks/test_startup.py).
"""

import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

from benchmarks import results
from benchmarks.results import progress

# {what: the budget}. Seconds of wall time, or MiB of memory.
BUDGETS = {
  "train.py --help, s": 1.0,
  "train.py --describe of tiny_moe, s": 2.5,
  "train.py of tiny_moe to step 1, programs cached, s": 15.0,
  "train.py of tiny_moe to step 1, nothing cached, s": 30.0,
  "train.py of tiny_moe, peak memory of 6 steps, MiB": 1500.0,
  "compiling a training step of tiny_moe, s": 10.0,
  "compiling a training step of laptop_moe, s": 10.0,
  "compiling a training step of mixtral_8x7b, s": 10.0,
}
COMPILED = ("tiny_moe", "laptop_moe", "mixtral_8x7b")
_COMPILE = """
import sys
from benchmarks import startup
print(startup.compile_seconds(sys.argv[1]))
"""


class Ended(NamedTuple):
  """A process that has ended."""

  seconds: float
  memory: float  # MiB, the highest resident set
  output: str


def run(rounds: int) -> dict[str, Any]:
  """Measures each of BUDGETS; the first steps and the memory once, and the others `rounds` times.

  Returns {"targets"}: the budgets, and what was measured.
  """
  with tempfile.TemporaryDirectory() as folder:
    measured = measure(pathlib.Path(folder), rounds)
  return {"targets": [results.target(what, measured[what], BUDGETS[what]) for what in BUDGETS]}


def measure(folder: pathlib.Path, rounds: int) -> dict[str, float]:
  """Returns the values of BUDGETS; `folder` takes the runs and their caches."""
  tiny = ["train.py", "--config=configs/tiny_moe.py"]
  values = {
    "train.py --help, s": _median(rounds, "train.py", "--help"),
    "train.py --describe of tiny_moe, s": _median(rounds, *tiny, "--describe"),
  }
  cache = folder / "cache"
  command = [*tiny, f"--cache_dir={cache}", "--config.train.log_every=1"]
  first_step(command, folder / "data")  # prepares the data
  shutil.rmtree(cache / "xla", ignore_errors=True)
  for name in ("nothing", "programs"):
    what = f"train.py of tiny_moe to step 1, {name} cached, s"
    values[what] = first_step(command, folder / name)
    progress(f"{what}: {values[what]:.1f}")
  ended = process(*command, f"--workdir={folder / 'memory'}", "--config.train.steps=6",
                  "--config.optimizer.warmup_steps=1",
                  "--config.train.eval_every=6", "--config.eval.batches=1")  # fmt: skip
  values["train.py of tiny_moe, peak memory of 6 steps, MiB"] = ended.memory
  for config in COMPILED:
    seconds = [float(process("-c", _COMPILE, config).output) for _ in range(rounds)]
    what = f"compiling a training step of {config}, s"
    values[what] = statistics.median(seconds)
    progress(f"{what}: {values[what]:.1f}")
  return values


def process(*arguments: str) -> Ended:
  """Runs a Python process to its end; raises subprocess.CalledProcessError where it fails."""
  start = time.perf_counter()
  child = subprocess.Popen(
    [sys.executable, *arguments], cwd=results.ROOT, stdout=subprocess.PIPE, text=True
  )
  output = child.stdout.read()
  child.stdout.close()
  _, status, usage = os.wait4(child.pid, 0)
  child.returncode = os.waitstatus_to_exitcode(status)  # wait4 has taken it from subprocess
  seconds = time.perf_counter() - start
  if child.returncode:
    raise subprocess.CalledProcessError(child.returncode, child.args, output)
  scale = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
  return Ended(seconds, usage.ru_maxrss * scale / 2**20, output)


def first_step(command: list[str], workdir: pathlib.Path) -> float:
  """Returns the seconds from the start of train.py until it has printed its first step."""
  start = time.perf_counter()
  command = [sys.executable, *command, f"--workdir={workdir}"]
  with subprocess.Popen(command, cwd=results.ROOT, stdout=subprocess.PIPE, text=True) as child:
    for line in child.stdout:
      if line.startswith("step "):
        child.kill()
        return time.perf_counter() - start
  raise subprocess.CalledProcessError(child.returncode, command)


def compile_seconds(name: str) -> float:
  """Returns the seconds to trace and compile a training step of configs/NAME.py, on one device.

  Nothing is allocated, so that the model may be larger than this machine.
  """
  import jax
  import numpy as np

  from moe_jax import command_line, sharding, startup, validation
  from moe_jax.data import pipeline
  from moe_jax.training import train

  startup.start()
  jax.config.update("jax_enable_compilation_cache", False)
  config = command_line.load_file(f"configs/{name}.py")
  for axis in sharding.AXES:
    setattr(config.mesh, axis, 1)
  config = validation.resolve_mesh(config, 1)
  mesh = sharding.make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    start = time.perf_counter()
    _, state, shardings = train.init_state(config, mesh)
    tokens_BL = jax.ShapeDtypeStruct((config.data.batch_size, config.data.seq_len), np.int32)
    batch = pipeline.Batch(*[tokens_BL] * len(pipeline.Batch._fields))
    train.compile_step(config, shardings).lower(state, batch).compile()
    return time.perf_counter() - start


def text(result: dict[str, Any]) -> str:
  """Formats the table."""
  return results.target_table(result["targets"])


def _median(rounds: int, *arguments: str) -> float:
  seconds = statistics.median(process(*arguments).seconds for _ in range(rounds))
  progress(f"{' '.join(arguments)}: {seconds:.2f} s")
  return seconds
