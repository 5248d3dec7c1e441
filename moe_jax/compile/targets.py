"""The devices that a program can be compiled for without them, and their published figures.

A TPU's name counts as Google counts: v4 and v5p by TensorCores, two a chip, so v5p-128 has 64
chips; v5e, v6e and tpu7x by chips. `v5p:4x4x4` names the torus itself. h100-64 are 8 hosts of 8.
"""

from typing import NamedTuple


class Chip(NamedTuple):
  """A device's published figures, of dense bfloat16; bytes and bytes per second."""

  flops: float
  memory: float
  memory_speed: float
  link: float  # one way, of one link of a torus, or of a GPU to its NVLink switch
  network: float  # one way, of a chip between slices, or of a GPU between hosts
  clock: float  # of a TPU's compiler's cycles
  source: str


_GIB, _GB = 2.0**30, 1e9
CHIPS = {
  "v4": Chip(275e12, 32 * _GIB, 1228e9, 45e9, 6.25e9, 1.05e9, "cloud.google.com/tpu/docs/v4"),
  "v5e": Chip(197e12, 16 * _GIB, 819e9, 45e9, 3.125e9, 1.5e9, "cloud.google.com/tpu/docs/v5e"),
  "v5p": Chip(459e12, 95 * _GIB, 2765e9, 90e9, 6.25e9, 1.75e9, "cloud.google.com/tpu/docs/v5p"),
  "v6e": Chip(918e12, 32 * _GIB, 1640e9, 90e9, 12.5e9, 1.75e9, "cloud.google.com/tpu/docs/v6e"),
}
