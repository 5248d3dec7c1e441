"""Runs as tasks of a job array of Slurm, each the script launch/sweep.sbatch with a line of a file.

Plain sbatch and squeue: a run is a command that goes on by itself, and needs none of what submitit
adds, which are Python functions as jobs, and states from sacct, an accounting that not all have.
The jobs outlive the sweep: the next start finds them in the queue by their name.
"""

import datetime
import math
import os
import pathlib
import secrets
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

from moe_jax.errors import UserError, notice, shown
from moe_jax.report import reading
from moe_jax.storage import files
from moe_jax.storage import workdir as workdir_lib
from moe_jax.sweep.job import Ended, evaluated, progress
from moe_jax.sweep.plan import PlannedRun

_SCRIPT = "launch/sweep.sbatch"
# How the script ends a log.
_DONE, _GIVEN_UP = f"{reading.LAUNCH}done", f"{reading.LAUNCH}not queued again"
_ASK_SECONDS = 5.0  # from one squeue to the next


class _Task(NamedTuple):
  """A task in the queue."""

  line: str  # of the array's file
  array: str  # its name
  start: datetime.datetime | None = None  # None while it waits


class QueuedRun:
  """A run that waits in the queue of Slurm, or runs."""

  def __init__(self, run: PlannedRun, slurm: "Slurm"):
    self.run, self._slurm = run, slurm
    self.workdir = slurm.out / run.workdir
    self._start: datetime.datetime | None = None  # the last one; None while it waits

  @property
  def status(self) -> str:
    """Returns "waiting" or "running", as of the last poll."""
    return "running" if self._start else "waiting"

  @property
  def seconds(self) -> float:
    """Seconds since Slurm has started it."""
    return (datetime.datetime.now() - self._start).total_seconds() if self._start else 0.0

  def poll(self, goes_on: bool) -> Ended | None:
    """Returns how the run has ended, None while it is in the queue."""
    if task := self._slurm.queue().get(self.run.workdir):
      self._start = task.start
      return None
    log = reading.log_tail(self.workdir, self._slurm.out).splitlines()
    last = log[-1] if log else ""
    said = [line for line in log if not line.startswith(reading.LAUNCH)]
    if last == _DONE and workdir_lib.is_trained(self.workdir, self.run.config.train.steps):
      return evaluated(self.workdir, said)
    status = "failed" if last.startswith(_GIVEN_UP) else "stopped"
    return Ended(status, said or ["Slurm has ended it"])

  def where(self) -> str:
    """Describes its progress in a few words."""
    log = reading.log_tail(self.workdir, self._slurm.out).splitlines()
    return f"{self.run.workdir} {progress(log)}"


class Slurm:
  """Submits runs, and asks the queue for them."""

  def __init__(self, out: pathlib.Path, slots: int):
    """`slots`: how many tasks of an array may run at a time, 0 for as many as Slurm will."""
    self.out, self.number = out.resolve(), slots or sys.maxsize
    self._slots, self._folder = slots, self.out / "slurm"
    self._asked = -math.inf  # the clock at the last squeue
    self._queue: dict[str, _Task] = {}
    self._files: dict[str, list[str]] = {}

  def has(self, run: PlannedRun) -> bool:
    """Returns whether a run is in the queue."""
    return run.workdir in self.queue()

  def room(self, running: Sequence[QueuedRun]) -> int:
    """Returns how many runs to submit at once."""
    return sys.maxsize

  def start(self, runs: list[PlannedRun], running: Sequence[QueuedRun]) -> list[QueuedRun]:
    """Submits those that are not in the queue.

    Raises a UserError with what sbatch says, or where a run is queued with another command.
    """
    for run in runs:
      if self.has(run) and (task := self._queue[run.workdir]).line != _line(run):
        raise UserError(
          f"--launcher=slurm: {run.workdir} is in the queue with another command; wait for it, or "
          f"end it by `{_cancel(task.array)}`"
        )
    if new := [run for run in runs if not self.has(run)]:
      with files.storage_errors(self._folder):
        self._folder.mkdir(exist_ok=True)
        name = f"{self.out.name}-{secrets.token_hex(4)}"
        path = self._folder / f"{name}.tsv"
        path.write_text("".join(_line(run) + "\n" for run in new))
      limit = f"%{self._slots}" if self._slots else ""
      _call("sbatch", f"--job-name={name}", f"--array=1-{len(new)}{limit}", _SCRIPT, str(path))
      self._queue |= {run.workdir: _Task(_line(run), name) for run in new}
    return [QueuedRun(run, self) for run in runs]

  def stop(self, running: list[QueuedRun], times: int) -> str:
    """Leaves all runs to Slurm; returns what to say."""
    running.clear()
    ends = "; ".join(map(_cancel, sorted({task.array for task in self._queue.values()})))
    return f"the runs stay in Slurm's queue; `{ends}` ends them"

  def queue(self) -> dict[str, _Task]:
    """Returns {workdir: task} of the runs that wait or run, asked for every few seconds."""
    if time.monotonic() - self._asked < _ASK_SECONDS:
      return self._queue
    try:
      said = _call("squeue", "--me", "--array", "--noheader", "--format=%j|%K|%T|%S")
    except UserError as error:
      if self._asked == -math.inf:
        raise
      notice(f"{error}; asking again")  # the controller may be restarting
    else:
      self._queue = {}
      for entry in said.splitlines():
        name, index, state, start = entry.rsplit("|", 3)  # a name may be anything
        if lines := self._lines(name):
          line = lines[int(index) - 1]
          began = state in ("RUNNING", "COMPLETING", "SUSPENDED")
          began_at = datetime.datetime.fromisoformat(start) if began else None
          self._queue[line.partition("\t")[0]] = _Task(line, name, began_at)
    self._asked = time.monotonic()
    return self._queue

  def _lines(self, name: str) -> list[str]:
    """Returns the lines of an array's file, [] for an array that is not of this sweep."""
    if name not in self._files:
      path = self._folder / f"{name}.tsv"
      self._files[name] = path.read_text().splitlines() if path.is_file() else []
    return self._files[name]


def _line(run: PlannedRun) -> str:
  """Returns a line for the script: the workdir in the sweep, and the words of both commands."""
  words = [command.partition(" ")[2] for command in (run.command, run.evaluate)]  # not `python`
  return "\t".join([run.workdir, *words])


def _cancel(array: str) -> str:
  return f"scancel --name={shlex.quote(array)}"


def _call(*command: str) -> str:
  """Returns what a command of Slurm prints; raises a UserError with what it says of a mistake."""
  env = {name: value for name, value in os.environ.items() if not name.startswith("SQUEUE_")}
  env["SLURM_TIME_FORMAT"] = "standard"
  try:
    done = subprocess.run(command, capture_output=True, text=True, env=env)
  except FileNotFoundError:
    raise UserError(
      f"--launcher=slurm: {command[0]} is not on this machine; start the sweep where Slurm is"
    ) from None
  if done.returncode:
    raise UserError(f"--launcher=slurm: {command[0]}: {shown(done.stderr)}")
  return done.stdout
