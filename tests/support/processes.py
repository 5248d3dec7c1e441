"""Real processes of one run, started as on several hosts, with one simulated device each."""

import os
import re
import signal
import socket
import subprocess
import sys

from tests.support import xla
from tests.support.scripts import CONSTANT
from tests.support.toys import ROOT


def alone(devices):
  """The environment of one process with simulated devices."""
  return {**os.environ, "XLA_FLAGS": xla.flags(devices)}


def train_command(workdir, cache, *arguments):
  return [
    sys.executable,
    "train.py",
    "--config=configs/debug.py",
    f"--workdir={workdir}",
    f"--cache_dir={cache}",
    "--config.train.log_every=1",
    "--config.mesh.expert=2",
    CONSTANT,
    *arguments,
  ]


class Together:
  """Processes of one command; those that still run are killed at the end of a `with`."""

  def __init__(self, command, environments=({}, {}), each=((), ())):
    """Starts two processes, with what differs: their environments, and more arguments."""
    with socket.socket() as probe:
      probe.bind(("localhost", 0))
      port = probe.getsockname()[1]
    self.processes = []
    for index, more in enumerate(environments):
      env = alone(1) | {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": str(len(environments)),
        "JAX_PROCESS_ID": str(index),
      }
      self.processes.append(
        subprocess.Popen(
          [*command, "--multihost", *each[index]],
          cwd=ROOT,
          env=env | more,
          text=True,
          stdout=subprocess.PIPE,
          stderr=subprocess.PIPE,
        )
      )

  def __enter__(self):
    return self

  def __exit__(self, *_):
    for process in self.processes:
      process.kill()
      process.communicate()

  def until(self, start):
    """Waits for a line that process 0 prints."""
    for line in self.processes[0].stdout:
      if line.startswith(start):
        return
    raise AssertionError(self.processes[0].stderr.read())

  def ends(self, timeout=600):
    """Returns (exit code, stdout, our lines of stderr) of each; nothing else may be an error."""
    ends = []
    for process in self.processes:
      stdout, stderr = process.communicate(timeout=timeout)
      ours = [line for line in stderr.splitlines() if line.startswith("error: ")]
      if process.returncode != -signal.SIGABRT:  # by jax, which says more
        assert not re.search(r"Traceback|Fatal|stack trace|^F\d{4} ", stderr, re.M), stderr
      ends.append((process.returncode, stdout, ours))
    return ends

  def lose(self, index, number=signal.SIGKILL, timeout=600):
    """Sends a signal to one of two processes; returns the other's exit code and stderr."""
    self.processes[index].send_signal(number)
    other = self.processes[1 - index]
    _, stderr = other.communicate(timeout=timeout)
    return other.returncode, stderr
