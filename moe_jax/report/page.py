"""Writes report.html: one file that contains its style, script and data, and loads nothing."""

import base64
import hashlib
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from moe_jax.report import blocks, charts
from moe_jax.report.blocks import ArmName, Cell, Chart, Code, Section, Table, Text

_HERE = pathlib.Path(__file__).parent
_SWATCHES = "".join(f".b{i}{{color:var(--s{i})}}" for i in range(charts.COLOURS))
_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; base-uri 'none'; form-action 'none'; style-src {style_hash};
 script-src {script_hash}">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<header><h1>{title}</h1><nav>{links}</nav></header>
{sections}
</main>
<div id="tip" role="tooltip" hidden></div>
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
</body>
</html>
"""
_INSIDE = """\
<div class="controls">
<label>Run <select id="run"></select></label>
<div id="layers" role="group" aria-label="Layer"></div>
</div>
<h3>Load of the experts over training</h3>
<div id="heat">
<canvas id="map" role="img" aria-label="Load of each expert at each step"></canvas>
<div class="scale"><span>0</span><i></i><span>2x fair share or more</span></div>
<p class="small" id="heat-note" aria-live="polite"></p>
</div>
<h3>A text, by the expert that took each token</h3>
<p class="small" id="text-note"></p>
<div id="legend" role="group" aria-label="Experts; choose one to see its tokens alone"></div>
<div id="text" aria-label="Text; arrow keys go from token to token"></div>
<h3>What each expert takes</h3>
<div class="scroll" tabindex="0"><table id="experts"></table></div>
<noscript><p>This section needs JavaScript.</p></noscript>
"""


def cell(value: Cell) -> str:
  """Returns the HTML inside a table's cell."""
  if isinstance(value, ArmName):
    kind = f"b{value.colour % charts.COLOURS}"
    kind += ("", " dashed", " dotted")[min(value.colour // charts.COLOURS, 2)]
    return f'<i class="swatch {kind}"></i>{blocks.escaped(value.name)}'
  return blocks.escaped(value)


def table(block: Table) -> str:
  """Returns the HTML of a table."""

  def row(cells: Sequence[Cell], tag: str) -> str:
    marks = [
      ' class="arm"' if isinstance(c, ArmName) else "" if i in block.left else ' class="n"'
      for i, c in enumerate(cells)
    ]
    elements = (f"<{tag}{m}>{cell(c)}</{tag}>" for m, c in zip(marks, cells, strict=True))
    return f"<tr>{''.join(elements)}</tr>"

  title = f"<h3>{blocks.escaped(block.title)}</h3>" if block.title else ""
  rows = "\n".join(row(cells, "td") for cells in block.rows)
  return (
    f'{title}<div class="scroll" tabindex="0"><table>'
    f"<thead>{row(block.head, 'th')}</thead><tbody>{rows}</tbody></table></div>"
  )


def text(block: Text) -> str:
  """Returns the HTML of paragraphs."""
  kind = ' class="small"' if block.small else ""
  parts = []
  for lines in blocks.paragraphs(block.text):
    bodies = (
      f"<b>{blocks.escaped(label)}</b> {blocks.escaped(body)}" if label else blocks.escaped(body)
      for label, body in lines
    )
    parts.append(f"<p{kind}>{'<br>'.join(bodies)}</p>")
  return "".join(parts)


def code(block: Code) -> str:
  """Returns the HTML of a text that opens at a click."""
  return (
    f"<details><summary>{blocks.escaped(block.title)}</summary>"
    f'<pre tabindex="0">{blocks.escaped(block.text)}</pre></details>'
  )


_WRITERS: dict[type, Callable[..., str]] = {Table: table, Text: text, Code: code}


def chart_row(row: list[Chart]) -> str:
  """Returns the HTML of charts side by side, under one legend of all their arms."""
  arms = dict.fromkeys(arm for chart in row for arm in chart.legend)
  names = "".join(f"<li>{cell(arm)}</li>" for arm in sorted(arms, key=lambda arm: arm.colour))
  figures = "".join(
    f"<figure><figcaption>{blocks.escaped(c.title)}</figcaption>{c.svg}</figure>" for c in row
  )
  return f'<ul class="legend">{names}</ul><div class="charts">{figures}</div>'


def section_html(section: Section, anchor: str) -> str:
  """Returns the HTML of a section: its conclusion, its charts in a row, then the rest."""
  parts = [f'<section id="{anchor}"><h2>{blocks.escaped(section.title)}</h2>']
  if section.conclusion:
    said = blocks.escaped(section.conclusion).replace(" ± ", "\u00a0±\u00a0").replace("\n", "<br>")
    parts.append(f'<p class="conclusion">{said}</p>')
  row = [block for block in section.blocks if isinstance(block, Chart)]
  if row:
    parts.append(chart_row(row))
  for block in section.blocks:
    if not isinstance(block, Chart):
      parts.append(_WRITERS[type(block)](block))
  return "\n".join([*parts, "</section>"])


def embedded(value: Any) -> str:
  """Returns JSON that cannot end its script element; numbers that are not finite become null."""
  finite = json.loads(json.dumps(value), parse_constant=lambda _: None)
  return json.dumps(finite, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def render(title: str, sections: list[Section], runs: list[dict[str, Any]]) -> str:
  """Returns the page; `runs` are the data of inside.data for the section `Inside a run`."""
  bodies = [(section.title, section_html(section, f"s{i}")) for i, section in enumerate(sections)]
  if runs:
    inside = f'<section id="inside"><h2>Inside a run</h2>{_INSIDE}</section>'
    place = next((i for i, (name, _) in enumerate(bodies) if name == "Balance"), len(bodies) - 1)
    bodies.insert(place + 1, ("Inside a run", inside))
  links = []
  for name, body in bodies:
    anchor = body.split('id="', 1)[1].split('"', 1)[0]
    links.append(f'<a href="#{anchor}">{blocks.escaped(name)}</a>')
  style, script = _style(), (_HERE / "page.js").read_text(encoding="utf-8")
  return _PAGE.format(
    title=blocks.escaped(title), style=style, style_hash=_hash(style), script=script,
    script_hash=_hash(script), data=embedded(runs), links="".join(links),
    sections="\n".join(body for _, body in bodies),
  )  # fmt: skip


def _style() -> str:
  dark = f"@media (prefers-color-scheme: dark){{:root{{{charts.DARK}}}}}"
  rules = (_HERE / "page.css").read_text(encoding="utf-8")
  return "\n".join([f":root{{{charts.LIGHT}}}", dark, charts.STYLE + _SWATCHES, rules])


def _hash(text: str) -> str:
  """Returns the name by which the page's policy allows a script or a style, and no other."""
  return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
