"""FP8 weights with a scale for each block, as DeepSeek-V3 is published: read as float32.

NAME [O, I] has numbers of 8 bits (E4M3), and NAME_scale_inv [O/128, I/128] a float32 by which each
block of 128 x 128 is multiplied; the last blocks may be smaller.
"""

from collections.abc import Mapping

import ml_dtypes
import numpy as np

from moe_jax.hf.ranges import Ranges, Read, Shape, covering

_BLOCK = 128
_SCALES = "_scale_inv"
PARTS = (_SCALES,)  # what the names of the tensors beside a weight end in


def find(shapes: Mapping[str, Shape], types: Mapping[str, str]) -> dict[str, Shape]:
  """Returns {name: shape} of the FP8 weights among the tensors of a file."""
  found = {}
  for scales, shape in shapes.items():
    name = scales.removesuffix(_SCALES)
    if name == scales or (types.get(name), types[scales]) != ("F8_E4M3", "F32"):
      continue
    if shape == tuple(-(-size // _BLOCK) for size in shapes[name]):
      found[name] = shapes[name]
  return found


def read(name: str, ranges: Ranges, read_part: Read) -> np.ndarray:
  """Returns a range of a weight [O, I], float32.

  Args:
    name: of the weight.
    ranges: of O and I.
    read_part: reads a range of the weight, as bytes, or of its scales.
  """
  values = read_part(name, ranges).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
  blocks = tuple(covering(r, _BLOCK) for r in ranges)
  scales = read_part(name + _SCALES, blocks)
  rows, columns = (
    np.arange(r.start, r.stop) // _BLOCK - b.start for r, b in zip(ranges, blocks, strict=True)
  )
  return values * scales[np.ix_(rows, columns)]
