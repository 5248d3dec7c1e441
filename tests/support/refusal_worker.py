"""One of two processes that try what is refused: refusal_worker.py FOLDER --multihost.

Each refusal becomes a line, as at the end of a script, and the next is tried; then an alarm ends
both. FOLDER/odd is a run whose batch does not split over two processes. --bug: process 1 fails.
"""

import sys

import jax
from jax.experimental import multihost_utils

from moe_jax.config import override
from moe_jax.errors import UserError
from moe_jax.start import command_line, startup


def main(folder: str) -> None:
  def config(**fields):
    base = command_line.load_file("configs/debug.py")
    return override(base, {"train.log_every": 1} | fields, "")

  tensor = {"mesh.tensor": 2, "model.num_kv_heads": 2}
  alarm = {"drop_fraction": 0.01, "patience": 3, "on_alarm": "stop"}
  alarm = {f"health.{name}": value for name, value in alarm.items()} | {"mesh.expert": 2}
  with startup.together(True, 10, config(), saves=True):
    if "--bug" in sys.argv:
      multihost_utils.process_allgather(1 // (1 - jax.process_index()))
    from moe_jax.analysis import evaluation
    from moe_jax.training import run, setup

    for refused in (
      lambda: run.run(setup.prepare(config(**tensor)), f"{folder}/tensor"),
      lambda: evaluation.evaluate_run(f"{folder}/odd", 0, "validation"),
    ):
      try:
        refused()
      except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    run.run(setup.prepare(config(**alarm)), f"{folder}/alarm")


if __name__ == "__main__":
  main(sys.argv[1])
