"""Trains in child processes and kills them: python -m tests.support.kill_worker FOLDER SEED KILLS

FOLDER/whole/run is trained by one child, FOLDER/killed/run by several of which KILLS are killed. A
child is a fork of this process, which has imported everything, so a start takes little time. Each
of the first KILLS children is killed with SIGKILL at a random moment after some steps; the last one
trains to the end. Prints the number of the steps that were taken when each child was killed.
"""

import contextlib
import os
import pathlib
import random
import signal
import sys
import time

from moe_jax.config import override
from moe_jax.start import command_line
from moe_jax.storage import workdir
from moe_jax.training import run, setup

OVERRIDES = {
  "train.steps": 60, "train.eval_every": 25, "train.checkpoint_every": 3, "train.log_every": 1,
  "model.moe.jitter": 0.1, "model.moe.bias_update_rate": 0.001, "eval.batches": 1,
  "health.on_alarm": "off",
}  # fmt: skip


def main() -> None:
  folder, seed, kills = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
  for name, number in (("whole", 0), ("killed", kills)):
    (folder / name).mkdir()
    train(folder / name / "run", random.Random(seed), number)


def train(path: pathlib.Path, rng: random.Random, kills: int) -> None:
  config = override(command_line.load_file("configs/debug.py"), OVERRIDES, "")
  for number in range(kills + 1):
    child = os.fork()
    if not child:
      log = (path.parent / f"child{number}.log").open("w", buffering=1)
      with log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        run.run(setup.prepare(config), str(path))
      os._exit(0)
    if number < kills:
      wait_for_steps(path, child, rng.randrange(2, 12))
      time.sleep(rng.uniform(0, 0.1))
      os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    print(newest(path), os.waitstatus_to_exitcode(status), flush=True)


def wait_for_steps(path: pathlib.Path, child: int, steps: int) -> None:
  """Returns when the child has logged so many new steps, or has ended."""
  begin = newest(path)
  while newest(path) < begin + steps:
    time.sleep(0.002)
    begin = min(begin, newest(path))  # it deletes the lines that it writes again
    if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
      return


def newest(path: pathlib.Path) -> int:
  lines = workdir.read_lines(path / workdir.METRICS)
  return lines[-1]["step"] if lines else 0


if __name__ == "__main__":
  main()
