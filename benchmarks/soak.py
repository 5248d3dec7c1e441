"""Trains for a long time, whole and with kills: what is lost, what grows, how long a save stops it.

The first half of the time a run is left alone and then asked to stop. In the second half a run of
as many steps is killed again and again. Both have to end with the same arrays, bit for bit.
"""

import json
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from typing import Any, NamedTuple

from benchmarks import results
from benchmarks.results import progress
from moe_jax.storage import workdir as workdir_lib

_STEPS = 10**8  # more than the time allows
# A constant rate, so that the number of steps changes nothing.
_FIELDS = {
  "optimizer.schedule": "constant",
  "train.log_every": 10,
  "train.eval_every": 500,
  "train.checkpoint_every": 50,
  "health.on_alarm": "off",
}


class Trainer:
  """train.py in a process of its own."""

  def __init__(self, config: str, workdir: pathlib.Path, steps: int, overrides: dict[str, Any]):
    fields = _FIELDS | {"train.steps": steps} | overrides
    command = [sys.executable, "train.py", f"--config={config}", f"--workdir={workdir}"]
    command += [f"--config.{name}={value}" for name, value in fields.items()]
    self._workdir = workdir
    self._log = (workdir.parent / f"{workdir.name}.log").open("a")
    self.process = subprocess.Popen(
      command, cwd=results.ROOT, stdout=self._log, stderr=subprocess.STDOUT
    )

  def logged(self) -> int:
    """Returns the newest step that is logged."""
    lines = workdir_lib.read_lines(self._workdir / workdir_lib.METRICS)
    return lines[-1]["step"] if lines else 0

  def memory(self) -> float:
    """Returns the bytes of memory that the process holds now."""
    try:
      status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
    except OSError:
      return 0.0
    found = re.search(r"VmRSS:\s+(\d+)", status)
    return 1024.0 * int(found[1]) if found else 0.0

  def end(self, number: int) -> None:
    """Sends a signal and waits for the end."""
    self.process.send_signal(number)
    self.wait()

  def wait(self) -> None:
    """Waits for the end; raises RuntimeError where it is an error."""
    code = self.process.wait()
    self._log.close()
    if code not in (0, -signal.SIGKILL):
      raise RuntimeError(f"train.py ended with {code}; see {self._log.name}")


class Whole(NamedTuple):
  """The run that is left alone."""

  steps: int
  growth: float  # of memory, from the first third of the time to the last, as a share
  stall: float  # seconds for which saves stop the training, as a share of its time
  saves: int


class Killed(NamedTuple):
  """The run that is killed."""

  lost: list[int]  # steps that each kill made the run take again
  down: list[float]  # seconds from each start to the first new step


def leave_alone(config: str, workdir: pathlib.Path, seconds: float, overrides: Any) -> Whole:
  """Trains for so many seconds after the first step."""
  trainer = Trainer(config, workdir, _STEPS, overrides)
  _wait_for(trainer, 1)
  begin, memory = time.monotonic(), []
  while time.monotonic() - begin < seconds:
    time.sleep(min(seconds / 60, 5))
    memory.append(trainer.memory())
  trainer.end(signal.SIGTERM)
  third = max(len(memory) // 3, 1)
  # The first third holds the first evaluation and the first saves, which allocate what stays.
  middle, last = memory[third : 2 * third], memory[-third:]
  (newest,) = [
    line
    for line in reversed(workdir_lib.read_lines(workdir / workdir_lib.METRICS))
    if "train/seconds" in line
  ][:1]
  steps = workdir_lib.saved_steps(workdir)[-1]
  return Whole(
    steps=steps,
    growth=_mean(last) / _mean(middle) - 1,
    stall=newest["train/save_seconds"] / newest["train/seconds"],
    saves=steps // overrides.get("train.checkpoint_every", _FIELDS["train.checkpoint_every"]),
  )


def kill(config: str, workdir: pathlib.Path, steps: int, every: float, overrides: Any) -> Killed:
  """Trains so many steps, with a SIGKILL each `every` seconds after the first new step."""
  lost, down = [], []
  while True:
    begin = time.monotonic()
    trainer = Trainer(config, workdir, steps, overrides)
    saved = max([0, *workdir_lib.saved_steps(workdir)])
    _wait_for(trainer, saved + 1)
    down.append(time.monotonic() - begin)
    try:
      trainer.process.wait(every)
      trainer.wait()
      return Killed(lost, down)
    except subprocess.TimeoutExpired:
      trainer.end(signal.SIGKILL)
    newest, saved = trainer.logged(), max([0, *workdir_lib.saved_steps(workdir)])
    lost.append(max(newest - saved, 0))
    progress(f"killed at step {newest} of {steps}, {lost[-1]} steps after its checkpoint")


def run(
  config: str, out: pathlib.Path, minutes: float, every: float, overrides: dict[str, Any]
) -> dict[str, Any]:
  """Returns the numbers of both runs and the targets; their workdirs are below `out`."""
  folder = out / "soak"
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir(parents=True)
  progress(f"a run that is left alone, {minutes / 2:.1f} minutes")
  whole = leave_alone(config, folder / "whole", 30 * minutes, overrides)
  progress(f"{whole.steps} steps; the same with a SIGKILL every {every:.0f} s")
  killed = kill(config, folder / "killed", whole.steps, every, overrides)
  equal = _arrays(folder / "whole", whole.steps) == _arrays(folder / "killed", whole.steps)
  return {
    "config": config,
    "minutes": minutes,
    "kill_every": every,
    "steps": whole.steps,
    "saves": whole.saves,
    "kills": len(killed.lost),
    "steps_lost": killed.lost,
    "seconds_to_first_step": killed.down,
    "targets": [
      results.target("arrays that differ after the kills", 0.0 if equal else 1.0, 0.0),
      results.target("growth of memory, %", 100 * whole.growth, 1.0),
      results.target("time for which saves stop the training, %", 100 * whole.stall, 2.0),
    ],
  }


def text(result: dict[str, Any]) -> str:
  """Formats the result."""
  lost, down = result["steps_lost"], result["seconds_to_first_step"]
  lines = [
    f"steps              {result['steps']:,}, {result['saves']} saves of the run left alone",
    f"kills              {result['kills']}, each lost {_mean(lost):.0f} steps (at most "
    f"{max(lost, default=0)})",
    f"from start to step {_mean(down):.1f} s",
    "",
    results.target_table(result["targets"]),
  ]
  return "\n".join(lines)


def _wait_for(trainer: Trainer, step: int) -> None:
  while trainer.logged() < step and trainer.process.poll() is None:
    time.sleep(0.05)


def _mean(values: list[Any]) -> float:
  return sum(values) / max(len(values), 1)


def _arrays(workdir: pathlib.Path, step: int) -> dict[str, str]:
  path = workdir / workdir_lib.CHECKPOINTS / str(step) / "about/metadata"
  return json.loads(path.read_text())["about"]["arrays"]
