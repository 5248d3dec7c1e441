"""Line charts as SVG: the same drawing inside the HTML page and as a file beside the Markdown."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from matplotlib.ticker import MaxNLocator

from moe_jax.report.blocks import ArmName, Chart, escaped, si

Points = list[tuple[float, float]]
COLOURS = 6  # after these the same colours come again, dashed, and then dotted
_WIDTH, _HEIGHT = 480, 290
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 30, 40
_CROP = 2.0
_MARKED = 25  # a curve of more points has no dots

# Told apart by colour-blind readers too: two of them differ in lightness where not in hue.
LIGHT = (
  "--bg:#fdfdfc;--ink:#1f2429;--muted:#5d656e;--rule:#e2e2de;"
  "--s0:#0072b2;--s1:#d55e00;--s2:#009e73;--s3:#ab90df;--s4:#2b2f36;--s5:#dd9800"
)
DARK = (
  "--bg:#14171b;--ink:#e2e5e9;--muted:#9ba4ae;--rule:#2d333a;"
  "--s0:#4aa8e8;--s1:#ff8b4d;--s2:#2ec99b;--s3:#8a6cf5;--s4:#ffffff;--s5:#f5d76e"
)
STYLE = (
  "svg text{font:12px system-ui,sans-serif;fill:var(--muted)}"
  "svg .grid{stroke:var(--rule)}svg .guide{stroke:var(--muted);stroke-dasharray:2 3}"
  "svg polyline{fill:none;stroke-width:2;stroke-linejoin:round}"
  "svg .thin{stroke-width:1;opacity:.4}svg .dashed{stroke-dasharray:6 3}"
  "svg .dotted{stroke-dasharray:2 3}svg .unseen{opacity:0}"
) + "".join(f"svg .c{i}{{stroke:var(--s{i})}}svg .d{i}{{fill:var(--s{i})}}" for i in range(COLOURS))


@dataclasses.dataclass(frozen=True)
class Line:
  arm: ArmName
  points: Points
  thin: list[Points] = dataclasses.field(default_factory=list)  # its seeds


@dataclasses.dataclass(frozen=True)
class Axes:
  x: str
  y: str
  guide: tuple[float, str] | None = None  # a level to mark, and what it is
  ticks: Sequence[tuple[float, str]] | None = None  # of x, where they are not plain numbers
  y_range: tuple[float, float] | None = None  # what is above it leaves the picture at the top
  x_end: float = 0.0  # the picture goes at least so far to the right


def chart(name: str, title: str, lines: list[Line], axes: Axes) -> list[Chart]:
  """No chart where there is nothing to draw."""
  lines = [dataclasses.replace(line, points=_finite(line.points)) for line in lines]
  lines = [line for line in lines if line.points]
  if not lines:
    return []
  return [Chart(name, title, _svg(title, lines, axes), [line.arm for line in lines])]


def standalone(drawn: Chart) -> str:
  """An SVG file: with its own style, background and legend."""
  rows: list[list[str]] = [[]]
  x, widths = 0.0, [34 + 7 * len(arm.name) for arm in drawn.legend]
  for arm, width in zip(drawn.legend, widths, strict=True):
    if x and _LEFT + x + width > _WIDTH:
      rows.append([])
      x = 0.0
    y = _HEIGHT + 16 * len(rows)
    rows[-1].append(
      f'<polyline class="{_class(arm)}" points="{_LEFT + x},{y - 4} {_LEFT + x + 18},{y - 4}"/>'
      f'<text x="{_LEFT + x + 23}" y="{y}">{escaped(arm.name)}</text>'
    )
    x += width
  height = _HEIGHT + 16 * len(rows) + 8
  body = drawn.svg.split(">", 1)[1].removesuffix("</svg>")
  size = f'viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}"'
  return (
    f'<svg xmlns="http://www.w3.org/2000/svg" {size}>'
    f"<style>:root{{{LIGHT}}}@media(prefers-color-scheme:dark){{:root{{{DARK}}}}}{STYLE}</style>"
    f'<rect width="100%" height="100%" fill="var(--bg)"/>{body}{"".join(map("".join, rows))}</svg>'
  )


def y_range(
  lines: Sequence[Line], from_zero: bool = False, crop: bool = False
) -> tuple[float, float]:
  """Returns the y range that charts of one quantity share, with the thin curves inside.

  `crop` leaves out first steps that would flatten the rest: the range is then at most twice as high
  as that of the second halves of the curves.
  """
  paths = [_finite(path) for line in lines for path in (line.points, *line.thin)]
  paths = [path for path in paths if path]
  ys = [y for path in paths for _, y in path] or [0.0]
  low, high = (0.0 if from_zero else min(ys)), max(ys)
  late = [y for path in paths for x, y in path if 2 * x >= path[-1][0]] or ys
  if crop and max(late) > min(late):
    high = min(high, min(late) + _CROP * (max(late) - min(late)))
  room = 0.06 * (high - low) or max(abs(high), 1.0) * 0.05
  return low if from_zero else low - room, high + room


def binned(points: Points, bins: int) -> Points:
  """Replaces neighbouring points by their means, so that at most `bins` points are left."""
  if len(points) <= bins:
    return points
  return [tuple(np.mean(part, axis=0)) for part in np.array_split(np.array(points), bins)]


def _finite(points: Points) -> Points:
  return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _class(arm: ArmName) -> str:
  return f"c{arm.colour % COLOURS}{('', ' dashed', ' dotted')[min(arm.colour // COLOURS, 2)]}"


def _limits(lines: list[Line], axes: Axes) -> tuple[float, float, float, float]:
  xs = [x for line in lines for path in (line.points, *line.thin) for x, _ in path]
  low, high = axes.y_range or y_range(lines)
  if axes.guide:
    room = 0.06 * (high - low)
    low, high = min(low, axes.guide[0] - room), max(high, axes.guide[0] + room)
  x_low = 0 if not axes.ticks else min(xs)
  return x_low, max(*xs, axes.x_end, x_low + 1e-9), low, high


def _svg(title: str, lines: list[Line], axes: Axes) -> str:
  x_low, x_high, y_low, y_high = _limits(lines, axes)
  right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

  def at(x: float, y: float) -> tuple[float, float]:
    across = (x - x_low) / (x_high - x_low) * (right - _LEFT)
    up = (y - y_low) / (y_high - y_low) * (bottom - _TOP)
    # What is far above the picture need not be drawn there.
    return round(_LEFT + across, 1), round(max(bottom - up, -_HEIGHT), 1)

  def path(points: Points, kind: str) -> str:
    where = " ".join(f"{x},{y}" for x, y in (at(*point) for point in _finite(points)))
    return f'<polyline class="{kind}" points="{where}"/>'

  parts = [f'<text x="0" y="14">{escaped(axes.y)}</text>']
  parts.append(f'<text x="{right}" y="{_HEIGHT - 5}" text-anchor="end">{escaped(axes.x)}</text>')
  top = max(y for line in lines for _, y in line.points)
  if top > y_high:
    said = f"first steps, up to {top:.3g}, are above the picture"
    parts.append(f'<text x="{right}" y="14" text-anchor="end">{said}</text>')
  for y in MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]).tick_values(y_low, y_high):
    if y_low <= y <= y_high:
      _, down = at(x_low, y)
      parts.append(f'<path class="grid" d="M{_LEFT} {down}H{right}"/>')
      parts.append(f'<text x="{_LEFT - 6}" y="{down + 4}" text-anchor="end">{y:.6g}</text>')
  plain = [(x, si(x)) for x in MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(x_low, x_high)]
  for x, label in axes.ticks or plain:
    if x_low <= x <= x_high:
      middle = min(at(x, y_low)[0], _WIDTH - 3.5 * len(label))  # all of it inside
      where = f'x="{middle}" y="{bottom + 17}" text-anchor="middle"'
      parts.append(f"<text {where}>{escaped(label)}</text>")
  if axes.guide:
    level, label = axes.guide
    _, down = at(x_low, level)
    parts.append(f'<path class="guide" d="M{_LEFT} {down}H{right}"/>')
    parts.append(f'<text x="{_LEFT + 4}" y="{down + 14}">{escaped(label)}</text>')
  # Curves stay inside their frame, points included.
  parts.append(f'<svg x="0" y="{_TOP - 4}" width="{_WIDTH}" height="{bottom - _TOP + 8}" ')
  parts.append(f'viewBox="0 {_TOP - 4} {_WIDTH} {bottom - _TOP + 8}">')
  for line in lines:
    parts += [path(points, f"thin {_class(line.arm)}") for points in line.thin]
  for line in lines:
    parts.append(path(line.points, _class(line.arm)))
    dots = f"d{line.arm.colour % COLOURS}" + " unseen" * (len(line.points) > _MARKED)
    for x, y in line.points[:: math.ceil(len(line.points) / 60)]:
      what = f"{line.arm.name}: {y:.4g} at {si(x)}"
      across, down = at(x, y)
      parts.append(
        f'<circle class="{dots}" cx="{across}" cy="{down}" r="2.6">'
        f"<title>{escaped(what)}</title></circle>"
      )
  parts.append("</svg>")
  return (
    f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escaped(title)}">'
    + "".join(parts)
    + "</svg>"
  )
