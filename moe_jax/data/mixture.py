"""Texts that are mixed by weight: from which source each row of the training comes.

Each source is tokenized by itself, and its epochs are its own: a row comes again when all rows of
its source have come. The weights are shares of the rows, and so of the tokens.
"""

import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import grain
import numpy as np

_PARTS = 10**9  # weights are rounded to this part


class Part(NamedTuple):
  """A source of a mixture: where its rows are."""

  label: str
  weight: float  # share of the rows
  rows: range  # their numbers; a row that two sources share is nobody's


class Joined:
  """Streams one after another as one; a separator that ends one begins the next."""

  def __init__(self, streams: Sequence[Any]):
    self._streams = [streams[0], *(stream[1:] for stream in streams[1:])]
    self.begins = np.cumsum([0, *map(len, self._streams)])  # and the end of the last

  def __len__(self) -> int:
    return int(self.begins[-1])

  def __getitem__(self, places: slice) -> np.ndarray:
    first, last, _ = places.indices(len(self))
    pieces = [
      stream[max(first - begin, 0) : last - begin]
      for stream, begin in zip(self._streams, self.begins, strict=False)
      if begin < last and first < begin + len(stream)
    ]
    return pieces[0] if len(pieces) == 1 else np.concatenate([*pieces, self._streams[0][:0]])


def drawn(parts: Sequence[Part], count: int) -> list[int]:
  """Returns how many of the first `count` rows come from each source: its share, within 2.

  The largest share is taken first, so that the rounding of the others is not its own.
  """
  weights = [max(round(part.weight * _PARTS), 1) for part in parts]
  left, rest, taken = count, sum(weights), [0] * len(parts)
  for source in sorted(range(len(parts)), key=lambda source: -weights[source]):
    taken[source] = -(-left * weights[source] // rest)
    left, rest = left - taken[source], rest - weights[source]
  return taken


def order(parts: Sequence[Part], seed: int) -> grain.MapDataset:
  """Returns the numbers of the rows, endlessly; those of a source in a new order each epoch."""
  orders = [
    grain.MapDataset.range(part.rows.start, part.rows.stop).seed(seed).shuffle().repeat()
    for part in parts
  ]

  def row(place: int) -> int:
    before, after = drawn(parts, place), drawn(parts, place + 1)
    source = next(s for s, (old, new) in enumerate(zip(before, after, strict=True)) if new > old)
    return orders[source][before[source]]

  return grain.MapDataset.range(sys.maxsize).map(row)


def metrics(parts: Sequence[Part], count: int) -> dict[str, float]:
  """Returns each source's share of the first `count` rows, and how often its rows have come."""
  found: dict[str, float] = {}
  for part, rows in zip(parts, drawn(parts, count), strict=True):
    found[f"share/{part.label}"] = rows / max(count, 1)
    found[f"epochs/{part.label}"] = rows / len(part.rows)
  return found


def describe(parts: Sequence[Part], batch_size: int) -> list[str]:
  """Returns a line for each source: its share, its rows, and the steps of its epoch."""
  return [
    f"mixture            {100 * part.weight:.4g}% {part.label}: {len(part.rows):,} rows, an epoch "
    f"each {len(part.rows) / (part.weight * batch_size):,.1f} steps"
    for part in parts
  ]


def spans(begins: Any, seq_len: int) -> list[range]:
  """Returns the numbers of the rows that each of the joined streams has alone."""
  ends = begins - 1  # the place of a separator, which is the end of one and the begin of the next
  return [range(-(-max(int(a), 0) // seq_len), int(b) // seq_len) for a, b in pairwise(ends)]
