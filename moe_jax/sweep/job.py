"""A run that is being trained or evaluated: a process of train.py, and then one of eval.py.

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

from moe_jax.errors import StorageError, UserError
from moe_jax.report import reading
from moe_jax.storage import files
from moe_jax.storage import workdir as workdir_lib
from moe_jax.sweep.plan import PlannedRun
from moe_jax.sweep.slots import MachineSlots


class Job:
  """The processes of a run, in a slot of the machine."""

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

  def evaluate(self) -> None:
    """Starts eval.py; raises a StorageError if the log cannot be written."""
    self.evaluating = True
    self._start(self.run.evaluate)

  @property
  def seconds(self) -> float:
    """Seconds since the start."""
    return time.monotonic() - self.started

  def tail(self) -> list[str]:
    """Returns the last lines of the log that this job has written."""
    return reading.tail(self.log, self._begin)

  def result(self, code: int) -> tuple[str, list[str]]:
    """Returns the status of the run, and the lines that say why, after its process has ended.

    `code` is minus the number of a signal that ended it.
    """
    tail = self.tail()
    if code == 0 and self.evaluating:
      try:
        loss = workdir_lib.read_object(self.workdir / workdir_lib.EVAL).get("loss")
      except UserError as error:
        return "failed", [*tail, str(error)]
      return "finished", [f"loss {loss:.4f}" if isinstance(loss, float) else ""]
    if code in (0, StorageError.code):  # train.py saves and ends with 0 after a signal to stop
      return "stopped", tail
    if code < 0:
      memory = "; the system does this when memory is full" if -code == signal.SIGKILL else ""
      tail.append(f"ended by signal {-code} ({signal.strsignal(-code)}){memory}")
    return "failed", tail

  def where(self) -> str:
    """Describes the job's progress in a few words."""
    if self.evaluating:
      return f"{self.run.workdir} evaluating"
    for line in reversed(self.tail()):
      if match := re.match(r"step +(\d+/\d+) .*?(ETA \S+)?$", line):
        return " ".join(filter(None, (self.run.workdir, "step", *match.groups())))
    return f"{self.run.workdir} starting"
