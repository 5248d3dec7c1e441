"""Ranges of tensors in files, and the blocks of numbers that share a scale in quantised ones."""

from collections.abc import Callable

import numpy as np

Ranges = tuple[slice, ...]  # one for each dimension of a tensor
Shape = tuple[int, ...]
Read = Callable[[str, Ranges], np.ndarray]  # their tensor's name, and which part -> the values


def covering(numbers: slice, size: int) -> slice:
  """Returns the range of the blocks of `size` numbers that hold a range of numbers."""
  return slice(numbers.start // size, -(-numbers.stop // size))
