"""Times in turns: every round runs every candidate, so a slow minute falls on all of them alike."""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

Times = dict[str, list[float]]  # seconds of one call in each round


def in_turns(thunks: dict[str, Callable[[], Any]], rounds: int, min_seconds: float) -> Times:
  """Seconds of one call of each thunk, by the clock, in each round.

  Args:
    thunks: return jax arrays; they have run once, so that nothing compiles here.
    rounds: more give a steadier median.
    min_seconds: a short thunk repeats until it has worked that long in a round.
  """
  repeats = {}
  for name, thunk in thunks.items():
    repeats[name] = max(1, round(min_seconds / _seconds(thunk, 1)))
  times: Times = {name: [] for name in thunks}
  for _ in range(rounds):
    for name, thunk in thunks.items():
      times[name].append(_seconds(thunk, repeats[name]))
  return times


def _seconds(thunk, repeats) -> float:
  start = time.perf_counter()
  for _ in range(repeats):
    result = thunk()
    if jax.default_backend() == "cpu":  # whose calls could run side by side
      jax.block_until_ready(result)
  jax.block_until_ready(result)
  return (time.perf_counter() - start) / repeats


def median(times: Times, name: str) -> float:
  return float(np.median(times[name]))


def ratio(times: Times, name: str, base: str) -> float:
  """The median over the rounds of time / time of `base` in the same round."""
  return float(np.median(np.divide(times[name], times[base])))
