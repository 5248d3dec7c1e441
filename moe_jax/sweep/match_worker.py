"""Times training steps to match two models by wall-clock: a job on stdin, its answer on stdout.

Only matching.py starts it, as a process of its own: planning imports no trainer, and afterwards the
accelerator is free for the runs.
"""

import json
import sys
from typing import Any

import jax

from moe_jax import command_line, startup, validation
from moe_jax import config as config_lib
from moe_jax.sweep import matching
from moe_jax.training import timing


def measure(job: dict[str, Any]) -> dict[str, Any]:
  """{"width", "times", "device"} of a job of matching.py, in real training steps."""

  def trainer(config: config_lib.Config) -> timing.Trainer:
    worker = timing.Trainer(validation.resolve_mesh(config, jax.device_count()), bare=False)
    worker.measure(timing.WARMUP_STEPS)
    return worker

  reference, twin = (config_lib.from_json(job[name]) for name in ("reference", "twin"))
  startup.start(reference.data)
  opponent = trainer(reference)

  def time_of(width: int) -> matching.Times:
    candidate = trainer(command_line.override(twin, {job["field"]: width}, "match"))
    thunks = {"reference": lambda: opponent.measure(1), "twin": lambda: candidate.measure(1)}
    taken = timing.in_turns(thunks, matching.ROUNDS, matching.ROUND_SECONDS)
    seconds, twin_seconds = (timing.median(taken, name) for name in thunks)
    return matching.Times(seconds, twin_seconds, timing.ratio(taken, "twin", "reference"))

  width, times = matching.solve_by_time(time_of, job["start"], job["step"], job["tries"])
  device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
  return {"width": width, "times": list(times), "device": device}


if __name__ == "__main__":
  print(json.dumps(measure(json.load(sys.stdin))))
