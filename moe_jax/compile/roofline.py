"""How long a step takes by the published figures of its devices: compute, memory and network.

The network is that of https://jax-ml.github.io/scaling-book/sharding. On a torus a mesh axis lies
along some dimensions; a gather uses all of them at once, an all-to-all waits for the longest. A
dimension of which the axis takes a part has no wrap. Of GPUs, NVLink and the network of the hosts
work at the same time.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from moe_jax.compile.program import Collective
from moe_jax.compile.targets import Target

_ALL_TO_ALL = ("all-to-all", "ragged-all-to-all")


class Group(NamedTuple):
  """How the devices of some mesh axes, those of one collective, are connected."""

  devices: int
  extents: tuple[tuple[int, bool], ...]  # of a torus: (chips along a dimension, whether it wraps)
  hosts: int  # of GPUs
  slices: int


class Times(NamedTuple):
  """Seconds of a step, each as if nothing else took time."""

  compute: float  # all FLOPs at the peak
  memory: float  # all bytes at the memory's speed
  compiler: float  # a TPU's compiler's cycles, and its custom calls at the peak; 0 without them
  network: dict[tuple[str, ...], float]  # by mesh axes
  waited: float  # of it, what the work waits for
  step: float  # predicted: the work beside the rest of the network, then what it waits for
  bound: str  # what binds it: "compute", "memory", "compiler's estimate", "network"


def group_of(mesh: Any, axes: Sequence[str], target: Target) -> Group:
  """Returns how the devices along these axes of a mesh of topology devices are connected."""
  index = tuple(slice(None) if axis in axes else 0 for axis in mesh.axis_names)
  devices = list(np.asarray(mesh.devices)[index].flat)
  slices = len({getattr(d, "slice_index", 0) for d in devices})
  if not target.chip.tpu:
    return Group(len(devices), (), len({d.process_index for d in devices}), 1)
  places = np.array([d.coords for d in devices])[:, : len(target.shape)]
  sizes = [len(np.unique(column)) for column in places.T]
  extents = tuple(
    (size, target.wraps(dimension) and size == target.shape[dimension])
    for dimension, size in enumerate(sizes)
    if size > 1
  )
  return Group(len(devices), extents, 1, slices)


def seconds(kind: str, size: float, group: Group, target: Target) -> float:
  """Returns how long one collective takes.

  Args:
    kind: of program.Collective.
    size: bytes of the whole array on each device: what an all-gather returns, a reduce-scatter
      takes, an all-to-all sends, its own part included.
    group: of its devices.
    target: whose chip has the speeds.
  """
  chip, n = target.chip, group.devices
  if n == 1:
    return 0.0
  if kind == "all-reduce":  # a reduce-scatter, then an all-gather
    return 2 * seconds("all-gather", size, group, target)
  if kind == "collective-permute":
    return size / (chip.link if group.hosts == group.slices == 1 else chip.network)
  outside = group.hosts * group.slices
  exchanged = kind in _ALL_TO_ALL
  if not chip.tpu:
    inside = size * (n - 1) / n / chip.link
    share = 1 if exchanged else n / outside  # GPUs of a host that fetch a gather's parts together
    return max(inside, size * (outside - 1) / outside / (chip.network * share))
  between = size * (outside - 1) / outside / (chip.network * (1 if exchanged else n / outside))
  if not group.extents:  # the two devices of a chip of tpu7x
    return max(between, size * (n - 1) / n / (6 * chip.link))
  if exchanged:  # half of a device's bytes cross the middle of the longest dimension
    # Each of a line's links there carries those of length / 2 devices; a ring has two of them.
    inside = max(length * size / (8 if wraps else 4) for length, wraps in group.extents)
    return max(between, inside / chip.link)
  ways = sum(2 if wraps else 1 for _, wraps in group.extents)
  return max(between, size * (n - 1) / n / (ways * chip.link))


def waits(collective: Collective) -> bool:
  """Returns whether the work waits for a collective, as it does for rows, keys and partial sums.

  The compiler moves weights and gradients beside the work of other layers.
  """
  rows = collective.kind in _ALL_TO_ALL or collective.phase == "exchange"
  return rows or "tensor" in collective.axes or collective.axes == ("context",)


def wire_bytes(collective: Collective, devices: int) -> float:
  """Returns the bytes that each device sends in a step for these collectives."""
  passes = 2 if collective.kind == "all-reduce" else 1
  share = 1 if collective.kind == "collective-permute" else passes * (devices - 1) / devices
  return share * collective.size * collective.times


def times(
  *,
  flops: float,
  custom_flops: float,
  memory_bytes: float,
  cycles: int,
  collectives: Sequence[Collective],
  groups: dict[tuple[str, ...], Group],
  target: Target,
) -> Times:
  """Returns the times of a step of one device.

  Args:
    flops: of a device, those of custom calls included.
    custom_flops: of custom calls, which `cycles` does not contain.
    memory_bytes: that a device reads and writes; 0 where that is not known.
    cycles: that the compiler of a TPU expects; 0 where it says nothing.
    collectives: of the program, or expected.
    groups: of their axes.
    target: the devices.
  """
  chip = target.chip
  network: dict[tuple[str, ...], float] = {}
  waited = 0.0
  for one in collectives:
    took = one.times * seconds(one.kind, one.size, groups[one.axes], target)
    network[one.axes] = network.get(one.axes, 0.0) + took
    waited += took * waits(one)
  compute, memory = flops / chip.flops, memory_bytes / chip.memory_speed
  compiler = (cycles / chip.clock + custom_flops / chip.flops) if cycles else 0.0
  beside = sum(network.values()) - waited
  work = compiler or max(compute, memory)
  names = {"compute": compute, "memory": memory, "compiler's estimate": compiler}
  bound = "network" if beside + waited > work else max(names, key=names.__getitem__)
  return Times(compute, memory, compiler, network, waited, max(work, beside) + waited, bound)


def ceiling(model_flops: float, step: float, target: Target) -> float:
  """Returns the MFU of a step of so many seconds: all model FLOPs by the peak of all devices."""
  return model_flops / (step * target.chip.flops * target.devices) if step else math.nan
