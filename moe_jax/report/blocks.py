"""The parts of a report before they are Markdown or HTML, and the formats of its numbers."""

import base64
import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

from moe_jax.report.table import Spread

UNKNOWN = "-"


@dataclasses.dataclass(frozen=True)
class Text:
  """Lines of text."""

  text: str
  small: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
  """A table with a head."""

  title: str  # may be empty
  head: Sequence[Any]
  rows: Sequence[Sequence[Any]]  # an arm is a cell with its name and colour, all else is text
  left: tuple[int, ...] = (0,)  # columns of words, aligned left; the others are numbers


@dataclasses.dataclass(frozen=True)
class Chart:
  """A picture."""

  name: str  # of its file
  title: str
  svg: bytes

  @property
  def uri(self) -> str:
    """The picture as an address, inside of which no script can run."""
    return f"data:image/svg+xml;base64,{base64.b64encode(self.svg).decode()}"


@dataclasses.dataclass(frozen=True)
class Code:
  """Text in a fixed-width font."""

  title: str
  text: str


@dataclasses.dataclass(frozen=True)
class Excerpt:
  """A text by the experts of one layer, and what each of them takes; the page alone shows it."""

  title: str
  tokens: Sequence[tuple[str, str, str, str]]  # heading before it, style, experts, text
  experts: Table


Block = Text | Table | Chart | Code | Excerpt


@dataclasses.dataclass(frozen=True)
class Section:
  """A section of the report; one without blocks and without a conclusion is left out."""

  title: str
  blocks: Sequence[Block]
  conclusion: str = ""  # what a reader may conclude from it, in lines


# Letters that no file should show: those that control a terminal or turn the text around, halves
# of surrogate pairs, which UTF-8 cannot write, and what XML does not allow.
_UNPRINTABLE = re.compile(
  "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


def printable(text: str) -> str:
  """Returns a text from a run with a replacement character for each that cannot be shown."""
  return _UNPRINTABLE.sub("\ufffd", text)


def si(value: float | None) -> str:
  """Formats a number with a suffix: 1234567 -> '1.23M'."""
  if value is None or not math.isfinite(value):
    return UNKNOWN
  for power, letter in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
    if abs(value) >= 10**power:
      return f"{value / 10**power:.3g}{letter}"
  return f"{value:.3g}"


def number(value: float | None, digits: int = 2) -> str:
  """Formats a number with so many digits after the point, or '-' for None."""
  return UNKNOWN if value is None else f"{round(value, digits) + 0.0:.{digits}f}"  # no -0.00


def percent(share: float | None) -> str:
  """Formats a share between 0 and 1 as percent, without the sign."""
  return UNKNOWN if share is None else f"{100 * share:.1f}"


def plus_minus(value: Spread | None, digits: int = 4, sign: str = "", error: bool = False) -> str:
  """Formats '1.7687 ± 0.0030': a mean and its standard deviation, or its standard error."""
  if value is None:
    return UNKNOWN
  around = value.error if error else value.std
  mean = f"{value.mean:{sign}.{digits}f}"
  return mean if around is None else f"{mean} ± {around:.{digits}f}"


def duration(seconds: float | None) -> str:
  """Formats seconds as '12.3 s', '4.5 min' or '1.2 h'."""
  if seconds is None:
    return UNKNOWN
  if seconds < 100:
    return f"{seconds:.1f} s"
  return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
