"""Published figures of accelerators, a table that needs no jax: for MFU, memory and predictions.

A chip of tpu7x is two devices to jax, so its figures here are those of half a chip. The clock is
that of the cycles in which libtpu estimates: the peak over what the matrix units do in a cycle.
Links of a TPU are those between neighbours on its torus; measured ones, a tenth below the vendor's.

[1] https://docs.cloud.google.com/tpu/docs/tpu7x and the pages of v4, v5e, v5p and v6e beside it
[2] https://jax-ml.github.io/scaling-book/tpus: links, network
[3] https://www.nvidia.com/en-us/data-center: the data sheets of A100, H100, H200 and HGX B200
"""

from typing import NamedTuple


class Chip(NamedTuple):
  """The figures of one device, of dense bfloat16, in FLOP/s, bytes, bytes/s and Hz."""

  kinds: tuple[str, ...]  # parts of jax's device_kind
  flops: float
  memory: float
  memory_speed: float
  link: float  # one way: a TPU's to one neighbour; a GPU's to all others of its host together
  network: float  # one way, per device: between slices of TPUs, between hosts of GPUs
  clock: float = 0.0  # of a TPU

  @property
  def tpu(self) -> bool:
    """Whether it is a TPU."""
    return self.clock > 0


_GIB = 2.0**30
CHIPS = {
  "v4": Chip(("TPU v4",), 275e12, 32 * _GIB, 1228e9, 45e9, 6.25e9, 1.05e9),
  "v5e": Chip(("TPU v5 lite", "TPU v5e"), 197e12, 16 * _GIB, 819e9, 45e9, 3.125e9, 1.5e9),
  "v5p": Chip(("TPU v5p", "TPU v5"), 459e12, 95 * _GIB, 2765e9, 90e9, 6.25e9, 1.75e9),
  "v6e": Chip(("TPU v6 lite", "TPU v6e"), 918e12, 32 * _GIB, 1638e9, 90e9, 12.5e9, 1.75e9),
  "tpu7x": Chip(("TPU7x",), 1153.5e12, 96 * _GIB, 3690e9, 45e9, 6.25e9, 2.2e9),
  "a100": Chip(("A100",), 312e12, 80e9, 2039e9, 300e9, 25e9),
  "h100": Chip(("H100",), 989e12, 80e9, 3350e9, 450e9, 50e9),
  "h200": Chip(("H200",), 989e12, 141e9, 4800e9, 450e9, 50e9),
  "b200": Chip(("B200",), 2250e12, 180e9, 8000e9, 900e9, 50e9),
}


def chip_of(device_kind: str) -> Chip | None:
  """Returns the figures of jax's `device_kind`; None where they are not known, as of a CPU."""
  kinds = ((kind, chip) for chip in CHIPS.values() for kind in chip.kinds)
  return next((chip for kind, chip in kinds if kind in device_kind), None)
