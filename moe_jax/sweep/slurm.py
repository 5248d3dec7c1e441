"""Runs as tasks of a job array of Slurm, each the script launch/sweep.sbatch with a line of a file.

Plain sbatch and squeue: a run is a command that goes on by itself, and needs none of what submitit
adds, which are Python functions as jobs, and states from sacct, an accounting that not all have.
The jobs outlive the sweep: the next start finds them in the queue by their name.
"""

import datetime
import math
import pathlib
import secrets
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence

from moe_jax.errors import UserError, notice, shown
from moe_jax.report import reading
from moe_jax.storage import files
from moe_jax.sweep.job import Ended, evaluated, progress
from moe_jax.sweep.plan import PlannedRun

_SCRIPT = "launch/sweep.sbatch"
_DONE = "launch: done"  # the last line of a task that has trained and evaluated
_ASK_SECONDS = 5.0  # from one squeue to the next


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
    queue = self._slurm.queue()
    if self.run.workdir in queue:
      self._start = queue[self.run.workdir]
      return None
    tail = reading.log_tail(self.workdir, self._slurm.out).splitlines()
    if tail[-1:] == [_DONE]:
      return evaluated(self.workdir, tail)
    failed = bool(tail) and tail[-1].startswith("launch: ")
    return Ended("failed" if failed else "stopped", tail or ["Slurm has ended it"])

  def where(self) -> str:
    """Describes its progress in a few words."""
    tail = reading.log_tail(self.workdir, self._slurm.out).splitlines()
    return f"{self.run.workdir} {progress(tail)}"


class Slurm:
  """Submits runs, and asks the queue for them."""

  def __init__(self, out: pathlib.Path, slots: int):
    """`slots`: how many tasks of an array may run at a time, 0 for as many as Slurm will."""
    self.out, self.number = out.resolve(), slots or sys.maxsize
    self._slots, self._folder = slots, self.out / "slurm"
    self._asked = -math.inf  # the clock at the last squeue
    self._queue: dict[str, datetime.datetime | None] = {}
    self._arrays: dict[str, list[str]] = {}

  def has(self, run: PlannedRun) -> bool:
    """Returns whether a run is in the queue."""
    return run.workdir in self.queue()

  def room(self, running: Sequence[QueuedRun]) -> int:
    """Returns how many runs to submit at once."""
    return sys.maxsize

  def start(self, runs: list[PlannedRun], running: Sequence[QueuedRun]) -> list[QueuedRun]:
    """Submits those that are not in the queue; raises a UserError with what sbatch says."""
    if new := [run for run in runs if not self.has(run)]:
      with files.storage_errors(self._folder):
        self._folder.mkdir(exist_ok=True)
        name = f"{self.out.name}-{secrets.token_hex(4)}"
        path = self._folder / f"{name}.tsv"
        path.write_text("".join(self._line(run) for run in new))
      limit = f"%{self._slots}" if self._slots else ""
      _call("sbatch", f"--job-name={name}", f"--array=1-{len(new)}{limit}", _SCRIPT, str(path))
      self._asked = 0.0
    return [QueuedRun(run, self) for run in runs]

  def _line(self, run: PlannedRun) -> str:
    """Returns a line for the script: the run's workdir and its two commands."""
    commands = [
      shlex.join([sys.executable, *shlex.split(c)[1:]]) for c in (run.command, run.evaluate)
    ]
    return "\t".join([str(self.out / run.workdir), *commands]) + "\n"

  def stop(self, running: list[QueuedRun], times: int) -> str:
    """Leaves all runs to Slurm; returns what to say."""
    running.clear()
    names = ",".join(path.stem for path in self._folder.glob("*.tsv"))
    return f"the runs stay in Slurm's queue; `scancel --name={names}` ends them"

  def queue(self) -> dict[str, datetime.datetime | None]:
    """Returns {workdir: when the run was started, None if it waits} of what is in the queue."""
    if time.monotonic() - self._asked < _ASK_SECONDS:
      return self._queue
    try:
      said = _call("squeue", "--me", "--array", "--noheader", "--format=%j|%K|%T|%S")
    except UserError as error:
      if self._asked == -math.inf:
        raise
      notice(f"{error}; asking again")  # the controller may be restarting
    else:
      tasks = (line.rsplit("|", 3) for line in said.splitlines())  # a name may be anything
      self._queue = {
        self._workdirs(name)[int(index) - 1]: datetime.datetime.fromisoformat(start)
        if state in ("RUNNING", "COMPLETING")
        else None
        for name, index, state, start in tasks
        if self._workdirs(name)
      }
    self._asked = time.monotonic()
    return self._queue

  def _workdirs(self, name: str) -> list[str]:
    """Returns the workdirs of the tasks of an array, [] for one that is not of this sweep."""
    if name not in self._arrays:
      path = self._folder / f"{name}.tsv"
      lines = path.read_text().splitlines() if path.is_file() else []
      paths = [pathlib.Path(line.partition("\t")[0]) for line in lines]
      self._arrays[name] = [str(path.relative_to(self.out)) for path in paths]
    return self._arrays[name]


def _call(*command: str) -> str:
  """Returns what a command of Slurm prints; raises a UserError with what it says of a mistake."""
  try:
    done = subprocess.run(command, capture_output=True, text=True)
  except FileNotFoundError:
    raise UserError(
      f"--launcher=slurm: {command[0]} is not on this machine; start the sweep where Slurm is"
    ) from None
  if done.returncode:
    raise UserError(f"--launcher=slurm: {command[0]}: {shown(done.stderr)}")
  return done.stdout
