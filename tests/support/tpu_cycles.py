"""Reads from a program that was compiled for a TPU what XLA expects each phase of it to take."""

import collections
import re

_PHASES = ("route", "dispatch", "exchange", "experts", "combine", "statistics")
_UNKNOWN = 1 << 62  # of a custom call


def cycles(hlo: str) -> dict[str, int]:
  """Returns the estimated cycles of each named scope of a layer, of loops those of one trip.

  Not in it are communication and custom calls. What has no scope counts under "other".
  """
  total: collections.Counter[str] = collections.Counter()
  for line in hlo.splitlines():
    found = re.search(r'"estimated_cycles":"(\d+)"', line)
    if found and int(found[1]) < _UNKNOWN:
      name = re.search(r'op_name="([^"]*)"', line)
      scopes = [word for word in re.split(r"[/()]", name[1] if name else "") if word in _PHASES]
      total[scopes[-1] if scopes else "other"] += int(found[1])
  return dict(total)
