"""What a user waits for: --help, --describe, compiling, the first step; and a run's peak memory.

Each is a process of its own. The budgets are those of a laptop with two CPUs, of which the tests
allow twice as much (tests/benchmarks/test_startup.py).
"""

import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks import results
from benchmarks.results import progress

# {what: the budget}. Seconds of wall time, or MiB of memory.
BUDGETS = {
  "train.py --help, s": 1.0,
  "train.py --describe of tiny_moe, s": 2.5,
  "train.py of tiny_moe to step 1, programs cached, s": 20.0,
  "train.py of tiny_moe to step 1, nothing cached, s": 30.0,
  "train.py of tiny_moe, peak memory of 6 steps, MiB": 1500.0,
  "compiling a training step of tiny_moe, s": 10.0,
  "compiling a training step of laptop_moe, s": 10.0,
  "compiling a training step of mixtral_8x7b, s": 10.0,
}
COMPILED = ("tiny_moe", "laptop_moe", "mixtral_8x7b")
_PREPARE = """
import sys
from moe_jax.start import command_line
from moe_jax.data import pipeline
command_line.set_cache(sys.argv[1])
config = command_line.load_file(sys.argv[2])
for split in ("train", "validation"):
  pipeline.load_rows(config.data, split)
"""
_COMPILE = """
import sys
from benchmarks import startup
for config in sys.argv[1:]:
  print(startup.compile_seconds(config))
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


def import_seconds() -> float:
  """Returns the seconds in which a process imports jax: 1 on the machine of the budgets."""
  return process("-c", "import jax").seconds


def measure(folder: pathlib.Path, rounds: int) -> dict[str, float]:
  """Returns the values of BUDGETS; `folder` takes the runs and their caches."""
  tiny = ["train.py", "--config=configs/tiny_moe.py"]
  values = {
    "train.py --help, s": _median(rounds, "train.py", "--help"),
    "train.py --describe of tiny_moe, s": _median(rounds, *tiny, "--describe"),
  }
  cache = folder / "cache"
  # The number of steps is a part of the program, by the schedule of the learning rate.
  command = [*tiny, f"--cache_dir={cache}", "--config.train.log_every=1", "--config.train.steps=6",
             "--config.optimizer.warmup_steps=1", "--config.eval.batches=1"]  # fmt: skip
  process("-c", _PREPARE, str(cache), "configs/tiny_moe.py")
  what = "train.py of tiny_moe to step 1, {} cached, s"
  values[what.format("nothing")], _ = first_step(command, folder / "nothing")
  values[what.format("programs")], ended = first_step(command, folder / "programs", end=True)
  values["train.py of tiny_moe, peak memory of 6 steps, MiB"] = ended.memory
  seconds = [
    [float(line) for line in process("-c", _COMPILE, *COMPILED).output.split()]
    for _ in range(rounds)
  ]
  for config, of_config in zip(COMPILED, zip(*seconds, strict=True), strict=True):
    values[f"compiling a training step of {config}, s"] = statistics.median(of_config)
  for what, value in values.items():
    progress(f"{what}: {value:.1f}")
  return values


def process(*arguments: str) -> Ended:
  """Runs a Python process to its end; raises subprocess.CalledProcessError where it fails."""
  return _watch(arguments)[1]


def first_step(
  command: list[str], workdir: pathlib.Path, *, end: bool = False
) -> tuple[float, Ended]:
  """Runs train.py to its first step, or to its `end`.

  Returns the seconds from its start until it has printed its first step, and how it ended.
  """
  seconds, ended = _watch((*command, f"--workdir={workdir}"), "step ", end)
  if seconds is None:
    raise RuntimeError(f"{command} printed no step")
  return seconds, ended


def _watch(
  arguments: Sequence[str], until: str = "", end: bool = True
) -> tuple[float | None, Ended]:
  """Runs a Python process until it prints a line that begins so, or to its end.

  Returns the seconds until that line, None where there was none, and how the process ended.
  """
  start = time.perf_counter()
  child = subprocess.Popen(
    [sys.executable, *arguments], cwd=results.ROOT, stdout=subprocess.PIPE, text=True
  )
  seconds, lines = None, []
  for line in child.stdout:
    lines.append(line)
    if until and seconds is None and line.startswith(until):
      seconds = time.perf_counter() - start
      if not end:
        child.kill()
  child.stdout.close()
  _, status, usage = os.wait4(child.pid, 0)
  child.returncode = os.waitstatus_to_exitcode(status)  # wait4 has taken it from subprocess
  if child.returncode and end:
    raise subprocess.CalledProcessError(child.returncode, child.args, "".join(lines))
  scale = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
  memory = usage.ru_maxrss * scale / 2**20
  return seconds, Ended(time.perf_counter() - start, memory, "".join(lines))


def compile_seconds(name: str) -> float:
  """Returns the seconds to trace and compile a training step of configs/NAME.py, on one device.

  Nothing is allocated, so that the model may be larger than this machine.
  """
  import jax
  import numpy as np

  from moe_jax import sharding
  from moe_jax.config import override
  from moe_jax.data import pipeline
  from moe_jax.moe import validation
  from moe_jax.start import command_line, startup
  from moe_jax.training import setup as setup_lib
  from moe_jax.training.step import compile_step

  startup.start()
  jax.config.update("jax_enable_compilation_cache", False)
  config = command_line.load_file(f"configs/{name}.py")
  config = override(config, {f"mesh.{axis}": 1 for axis in sharding.AXES})
  config = validation.resolve_mesh(config, 1)
  mesh = sharding.make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    start = time.perf_counter()
    setup = setup_lib.make(config, mesh)
    tokens_BL = jax.ShapeDtypeStruct((config.data.batch_size, config.data.seq_len), np.int32)
    batch = pipeline.Batch(*[tokens_BL] * len(pipeline.Batch._fields))
    compile_step(setup).lower(setup.shapes, batch).compile()
    return time.perf_counter() - start


def text(result: dict[str, Any]) -> str:
  """Formats the table."""
  return results.target_table(result["targets"])


def _median(rounds: int, *arguments: str) -> float:
  seconds = statistics.median(process(*arguments).seconds for _ in range(rounds))
  progress(f"{' '.join(arguments)}: {seconds:.2f} s")
  return seconds
