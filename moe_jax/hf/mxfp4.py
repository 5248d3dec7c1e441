"""MXFP4 weights (OCP Microscaling), as gpt-oss's experts are published: read as float32.

Blocks of 32 numbers of 4 bits share a power of 2. Two tensors of a file, NAME_blocks
[E, O, I/32, 16] and NAME_scales [E, O, I/32], both bytes, are one weight NAME [E, I, O] here.
"""

from collections.abc import Mapping

import numpy as np

from moe_jax.hf.layout import Ranges, Read, Shape

_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_BLOCK = 32
_BIAS = 127  # of the exponent that a scale's byte holds
PARTS = ("_blocks", "_scales")  # what the names of the two tensors end in


def find(shapes: Mapping[str, Shape], types: Mapping[str, str]) -> dict[str, Shape]:
  """Returns {name: shape} of the MXFP4 weights among the tensors of a file."""
  found: dict[str, Shape] = {}
  for scales, shape in shapes.items():
    name = scales.removesuffix(PARTS[1])
    if name == scales or len(shape) != 3 or {types.get(name + p) for p in PARTS} != {"U8"}:
      continue
    if shapes[name + PARTS[0]] == (*shape, _BLOCK // 2):
      E, O, blocks = shape  # noqa: E741 (a shape letter)
      found[name] = (E, blocks * _BLOCK, O)
  return found


def read(name: str, shape: Shape, ranges: Ranges, read_bytes: Read) -> np.ndarray:
  """Returns a range of a weight [E, I, O], float32.

  `read_bytes` reads a range of one of the two tensors, uint8.
  """
  experts, inner, outer = ranges
  blocks = slice(inner.start // _BLOCK, -(-inner.stop // _BLOCK))
  pairs = read_bytes(name + PARTS[0], (experts, outer, blocks, slice(0, _BLOCK // 2)))
  scales = read_bytes(name + PARTS[1], (experts, outer, blocks)).astype(np.int32) - _BIAS
  values = np.stack([_VALUES[pairs & 15], _VALUES[pairs >> 4]], axis=-1)  # the low half is first
  values = np.ldexp(values.reshape(*scales.shape, _BLOCK), scales[..., None])
  values = values.reshape(*values.shape[:2], -1)
  first = blocks.start * _BLOCK
  return values[..., inner.start - first : inner.stop - first].swapaxes(1, 2)
