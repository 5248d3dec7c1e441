"""A run's record in a tracker (wandb, trackio, mlflow), which a process of its own keeps.

So what such a library does to a process (threads, signal handlers, hooks at the end), how long it
waits for a network, and how it fails, is nothing to the training.
"""

import contextlib
import importlib.util
import json
import os
import pathlib
import queue
import subprocess
import sys
import threading
from typing import IO, Any

from moe_jax.errors import UserError, notice
from moe_jax.start import progress
from moe_jax.storage import workdir as workdir_lib

NAMES = ("wandb", "trackio", "mlflow")
VARIABLE = "MOE_JAX_TRACKER"  # the default of --tracker, which a sweep sets for its runs
_SECONDS = 60.0  # that the end of a run waits for what is not sent yet
_WAITING = 10_000  # messages that wait for a library; with more of them it counts as hung
_ROOT = str(pathlib.Path(__file__).parents[2])


def check(name: str) -> None:
  """Raises a UserError where the library of --tracker=NAME is not installed."""
  if name and importlib.util.find_spec(name) is None:
    raise UserError(f"--tracker={name}: it is not installed: pip install 'moe_jax[{name}]'")


class Tracker:
  """Passes messages on to a process of tracker_worker.py, and never waits for it before the end."""

  def __init__(self, name: str, workdir: pathlib.Path):
    """Begins the record of the run in `workdir`, or goes on with it."""
    self._name, self._process, self._over = name, None, False
    self._messages: queue.Queue[dict[str, Any] | None] = queue.Queue(_WAITING)
    path = os.pathsep.join(filter(None, (_ROOT, os.environ.get("PYTHONPATH"))))
    try:
      # Signals to the process group are not for it: it ends after the run's last message.
      self._process = subprocess.Popen(
        [sys.executable, "-P", "-m", "moe_jax.training.tracker_worker", name, str(workdir)],
        env=os.environ | {"PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=2,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        pipesize=2**20,  # what is in it is still logged after a SIGKILL
        text=True,
      )
    except OSError as error:
      return self._give_up(f"cannot start a process: {error.strerror}")
    pipe = self._process.stdin
    threading.Thread(target=self._pass_on, args=(pipe,), name="tracker", daemon=True).start()

  def log(self, step: int, scalars: dict[str, float]) -> None:
    """Adds numbers to the record."""
    self._put({"step": step, "scalars": scalars})

  def attach(self, step: int, images: list[pathlib.Path]) -> None:
    """Adds images under their names."""
    self._put({"step": step, "images": [str(image) for image in images]})

  def close(self) -> None:
    """Ends the record, as of a failure while an error is raised; waits for what is unsent."""
    self._put({"failed": sys.exc_info()[0] is not None})
    self._put(None)
    if self._process:
      try:
        with progress.waiting(f"{self._name} still has to send what was logged"):
          code = self._process.wait(_SECONDS)
      except subprocess.TimeoutExpired:
        return self._give_up(f"not done {_SECONDS:.0f} s after the run, and ended")
      if code not in (0, 1):  # after 1 it has said why
        self._give_up(f"its process has ended with code {code}")

  def _put(self, message: dict[str, Any] | None) -> None:
    try:
      if self._process and not self._over:
        self._messages.put_nowait(message)
    except queue.Full:
      self._give_up(f"takes nothing any more, and {_WAITING:,} messages wait for it")

  def _give_up(self, why: str) -> None:
    notice(f"--tracker={self._name} is off until the next start, and the run goes on: {why}")
    if self._process:
      self._process.kill()
      self._process.wait()
    self._process = None

  def _pass_on(self, pipe: IO[str]) -> None:
    """Writes the messages to the process, in a thread, because a pipe may be full."""
    with contextlib.suppress(OSError), pipe:  # the process has ended, and said why
      while (message := self._messages.get()) is not None:
        print(json.dumps(message), file=pipe, flush=True)
    self._over = True


def attach_plots(workdir: pathlib.Path, step: int) -> None:
  """Adds the plots of a workdir, of an evaluation, to the record of its run, if that has one."""
  if name := workdir_lib.read_object(workdir / workdir_lib.TRACKER).get("tracker"):
    tracker = Tracker(name, workdir)
    tracker.attach(step, sorted(workdir.glob("*.png")))
    tracker.close()
