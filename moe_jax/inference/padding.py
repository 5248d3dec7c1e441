"""Prompts of different lengths as one array, in few sizes, so that few programs are compiled."""

from collections.abc import Sequence

import numpy as np


def padded_sizes(count: int, longest: int, multiple: int) -> tuple[int, int]:
  """Returns B and L for `count` rows of up to `longest` tokens, where B is a multiple of a number.

  Both are rounded up: B to a power of two times `multiple`, L to a power of two from 16 up.
  """
  B = multiple * (1 << (-(-count // multiple) - 1).bit_length())
  return B, max(16, 1 << (longest - 1).bit_length())


def padded(rows: Sequence[np.ndarray], multiple: int) -> tuple[np.ndarray, np.ndarray]:
  """Aligns rows at their ends, in an array of the sizes above.

  Returns:
    tokens_BL, and start_B, which lies beyond every slot in rows that are only padding.
  """
  B, L = padded_sizes(len(rows), max(map(len, rows)), multiple)
  tokens_BL = np.zeros((B, L), np.int32)
  start_B = np.full(B, np.iinfo(np.int32).max // 2, np.int32)
  for number, ids in enumerate(rows):
    tokens_BL[number, L - len(ids) :] = ids
    start_B[number] = L - len(ids)
  return tokens_BL, start_B
