"""Line charts as SVG: the same drawing inside the HTML page and as a file beside the Markdown."""

import dataclasses
import html
import math
from collections.abc import Sequence

from matplotlib.ticker import MaxNLocator

from moe_jax.report.blocks import ArmName, Chart, si

Points = list[tuple[float, float]]
COLOURS = 8  # after these the same colours come again, dashed
_WIDTH, _HEIGHT = 480, 290
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 30, 40

# Okabe and Ito's colours, told apart by colour-blind readers; lighter on a dark page.
LIGHT = (
  "--bg:#fdfdfc;--ink:#1f2429;--muted:#5d656e;--rule:#e2e2de;"
  "--s0:#0072b2;--s1:#d55e00;--s2:#009e73;--s3:#c45f98;"
  "--s4:#b87a00;--s5:#3a9fd6;--s6:#6d5bb3;--s7:#777777"
)
DARK = (
  "--bg:#14171b;--ink:#e2e5e9;--muted:#9ba4ae;--rule:#2d333a;"
  "--s0:#4aa8e8;--s1:#ff8b4d;--s2:#2ec99b;--s3:#e79ac5;"
  "--s4:#f0b429;--s5:#8fd0f5;--s6:#ab9bf0;--s7:#b0b0b0"
)
STYLE = (
  "svg text{font:12px system-ui,sans-serif;fill:var(--muted)}"
  "svg .grid{stroke:var(--rule)}svg .guide{stroke:var(--muted);stroke-dasharray:2 3}"
  "svg polyline{fill:none;stroke-width:2;stroke-linejoin:round}"
  "svg .thin{stroke-width:1;opacity:.4}svg .dashed{stroke-dasharray:6 3}"
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
  from_zero: bool = False
  skip: float = 0.0  # the part at the left, of the width, that may leave the picture at the top


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
      f'<text x="{_LEFT + x + 23}" y="{y}">{html.escape(arm.name)}</text>'
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


def _finite(points: Points) -> Points:
  return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _class(arm: ArmName) -> str:
  return f"c{arm.colour % COLOURS}" + (" dashed" if arm.colour >= COLOURS else "")


def _limits(lines: list[Line], axes: Axes) -> tuple[float, float, float, float]:
  xs = [x for line in lines for x, _ in line.points]
  ys = []
  for line in lines:
    begin = axes.skip * max(x for x, _ in line.points)
    ys += [y for x, y in line.points if x >= begin]
  if axes.guide:
    ys.append(axes.guide[0])
  low, high = (0 if axes.from_zero else min(ys)), max(ys)
  room = 0.06 * (high - low) or max(abs(high), 1.0) * 0.05
  x_low = 0 if not axes.ticks else min(xs)
  return x_low, max(max(xs), x_low + 1e-9), low if axes.from_zero else low - room, high + room


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

  parts = [f'<text x="0" y="14">{html.escape(axes.y)}</text>']
  parts.append(
    f'<text x="{right}" y="{_HEIGHT - 5}" text-anchor="end">{html.escape(axes.x)}</text>'
  )
  for y in MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(y_low, y_high):
    if y_low <= y <= y_high:
      _, down = at(x_low, y)
      parts.append(f'<path class="grid" d="M{_LEFT} {down}H{right}"/>')
      parts.append(f'<text x="{_LEFT - 6}" y="{down + 4}" text-anchor="end">{y:.6g}</text>')
  plain = [(x, si(x)) for x in MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(x_low, x_high)]
  for x, label in axes.ticks or plain:
    if x_low <= x <= x_high:
      middle = min(at(x, y_low)[0], _WIDTH - 3.5 * len(label))  # all of it inside
      where = f'x="{middle}" y="{bottom + 17}" text-anchor="middle"'
      parts.append(f"<text {where}>{html.escape(label)}</text>")
  if axes.guide:
    level, label = axes.guide
    _, down = at(x_low, level)
    parts.append(f'<path class="guide" d="M{_LEFT} {down}H{right}"/>')
    parts.append(f'<text x="{_LEFT + 4}" y="{down + 14}">{html.escape(label)}</text>')
  # Curves stay inside their frame, points included.
  parts.append(f'<svg x="0" y="{_TOP - 4}" width="{_WIDTH}" height="{bottom - _TOP + 8}" ')
  parts.append(f'viewBox="0 {_TOP - 4} {_WIDTH} {bottom - _TOP + 8}">')
  for line in lines:
    parts += [path(points, f"thin {_class(line.arm)}") for points in line.thin]
  for line in lines:
    parts.append(path(line.points, _class(line.arm)))
    for x, y in line.points[:: math.ceil(len(line.points) / 60)]:
      what = f"{line.arm.name}: {y:.4g} at {si(x)}"
      across, down = at(x, y)
      parts.append(
        f'<circle class="d{line.arm.colour % COLOURS}" cx="{across}" cy="{down}" r="2.6">'
        f"<title>{html.escape(what)}</title></circle>"
      )
  parts.append("</svg>")
  return (
    f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(title)}">'
    + "".join(parts)
    + "</svg>"
  )
