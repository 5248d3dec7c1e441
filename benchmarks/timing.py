"""Compares the speed of functions by running them in turns.

Every round runs every function, so that a time at which the machine is slow affects all of them.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from moe_jax import sharding
from moe_jax.config import Config
from moe_jax.data import pipeline
from moe_jax.training import setup as setup_lib
from moe_jax.training.step import compile_step

WARMUP_STEPS = 2  # steps of a Trainer before all its steps take the same time
Times = dict[str, list[float]]  # {name of a function: seconds of one call, in each round}


def in_turns(thunks: dict[str, Callable[[], Any]], rounds: int, min_seconds: float) -> Times:
  """Returns the seconds that one call of each function took, in each round.

  Args:
    thunks: {name: function of no arguments that returns jax arrays}; each has been called before,
      so that nothing is compiled here.
    rounds: the number of rounds; with more of them the median varies less.
    min_seconds: a function is called repeatedly in a round, until about so much time has passed.
  """
  repeats = {}
  for name, thunk in thunks.items():
    repeats[name] = max(1, round(min_seconds / _seconds(thunk, 1)))
  times: Times = {name: [] for name in thunks}
  for _ in range(rounds):
    for name, thunk in thunks.items():
      times[name].append(_seconds(thunk, repeats[name]))
  return times


def _seconds(thunk: Callable[[], Any], repeats: int) -> float:
  """Returns the mean seconds of one call."""
  start = time.perf_counter()
  for _ in range(repeats):
    result = thunk()
    if jax.default_backend() == "cpu":  # a CPU could run several calls at the same time
      jax.block_until_ready(result)
  jax.block_until_ready(result)
  return (time.perf_counter() - start) / repeats


def median(times: Times, name: str) -> float:
  """Returns the median over the rounds of a function's seconds."""
  return float(np.median(times[name]))


def ratio(times: Times, name: str, base: str) -> float:
  """Returns the median over the rounds of a function's seconds over those of `base`."""
  return float(np.median(np.divide(times[name], times[base])))


class Trainer:
  """Trains on one batch of random tokens, to measure the time of a step."""

  def __init__(self, config: Config, bare: bool):
    """Makes the state, the batch and the compiled step.

    Args:
      config: with a resolved mesh.
      bare: whether the step computes no metric except the loss.
    """
    self.mesh = sharding.make_mesh(config.mesh)
    B, L = config.data.batch_size, config.data.seq_len
    rng = np.random.default_rng(config.train.seed)
    tokens = rng.integers(config.model.vocab_size, size=(B, L + 1), dtype=np.int32)
    positions_BL = np.tile(np.arange(L, dtype=np.int32), (B, 1))
    batch = pipeline.Batch(
      tokens_BL=tokens[:, :-1],
      targets_BL=tokens[:, 1:],
      segments_BL=np.ones_like(positions_BL),
      positions_BL=positions_BL,
    )
    with jax.set_mesh(self.mesh):
      self.batch = sharding.to_global(batch, self.mesh)
      setup = setup_lib.make(config, self.mesh)
      self.state = setup.init()
      self.step = compile_step(setup, only=("loss",) if bare else ())

  def measure(self, steps: int) -> dict[str, Any]:
    """Takes some steps. Returns seconds of a step, and loss and balance of the last one."""
    with jax.set_mesh(self.mesh):
      cpu, wall = time.process_time(), time.perf_counter()
      for _ in range(steps):
        self.state, metrics = self.step(self.state, self.batch)
        jax.block_until_ready((self.state, metrics))
      cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    took = {"cpu_s": cpu / steps, "wall_s": wall / steps, "loss": float(metrics["loss"])}
    for name in ("drop_fraction", "max_vio"):
      if f"{name}_Z" in metrics:
        took[name] = float(metrics[f"{name}_Z"].mean())
    return took
