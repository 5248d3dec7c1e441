"""The parts of a report before they are Markdown or HTML, and the formats of its numbers."""

import dataclasses
import html
import math
import re
from collections.abc import Sequence

from moe_jax.report.table import Spread

UNKNOWN = "-"


@dataclasses.dataclass(frozen=True)
class ArmName:
  """A cell that names an arm; `colour` is the index of the arm in the study."""

  name: str
  colour: int


Cell = str | ArmName


@dataclasses.dataclass(frozen=True)
class Text:
  """Paragraphs of text, separated by blank lines."""

  text: str
  small: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
  """A table with a head."""

  title: str  # may be empty
  head: list[str]
  rows: Sequence[Sequence[Cell]]
  left: tuple[int, ...] = (0,)  # columns of words, aligned left; the others are numbers


@dataclasses.dataclass(frozen=True)
class Chart:
  """A picture with curves of arms."""

  name: str  # of its file
  title: str
  svg: str  # without a legend
  legend: list[ArmName]


@dataclasses.dataclass(frozen=True)
class Code:
  """Text in a fixed-width font."""

  title: str
  text: str


Block = Text | Table | Chart | Code


@dataclasses.dataclass(frozen=True)
class Section:
  """A section of the report; one without blocks and without a conclusion is left out."""

  title: str
  blocks: Sequence[Block]
  conclusion: str = ""  # what a reader may conclude from it, in lines


_LABELLED = re.compile(r"([A-Z]\w*) {2,}(\S.*)")


def paragraphs(text: str) -> list[list[tuple[str, str]]]:
  """Splits a text into paragraphs, each a list of lines (label, text).

  'Expect   the loss' begins a new line with the label 'Expect'. Any other line of the text is part
  of the line before it; the label '' means none.
  """
  result = []
  for paragraph in re.split(r"\n\s*\n", text.strip()):
    lines: list[tuple[str, str]] = []
    for line in filter(None, map(str.strip, paragraph.splitlines())):
      labelled = _LABELLED.match(line)
      if labelled or not lines:
        lines.append((labelled[1], labelled[2]) if labelled else ("", line))
      else:
        lines[-1] = (lines[-1][0], f"{lines[-1][1]} {line}")
    if lines:
      result.append(lines)
  return result


# Letters that no file should show: those that control a terminal or turn the text around, halves
# of surrogate pairs, which UTF-8 cannot write, and what XML does not allow.
_UNPRINTABLE = re.compile(
  "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


def printable(text: str) -> str:
  """Returns a text from a run with a replacement character for each that cannot be shown."""
  return _UNPRINTABLE.sub("\ufffd", text)


def escaped(text: str) -> str:
  """Returns a text from a run as it may stand in HTML, between tags or in quotes."""
  return html.escape(printable(text))


def si(value: float | None, unit: str = "") -> str:
  """Formats a number with a suffix: 1234567 -> '1.23M'."""
  if value is None or not math.isfinite(value):
    return UNKNOWN
  for power, letter in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
    if abs(value) >= 10**power:
      return f"{value / 10**power:.3g}{letter}{unit}"
  return f"{value:.3g}{unit}"


def number(value: float | None, digits: int = 2) -> str:
  """Formats a number with so many digits after the point, or '-' for None."""
  return UNKNOWN if value is None else f"{round(value, digits) + 0.0:.{digits}f}"  # no -0.00


def percent(share: float | None) -> str:
  """Formats a share between 0 and 1 as percent, without the sign."""
  return UNKNOWN if share is None else f"{100 * share:.1f}"


def plus_minus(value: Spread | None, digits: int = 4, sign: str = "", error: bool = False) -> str:
  """Formats a mean and its standard deviation, or with `error` its standard error.

  The result looks like '1.7687 ± 0.0030'.
  """
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
