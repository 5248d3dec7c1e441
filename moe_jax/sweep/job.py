"""Runs on this machine: each is a process of train.py, and then one of eval.py, in a slot.

Both write to the workdir's log.txt.
"""

import datetime
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

from moe_jax.errors import StorageError, UserError
from moe_jax.report import reading
from moe_jax.storage import files
from moe_jax.storage import workdir as workdir_lib
from moe_jax.sweep.plan import PlannedRun
from moe_jax.sweep.slots import MachineSlots


class Ended(NamedTuple):
  """How a run has ended."""

  status: str  # finished, stopped, failed
  lines: list[str]  # that say why
  code: int | None = None  # of its process, minus the number of a signal that ended it


class Job:
  """The processes of a run, in a slot of the machine."""

  status = "running"

  def __init__(self, run: PlannedRun, slot: int, out: pathlib.Path, slots: MachineSlots):
    """Starts train.py in slot number `slot`; raises a StorageError if it cannot write its log."""
    self.run, self.slot, self._slots = run, slot, slots
    self.started = time.monotonic()
    self.workdir = out / run.workdir
    self.evaluating = False
    self._path = self.workdir / workdir_lib.LOG
    with files.storage_errors(self._path):
      self.workdir.mkdir(parents=True, exist_ok=True)
      flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
      self.log = os.fdopen(os.open(self._path, flags, 0o666), "a+b", buffering=0)
    self._begin = self.log.seek(0, os.SEEK_END)
    try:
      self._start(run.command)
    except BaseException:
      self.log.close()
      raise

  def _start(self, command: str) -> None:
    with files.storage_errors(self._path):
      self.log.write(f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S} $ {command}\n".encode())
    # In a new session, so that Ctrl-C in the terminal reaches only the sweep, which stops its runs
    # once.
    self.process = self._slots.start(
      [sys.executable, *shlex.split(command)[1:]],
      self.slot,
      stdin=subprocess.DEVNULL,
      stdout=self.log,
      stderr=subprocess.STDOUT,
      start_new_session=True,
    )

  @property
  def seconds(self) -> float:
    """Seconds since the start."""
    return time.monotonic() - self.started

  def tail(self) -> list[str]:
    """Returns the last lines of the log that this job has written."""
    return reading.tail(self.log, self._begin)

  def poll(self, goes_on: bool) -> Ended | None:
    """Returns how the run has ended, None if it has not; a trained one starts to evaluate.

    Raises a StorageError if it is to evaluate, as long as the sweep `goes_on`, and cannot write.
    """
    code = self.process.poll()
    if code is None:
      return None
    trained = code == 0 and workdir_lib.is_trained(self.workdir, self.run.config.train.steps)
    if trained and not self.evaluating and goes_on:
      self.evaluating = True
      self._start(self.run.evaluate)
      return None
    tail = self.tail()
    self.log.close()
    if code == 0 and self.evaluating:
      return evaluated(self.workdir, tail)
    if code in (0, StorageError.code):  # train.py saves and ends with 0 after a signal to stop
      return Ended("stopped", tail, code)
    if code < 0:
      memory = "; the system does this when memory is full" if -code == signal.SIGKILL else ""
      tail.append(f"ended by signal {-code} ({signal.strsignal(-code)}){memory}")
    return Ended("failed", tail, code)

  def where(self) -> str:
    """Describes the job's progress in a few words."""
    return f"{self.run.workdir} {'evaluating' if self.evaluating else progress(self.tail())}"


def evaluated(workdir: pathlib.Path, tail: list[str]) -> Ended:
  """Returns the end of a run whose eval.py has ended with 0."""
  try:
    loss = workdir_lib.read_object(workdir / workdir_lib.EVAL).get("loss")
  except UserError as error:
    return Ended("failed", [*tail, str(error)], 0)
  return Ended("finished", [f"loss {loss:.4f}" if isinstance(loss, float) else ""], 0)


def progress(log: list[str]) -> str:
  """Returns what the last lines of a training's log say of its progress."""
  for line in reversed(log):
    if match := re.match(r"step +(\d+/\d+) .*?(ETA \S+)?$", line):
      return " ".join(filter(None, ("step", *match.groups())))
  return "starting"


class Machine:
  """Starts runs on this machine, `number` at a time."""

  def __init__(self, out: pathlib.Path, number: int):
    self.number = number
    self._out, self._slots = out, MachineSlots(number)

  def room(self, running: Sequence[Job]) -> int:
    """Returns how many runs to start at once."""
    return min(1, self.number - len(running))

  def start(self, runs: list[PlannedRun], running: Sequence[Job]) -> list[Job]:
    """Starts runs beside those that run; raises an OSError or StorageError if it cannot."""
    free = sorted(set(range(self.number)) - {job.slot for job in running})
    return [Job(run, slot, self._out, self._slots) for run, slot in zip(runs, free, strict=False)]

  def has(self, run: PlannedRun) -> bool:
    """Returns whether a scheduler has the run of an earlier sweep; a machine has none."""
    return False

  def stop(self, running: list[Job], times: int) -> str:
    """Asks all runs to stop, the third time at once; returns what to say."""
    for job in running:
      job.process.terminate() if times <= 2 else job.process.kill()
    how = "interrupt again to stop without saving" if times == 1 else "not waiting for them"
    return f"stopping {len(running)} run(s), which save first; {how}"
