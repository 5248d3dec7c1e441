"""Draws charts with matplotlib: the same SVG stands beside the Markdown and inside the page."""

import io
import pathlib
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from moe_jax.errors import si
from moe_jax.report.blocks import Chart, printable
from moe_jax.report.runs import ArmRuns, Curve

# Told apart by colour-blind readers too. After them the same come again, dashed, and then dotted.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#a685dd", "#2b2f36", "#dd9800")
_DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)))
_GREY = "#777777"
_CROP = 2.0
_MARKED = 25  # a curve of more points has no dots
_LONGEST = 40  # letters of a name in a picture
_LINE = 72  # letters of a legend's line
styled = matplotlib.rc_context(fname=str(pathlib.Path(__file__).with_name("report.mplstyle")))


class Line(NamedTuple):
  arm: ArmRuns
  curve: Curve
  thin: Sequence[Curve] = ()  # its seeds


@styled
def saved(figure: Figure, kind: str = "svg") -> bytes:
  """Returns the file of a figure; a letter that the font lacks is drawn as a box."""
  buffer = io.BytesIO()
  dated = dict.fromkeys(("Date", "Creator", "Format", "Type")) if kind == "svg" else None
  with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "Glyph", UserWarning)
    figure.savefig(buffer, format=kind, dpi=120, metadata=dated)
  return buffer.getvalue()


def label(name: str) -> str:
  """Returns a name from a run as it stands in a picture."""
  name = printable(name)
  return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"


def y_range(
  lines: Sequence[Line], from_zero: bool = False, crop: bool = False
) -> tuple[float, float]:
  """Returns the y range that charts of one quantity share, with the thin curves inside.

  `crop` leaves out first steps that would flatten the rest: the range is then at most twice as high
  as that of the second halves of the curves.
  """
  curves = [np.stack(curve) for line in lines for curve in (line.curve, *line.thin)]
  curves = [curve[:, np.isfinite(curve[1])] for curve in curves]
  ys = np.concatenate([[], *(y for _, y in curves)])
  late = np.concatenate([[], *(y[2 * x >= x[-1]] for x, y in curves if len(x))])
  if not len(ys):
    return 0.0, 1.0
  low, high = 0.0 if from_zero else ys.min(), ys.max()
  if crop and np.ptp(late):
    high = min(high, late.min() + _CROP * np.ptp(late))
  room = 0.06 * (high - low) or max(abs(high), 1.0) * 0.05
  return float(low if from_zero else low - room), float(high + room)


def binned(curve: Curve, bins: int) -> Curve:
  """Replaces neighbouring points by their means, so that at most `bins` points are left."""
  parts = [part for part in np.array_split(np.stack(curve, axis=1), bins) if len(part)]
  x, y = np.array([part.mean(axis=0) for part in parts]).reshape(-1, 2).T
  return x, y


@styled
def chart(
  name: str,
  title: str,
  lines: Sequence[Line],
  x: str,
  y: str,
  y_range: tuple[float, float],
  x_end: float = 0.0,
  target: float | None = None,
  ticks: Sequence[str] = (),
) -> list[Chart]:
  """Draws the curves of arms, with a legend; returns nothing where there is nothing to draw.

  Curves leave the picture where they are above `y_range`, and it says how high. The x axis goes to
  `x_end` at least; with `ticks`, the labels of x = 0, 1, ..., it is no number.
  """
  lines = [line for line in lines if np.isfinite(line.curve[1]).any()]
  if not lines:
    return []
  longest = max(len(label(line.arm.name)) for line in lines)
  columns = max(1, min(len(lines), _LINE // (6 + longest)))
  below = 0.55 + 0.2 * -(-len(lines) // columns)  # inches of the axis and of the legend
  figure = Figure((5.9, 3.0 + below))
  figure.subplots_adjust(0.105, below / (3.0 + below), 0.99, 1 - 0.28 / (3.0 + below))
  axes = figure.subplots()
  drawn = []
  for line in lines:
    colour = COLOURS[line.arm.colour % len(COLOURS)]
    dashes = _DASHES[min(line.arm.colour // len(COLOURS), len(_DASHES) - 1)]
    for curve in line.thin:
      axes.plot(*curve, color=colour, ls=dashes, lw=0.8, alpha=0.4)
    marker = "o" if len(line.curve[0]) <= _MARKED else ""
    drawn += axes.plot(*line.curve, color=colour, ls=dashes, lw=2, marker=marker, ms=3.5, zorder=3)
  low, high = y_range
  if target is not None:
    room = 0.06 * (high - low)
    low, high = min(low, target - room), max(high, target + room)
    axes.axhline(target, color=_GREY, ls=":", lw=1)
    across = axes.get_yaxis_transform()
    axes.text(0.01, target, "target", color=_GREY, va="bottom", transform=across)
  top = max(line.curve[1][np.isfinite(line.curve[1])].max() for line in lines)
  if top > high:
    said = f"first steps, up to {top:.3g}, are above"
    axes.text(1, 0.99, said, color=_GREY, ha="right", va="top", transform=axes.transAxes)
  axes.set(title=title, xlabel=x, ylabel=y, ylim=(low, high))
  if ticks:
    axes.set_xticks(range(len(ticks)), ticks)
  else:
    axes.xaxis.set_major_formatter(lambda value, _: si(value))
    end = max(x_end, *(line.curve[0].max() for line in lines))
    axes.set_xlim(0, 1.02 * end or 1)
  # matplotlib would leave out a name that begins with _, so names come after the legend is made.
  legend = figure.legend(drawn, ["name"] * len(drawn), loc="lower left", ncols=columns)
  for text, line in zip(legend.texts, lines, strict=True):
    text.set_text(label(line.arm.name))
  return [Chart(name, title, saved(figure))]
