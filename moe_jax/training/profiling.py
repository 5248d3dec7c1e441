"""A trace of some training steps, which TensorBoard and XProf show."""

import pathlib
import re
import time
from typing import Any, NamedTuple

import jax

from moe_jax.errors import UserError
from moe_jax.storage import files
from moe_jax.storage import workdir as workdir_lib


class Window(NamedTuple):
  """The steps to trace, both ends included."""

  first: int
  last: int


def parse(text: str, steps: int) -> Window | None:
  """Returns the steps of --profile=FIRST:LAST; None of an empty text.

  Args:
    text: the value of the flag.
    steps: the number of the run's last step.

  Raises:
    UserError: the text is not two step numbers in order, or the run has no such steps.
  """
  if not text:
    return None
  numbers = re.fullmatch(r"([0-9]+):([0-9]+)", text)
  if not numbers:
    raise UserError(f"--profile={text}: write --profile=FIRST:LAST, two step numbers such as 10:13")
  window = Window(int(numbers[1]), int(numbers[2]))
  if not 1 <= window.first <= window.last <= steps:
    raise UserError(
      f"--profile={text}: name the first and the last step to trace, in this order, out of the "
      f"run's steps 1 to {steps} (config.train.steps={steps})"
    )
  return window


class Profiler:
  """Traces the steps of a window into WORKDIR/profile. Only the first process traces."""

  def __init__(self, window: Window | None, workdir: pathlib.Path, start: int):
    """Says so if the run, which goes on from step `start`, has already taken some of the steps."""
    self._folder = workdir / workdir_lib.PROFILE
    self._tracing = False
    self._window = window if jax.process_index() == 0 else None
    if self._window and start >= self._window.first:
      first, last = self._window
      left = f"traces the steps {start + 1} to {last}" if start < last else "traces nothing"
      print(f"--profile={first}:{last}: the run is already at step {start}, so this {left}")
      self._window = Window(start + 1, last)

  def before(self, step: int, state: Any) -> None:
    """Begins the trace if `step` is the first to trace; `state` is what the step starts from."""
    if self._window and step == self._window.first <= self._window.last:
      jax.block_until_ready(state)  # otherwise the trace would hold the end of earlier steps
      jax.profiler.start_trace(str(files.growing(self._folder)))
      self._tracing = True

  def after(self, step: int, state: Any) -> float:
    """Ends the trace if `step` is the last to trace; `state` is what the step results in.

    Returns:
      The seconds that it took to write the trace; they are no part of the training.
    """
    if not self._tracing or not self._window or step != self._window.last:
      return 0.0
    jax.block_until_ready(state)
    begin = time.perf_counter()
    self.close()
    return time.perf_counter() - begin

  def close(self) -> None:
    """Writes the trace, also of a run that ends within the window."""
    if self._tracing:
      self._tracing = False
      jax.profiler.stop_trace()
      files.flush()
      print(f"trace written; to see it: pip install xprof, then xprof --logdir={self._folder}")
