"""Ends a run in which no step ends, since one process that waits for ever keeps a pod silent."""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator

import jax

from moe_jax.errors import HangError
from moe_jax.start import startup

_TICK = 1.0


class Watchdog:
  """Counts the seconds since the last step in a thread; that of a paused watchdog counts nothing.

  The main thread of a run that hangs waits for a device, for another process or for a file, and
  lets this one run. Where it does not, the watchdog of the process that waits for it ends both.
  """

  def __init__(self, timeout: int, start: int):
    """`timeout`: seconds, 0 for no limit; `start`: the number of steps that were taken before."""
    self._timeout, self._step = timeout, start
    self._waited, self._pauses = 0.0, 0
    self._closed = threading.Event()

  @contextlib.contextmanager
  def watching(self) -> Iterator[None]:
    """Watches while the body takes steps."""
    if self._timeout:
      threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
    try:
      yield
    finally:
      self._closed.set()

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Leaves the time of the body out, and begins anew after it."""
    self._pauses += 1
    try:
      yield
    finally:
      self._waited = 0.0
      self._pauses -= 1

  def ended(self, step: int) -> None:
    """Says that a step has ended."""
    self._step, self._waited = step, 0.0

  def _watch(self) -> None:
    while not self._closed.wait(_TICK):
      self._waited += 0.0 if self._pauses else _TICK  # no clock: a suspended process does not wait
      if self._waited > self._timeout:
        self._end()

  def _end(self) -> None:
    frame = sys._current_frames()[threading.main_thread().ident or 0]
    place = f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
    said = (
      f"error: step {self._step + 1} has not ended within config.train.step_timeout={self._timeout}"
      f" seconds; process {jax.process_index()} of {jax.process_count()} is in "
      f"{frame.f_code.co_qualname} ({place}); the same command goes on from the newest checkpoint, "
      "and a larger value waits longer\n"
    )
    with contextlib.suppress(OSError):
      os.set_blocking(2, False)  # nobody may read it
      os.write(2, said.encode())
    startup.let_others_speak()
    os._exit(HangError.code)
