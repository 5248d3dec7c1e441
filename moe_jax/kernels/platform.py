"""The kind of device that this process runs on; no other module of the model asks JAX for it."""

import os
import pathlib
import re

import jax
import psutil

from moe_jax.config import Exchange

_ROOT = pathlib.Path("/")


def name() -> str:
  """Returns "cpu", "gpu" or "tpu"; the devices of the mesh in force need not be here."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.platform if device else jax.default_backend()


def one_cpu() -> bool:
  """Returns whether the mesh in force is one CPU device."""
  return name() == "cpu" and jax.sharding.get_abstract_mesh().size == 1


def memory_bytes(sharing: int = 0) -> int | None:
  """Returns the memory of a device of this process; None where it is not known.

  CPU devices share what this process has and can still get, within the limits of its job:
  `sharing` of them, or all.
  """
  if name() == "cpu":
    have = psutil.virtual_memory().available + psutil.Process().memory_info().rss
    return min([have, *cgroup_limits(_ROOT)]) // (sharing or jax.local_device_count())
  stats = jax.local_devices()[0].memory_stats() or {}
  return stats.get("bytes_limit")


def cgroup_limits(root: pathlib.Path) -> list[int]:
  """Returns the limits of memory that Linux sets for this process and the groups around it.

  A container and a job of a scheduler have one. `root` is the folder of /proc and /sys.
  """
  try:
    groups = (root / "proc/self/cgroup").read_text().splitlines()
  except OSError:
    return []
  limits = []
  for group in groups:
    _, controllers, path = group.split(":", 2)
    if controllers and "memory" not in controllers.split(","):
      continue
    file = "memory/{}/memory.limit_in_bytes" if controllers else "{}/memory.max"  # version 1 or 2
    inner = pathlib.PurePath(path.lstrip("/"))
    for folder in (inner, *inner.parents):
      try:
        limits.append(int((root / "sys/fs/cgroup" / file.format(folder)).read_text()))
      except (OSError, ValueError):  # no such file, or "max"
        continue
  return limits


def has_exchange(exchange: Exchange) -> bool:
  """Returns whether this platform has the exchange: XLA:CPU has no ragged_all_to_all."""
  return exchange is not Exchange.RAGGED or name() != "cpu"


def breaks_ragged() -> str:
  """Returns the setting, or "", under which gradients of the ragged exchange are NaN on a GPU.

  It is the latency-hiding scheduler of XLA, for which a level of optimization stands, too.
  """
  scheduler = r"--xla_gpu_enable_latency_hiding_scheduler\b\S*"
  named = re.findall(scheduler, os.environ.get("XLA_FLAGS", ""))[-1:]  # the last one counts
  level = jax.config.values["jax_optimization_level"]
  found = [f"XLA_FLAGS={flag}" for flag in named if not re.search("=(false|0)$", flag, re.I)]
  found += [f"JAX_OPTIMIZATION_LEVEL={level}"] * (level not in ("UNKNOWN", "O0"))
  return found[0] if found and name() == "gpu" else ""


def default_exchange() -> Exchange:
  """Returns the exchange that `auto` stands for.

  Only on a TPU is the ragged exchange known to be fast.
  """
  return Exchange.RAGGED if name() == "tpu" else Exchange.ALL_GATHER
