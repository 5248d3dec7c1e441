"""How long work shows that it goes on: one line with how far it is, how fast, and the time left.

On a terminal the line is written again in its place; elsewhere it is a line of its own every ten
seconds. Work that is shorter says nothing.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

from moe_jax.errors import notice, shown

SECONDS = 10.0  # between lines where they do not take each other's place
_SECONDS_ON_TERMINAL = 0.5
_CLEAR = "\r\x1b[K"


class Progress:
  """A line on stderr about work of a known size: "read 12.1 of 40.0 MB, 3.1 MB/s, ETA 0:00:09"."""

  def __init__(self, what: str, total: float, unit: str):
    """`total` and what is done are counted in `unit`: "documents"; those of "MB" in bytes."""
    self._what, self._total, self._unit = what, total, unit
    self._started = self._told = time.monotonic()
    self._first = 0.0  # what was done before

  def begin_at(self, done: float) -> None:
    """What was done before, and the time until now, counts for no rate."""
    self._first, self._started = done, time.monotonic()

  def at(self, done: float, more: str = "") -> None:
    """To be called often, with all that is done so far; `more` stands before the rate.

    When all is done, the line is taken off a terminal.
    """
    now = time.monotonic()
    pace = _SECONDS_ON_TERMINAL if sys.stderr.isatty() else SECONDS
    if done >= self._total:
      return _clear() if self._told > self._started else None
    if now - self._told < pace:
      return
    self._told = now
    rate = max(done - self._first, 1e-9) / (now - self._started)
    left = clock((self._total - done) / rate)
    far = f"{self._number(done)} of {self._number(self._total)} {self._unit}"
    speed = f"{self._number(rate)} {self._unit}/s"
    _show(f"{self._what} {far}, {more and more + ', '}{speed}, ETA {left}")

  def _number(self, value: float) -> str:
    if self._unit == "MB":
      return f"{value / 1e6:,.1f}"
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
  """Says every ten seconds for how long work of unknown size, as a compilation, goes on."""
  over, start = threading.Event(), time.monotonic()

  def tell() -> None:
    while not over.wait(SECONDS):
      _show(f"{what}: {clock(time.monotonic() - start)} so far")

  thread = threading.Thread(target=tell, daemon=True)
  thread.start()
  try:
    yield
  finally:
    over.set()
    thread.join()
    if time.monotonic() - start > SECONDS:
      _clear()


def _show(line: str) -> None:
  if sys.stderr.isatty():
    print(_CLEAR + shown(line)[:120], end="", file=sys.stderr, flush=True)
  else:
    notice(line)


def _clear() -> None:
  if sys.stderr.isatty():
    print(_CLEAR, end="", file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
  """3661.2 -> '1:01:01'."""
  seconds = round(seconds)
  return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
