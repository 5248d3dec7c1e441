"""Ranges of tensors in files."""

from collections.abc import Callable

import numpy as np

Ranges = tuple[slice, ...]  # one for each dimension of a tensor
Shape = tuple[int, ...]
Read = Callable[[str, Ranges], np.ndarray]  # their tensor's name, and which part -> the values
