"""Divides the machine into slots: each runs one process at a time on its own CPU cores and GPUs."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from typing import Any


def share(items: Sequence[Any], slot: int, slots: int) -> list[Any]:
  """Returns a slot's items, which are neighbours; slots share an item only if there are too few."""
  if slots > len(items):
    return [items[slot % len(items)]] if items else []
  return list(items[slot * len(items) // slots : (slot + 1) * len(items) // slots])


def cpus() -> list[int]:
  """Returns the cores that this process may use; none if the system cannot pin processes."""
  return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []


def gpus() -> list[str]:
  """Returns NVIDIA's GPUs by the names that CUDA_VISIBLE_DEVICES uses."""
  if "CUDA_VISIBLE_DEVICES" in os.environ:
    return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name]
  if not shutil.which("nvidia-smi"):
    return []
  said = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
  return [str(i) for i in range(sum(line.startswith("GPU ") for line in said.splitlines()))]


class MachineSlots:
  """`number` shares of this machine; a single slot has all cores and GPUs of this process."""

  def __init__(self, number: int):
    self.number = number
    self._cpus = cpus() if number > 1 else []
    self._gpus = gpus() if number > 1 else []

  def environment(self, slot: int) -> dict[str, str]:
    """Returns the environment variables to add for a process of this slot."""
    if not self._gpus:
      return {}
    variables = {"CUDA_VISIBLE_DEVICES": ",".join(share(self._gpus, slot, self.number))}
    if self.number > len(self._gpus) and "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
      # By default the first of several processes on a GPU takes 75% of its memory.
      processes = -(-self.number // len(self._gpus))
      variables["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.9 / processes:.2f}"
    return variables

  def start(self, command: list[str], slot: int, **options: Any) -> subprocess.Popen:
    """Starts a process in a slot; `options` are those of subprocess.Popen."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **self.environment(slot)}
    process = subprocess.Popen(command, env=environment, **options)
    if self._cpus:
      # This happens long before jax counts the cores for its threads.
      with contextlib.suppress(ProcessLookupError):
        os.sched_setaffinity(process.pid, share(self._cpus, slot, self.number))
    return process
