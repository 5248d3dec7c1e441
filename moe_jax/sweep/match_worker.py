"""Times training steps to match two models by wall-clock: a job on stdin, its answer on stdout.

Only matching.py starts this module, as a separate process, so that planning imports no trainer and
the accelerator is free for the runs afterwards.
"""

import json
import sys
from typing import Any

import jax

from moe_jax import command_line, startup, validation
from moe_jax import config as config_lib
from moe_jax.sweep import matching
from moe_jax.training import timing


def run_job(job: dict[str, Any]) -> dict[str, Any]:
  """Returns {"width", "times", "device"} for a job of matching.py, measured in training steps."""

  def trainer(config: config_lib.Config) -> timing.Trainer:
    worker = timing.Trainer(validation.resolve_mesh(config, jax.device_count()), bare=False)
    worker.measure(timing.WARMUP_STEPS)
    return worker

  reference, twin = (config_lib.from_json(job[name]) for name in ("reference", "twin"))
  startup.start()
  opponent = trainer(reference)

  def measure_width(width: int) -> matching.StepTimes:
    candidate = trainer(command_line.override(twin, {job["field"]: width}, "match"))
    thunks = {"reference": lambda: opponent.measure(1), "twin": lambda: candidate.measure(1)}
    times = timing.in_turns(thunks, matching.ROUNDS, matching.ROUND_SECONDS)
    return matching.StepTimes(
      reference=timing.median(times, "reference"),
      twin=timing.median(times, "twin"),
      ratio=timing.ratio(times, "twin", "reference"),
    )

  width, times = matching.solve_by_time(measure_width, job["start"], job["step"], job["tries"])
  device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
  return {"width": width, "times": list(times), "device": device}


if __name__ == "__main__":
  print(json.dumps(run_job(json.load(sys.stdin))))
