"""Real processes of one run, started as on several hosts, with one simulated device each."""

import contextlib
import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import sys

import jax
import pytest

from tests.support import xla
from tests.support.scripts import CONSTANT
from tests.support.toys import ROOT

EVERY_THREAD = 0x40000000  # of waitpid: also one that is not the process's own child


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


def numbers(workdir):
  """{name: values of all lines} of metrics.jsonl, without those that the clock makes."""
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  names = {name for line in lines for name in line if not name.endswith(("_s", "seconds", "mfu"))}
  return {name: [line[name] for line in lines if name in line] for name in names}


def assert_equal_values(got, want):
  """Floats may differ by rounding: sums over two devices, in a process or over a network."""
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
    assert a == b or a == pytest.approx(b, rel=1e-5, abs=1e-6), path


def stop_main_thread(pid):
  """Stops the first thread of a process alone, as a debugger does: its other threads live on."""
  libc = ctypes.CDLL(None)
  libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
  seize, interrupt = 0x4206, 0x4207
  if libc.ptrace(seize, pid, None, None):
    pytest.skip("this machine does not let one process stop a thread of another")
  assert libc.ptrace(interrupt, pid, None, None) == 0
  os.waitpid(pid, EVERY_THREAD)


def free_ports(count):
  with contextlib.ExitStack() as stack:
    probes = [stack.enter_context(socket.socket()) for _ in range(count)]
    for probe in probes:
      probe.bind(("127.0.0.1", 0))
    return [probe.getsockname()[1] for probe in probes]


class Together:
  """Processes of one command; those that still run are killed at the end of a `with`."""

  def __init__(self, command, environments=({}, {}), each=((), ())):
    """Starts two processes, with what differs: their environments, and more arguments."""
    (port,) = free_ports(1)
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
