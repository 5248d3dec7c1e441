"""The parts of a report before they are Markdown or HTML, and the formats of its numbers."""

import base64
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from moe_jax.errors import si
from moe_jax.report.table import Spread

UNKNOWN = "-"


class Text(NamedTuple):
  text: str
  small: bool = False


class Table(NamedTuple):
  title: str  # may be empty
  head: Sequence[Any]
  rows: Sequence[Sequence[Any]]  # an arm is a cell with its name and colour, all else is text
  left: tuple[int, ...] = (0,)  # columns of words, aligned left; the others are numbers


class Chart(NamedTuple):
  name: str  # of its file
  title: str
  svg: bytes

  @property
  def uri(self) -> str:
    """The picture as an address, inside of which no script can run."""
    return f"data:image/svg+xml;base64,{base64.b64encode(self.svg).decode()}"


class Code(NamedTuple):
  """Text in a fixed-width font."""

  title: str
  text: str


class Excerpt(NamedTuple):
  """A text by the experts of one layer, and what each of them takes; the page alone shows it."""

  title: str
  tokens: Sequence[tuple[str, str, str, str]]  # heading before it, style, experts, text
  experts: Table


Block = Text | Table | Chart | Code | Excerpt


class Section(NamedTuple):
  """A section of the report. What is empty in it is left out, and so is one of small text alone."""

  title: str
  blocks: Sequence[Block]
  conclusion: str = ""  # what a reader may conclude from it, in lines
  always: bool = False  # whether it is never left out

  @property
  def filled(self) -> list[Block]:
    """The blocks that hold something; none if the section is left out."""
    found = []
    for block in self.blocks:
      empty = isinstance(block, Table) and not block.rows
      if not empty and not (isinstance(block, Text | Code) and not block.text.strip()):
        found.append(block)
    small = all(isinstance(block, Text) and block.small for block in found)
    return [] if small and not self.always else found


# Letters that no file should show: those that control a terminal or turn the text around, halves
# of surrogate pairs, which UTF-8 cannot write, and what XML does not allow.
_UNPRINTABLE = re.compile(
  "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


def printable(text: str) -> str:
  """Returns a text from a run with a replacement character for each that cannot be shown."""
  return _UNPRINTABLE.sub("\ufffd", text)


def large(value: float | None) -> str:
  """Formats a number as errors.si does, or '-' for one that is missing or not finite."""
  return UNKNOWN if value is None or not math.isfinite(value) else si(value)


def number(value: float | None, digits: int = 2, scale: int = 1) -> str:
  """Formats scale * value with so many digits after the point, or '-' for None."""
  if value is None:
    return UNKNOWN
  return f"{round(scale * value, digits) + 0.0:.{digits}f}"  # + 0.0, so that there is no -0.00


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
