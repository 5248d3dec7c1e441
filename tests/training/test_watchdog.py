"""A run that hangs ends with code 7 and a line; one that only does long things does not."""

import re
import signal

import pytest

from moe_jax.errors import HangError
from tests.support.processes import Together, stop_main_thread, train_command
from tests.support.scripts import command, python

LONG = [f"--config.train.{name}=100000" for name in ("steps", "eval_every", "checkpoint_every")]
LINE = re.compile(
  r"error: step (\d+) has not ended within config\.train\.step_timeout=(\d+) seconds; process (\d) "
  r"of (\d) is in \S+ \(\w+\.py:\d+\); the same command goes on from the newest checkpoint"
)


FULL = """
import os, time
from moe_jax.training.watchdog import Watchdog
os.dup2(os.pipe()[1], 2)
os.set_blocking(2, False)
try:
  while True:
    os.write(2, bytes(4096))
except BlockingIOError:
  os.set_blocking(2, True)
with Watchdog(1, 0).watching():
  time.sleep(100)
"""


def test_a_run_whose_errors_nobody_reads_ends_too():
  assert python("-c", FULL).returncode == HangError.code


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
def test_two_processes_end_when_the_main_thread_of_one_is_stopped(index, tmp_path, cache):
  """jax's heartbeat has a thread of its own and notices nothing.

  The line is of the stopped process or, where that was stopped with Python's lock, of the one that
  waits for it. jax ends the other.
  """
  options = [*LONG, "--config.train.step_timeout=5", "--heartbeat_timeout=10"]
  with Together(train_command(tmp_path / "run", cache, *options)) as two:
    two.until("step      3/")
    stop_main_thread(two.processes[index].pid)
    said = [process.communicate(timeout=120)[1] for process in two.processes]
  codes = {process.returncode for process in two.processes}
  assert HangError.code == 7 in codes <= {7, -signal.SIGABRT}, said
  lines = [match for text in said for match in LINE.findall(text)]
  assert lines and all(int(line[0]) > 3 and line[1:] == ("5", line[2], "2") for line in lines), said


@pytest.mark.slow
def test_a_step_that_is_truly_long_ends_the_run_and_a_larger_value_lets_it_end(tmp_path, cache):
  # Ten seconds on two cores; the watchdog needs two at most.
  long = ["--config.data.batch_size=512", "--config.train.accumulation=8", "--config.model.dim=256",
          "--config.data.seq_len=512", "--config.eval.batches=1", "--config.eval.batch_size=8",
          "--config.optimizer.warmup_steps=0"]  # fmt: skip
  run = command(tmp_path / "run", cache, *long, steps=1)[1:]
  done = python(*run, "--config.train.step_timeout=1")
  assert (done.returncode, LINE.findall(done.stderr)) == (7, [("1", "1", "0", "1")])
  done = python(*run, "--config.train.step_timeout=600")
  assert done.returncode == 0 and "step      1/1" in done.stdout


@pytest.mark.slow
def test_what_is_no_step_may_take_longer(tmp_path, cache):
  """Compilation takes seconds here, an evaluation of 600 batches too; a step takes less."""
  options = ["--config.train.step_timeout=3", "--config.eval.batches=600"]
  done = python(*command(tmp_path / "run", tmp_path / "cache", *options, steps=8)[1:])
  assert done.returncode == 0, done.stderr
