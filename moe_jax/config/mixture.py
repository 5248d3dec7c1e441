"""The sources of a mixture of texts, as the field data.mixture says them."""

import dataclasses
import math
import re
from typing import Any, NamedTuple

from moe_jax.config.run import Data
from moe_jax.errors import UserError

_SOURCE = re.compile(r"\s*([\w-]+)=([^:]*):(text:)?(.+?)(?:#(.+?))?\s*")
_LARGEST = 1e6  # of a weight over another


class Source(NamedTuple):
  """A text of a mixture."""

  label: str
  weight: float  # the share of the rows; those of a mixture sum to 1
  data: Data  # of this text alone


def sources(data: Data) -> list[Source]:
  """Returns the sources of a mixture; raises a UserError where it is not spelled right."""
  found = []
  for part in data.mixture.split(","):
    match = _SOURCE.fullmatch(part)
    if not match:
      raise _refusal(data, f"{part.strip()!r} is not LABEL=WEIGHT:TEXT")
    label, number, files, text, column = match.groups()
    try:
      weight = float(number)
    except ValueError:
      weight = 0.0
    if not 0 < weight < math.inf:
      raise _refusal(data, f"the weight {number!r} of {label} is no number above 0")
    named: dict[str, Any] = {"name": "text", "path": text} if files else {"name": text}
    alone = dataclasses.replace(data, mixture="", column=column or data.column, **named)
    found.append(Source(label, weight, alone))
  labels, weights = [source.label for source in found], [source.weight for source in found]
  if len(set(labels)) < len(labels):
    raise _refusal(data, "a label stands there twice")
  if max(weights) > _LARGEST * min(weights):
    raise _refusal(data, f"a weight is over {_LARGEST:,.0f} times another")
  return [source._replace(weight=source.weight / sum(weights)) for source in found]


def _refusal(data: Data, why: str) -> UserError:
  return UserError(
    f"config.data.mixture={data.mixture!r}: {why}; write LABEL=WEIGHT:TEXT, ..., where TEXT is the "
    "name of a data set, or text:PATH of files without a comma, and may end in #COLUMN"
  )
