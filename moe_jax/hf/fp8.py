"""FP8 weights with scales, as DeepSeek-V3 is published: read as float32.

NAME [O, I] has numbers of 8 bits (E4M3), and NAME_scale_inv the float32 or bfloat16 by which they
are multiplied: [O/128, I/128], one for each block of 128 x 128, of which the last may be smaller;
[O, 1], one for each row; or one for the whole tensor.
"""

from collections.abc import Mapping

import ml_dtypes
import numpy as np

from moe_jax.hf.layout import Ranges, Read, Shape

_BLOCK = 128
_SCALES = "_scale_inv"
PARTS = (_SCALES,)  # what the names of the tensors beside a weight end in


def find(shapes: Mapping[str, Shape], types: Mapping[str, str]) -> dict[str, Shape]:
  """Returns {name: shape} of the FP8 weights among the tensors of a file."""
  found = {}
  for scales, shape in shapes.items():
    name = scales.removesuffix(_SCALES)
    if name == scales or types.get(name) != "F8_E4M3" or types[scales] not in ("F32", "BF16"):
      continue
    blocks = tuple(-(-size // _BLOCK) for size in shapes[name])
    if shape in (blocks, (shapes[name][0], 1), (1, 1), (1,), ()):
      found[name] = shapes[name]
  return found


def read(name: str, shape: Shape, ranges: Ranges, read_part: Read) -> np.ndarray:
  """Returns a range of a weight [O, I], float32.

  `read_part` reads a range of the weight, as bytes, or of its scales.
  """
  values = read_part(name, ranges).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
  scales = np.atleast_2d(read_part(name + _SCALES, ()).astype(np.float32))
  places = []
  for r, size, count in zip(ranges, shape, scales.shape, strict=True):
    block = size if count == 1 else 1 if count == size else _BLOCK
    places.append(np.arange(r.start, r.stop) // block)
  return values * scales[np.ix_(*places)]
