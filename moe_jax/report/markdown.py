"""report.md, with its pictures as files beside it."""

import html
import pathlib
import re
from collections.abc import Callable

from moe_jax.report import blocks, charts
from moe_jax.report.blocks import ArmName, Cell, Chart, Code, Section, Table, Text

FOLDER = "report_files"


def escape(text: str) -> str:
  """Text that a reader shows as it is: no HTML, links, emphasis or cells of a user's making."""
  text = html.escape(text, quote=False).replace("\\", "\\\\")
  return re.sub(r"([|*_`\[\]#])", r"\\\1", text)


def cell(value: Cell) -> str:
  text = value.name if isinstance(value, ArmName) else value
  return escape(" ".join(text.split()))


def table(block: Table) -> str:
  marks = [":--" if i in block.left else "--:" for i in range(len(block.head))]
  lines = [map(cell, block.head), marks, *(map(cell, row) for row in block.rows)]
  title = f"**{escape(block.title)}**\n\n" if block.title else ""
  return title + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def text(block: Text) -> str:
  """Lines of a paragraph that begin anew end in two spaces, Markdown's line break."""
  found = [
    "  \n".join(f"**{escape(a)}** {escape(b)}" if a else escape(b) for a, b in lines)
    for lines in blocks.paragraphs(block.text)
  ]
  return "\n\n".join(f"<sub>{part}</sub>" if block.small else part for part in found)


def code(block: Code) -> str:
  longest = max(map(len, re.findall(r"`+", block.text)), default=0)
  fence = "`" * max(3, longest + 1)
  return f"{escape(block.title)}:\n\n{fence}text\n{block.text}\n{fence}"


_WRITERS: dict[type, Callable[..., str]] = {Table: table, Text: text, Code: code}


def write(out: pathlib.Path, title: str, sections: list[Section], picture: str) -> pathlib.Path:
  """Writes out/report.md; `picture` is the heat map's file in the folder, or ''."""
  folder = out / FOLDER
  parts = [f"# {escape(title)}"]
  for section in sections:
    parts.append(f"## {escape(section.title)}")
    for block in section.blocks:
      if isinstance(block, Chart):
        (folder / f"{block.name}.svg").write_text(charts.standalone(block))
        title = escape(block.title)
        parts.append(f"**{title}**\n\n![{title}]({FOLDER}/{block.name}.svg)")
      else:
        parts.append(_WRITERS[type(block)](block))
    if section.title == "Balance" and picture:
      parts.append(f"![Load of the experts over the steps]({FOLDER}/{picture})")
  path = out / "report.md"
  path.write_text("\n\n".join(parts) + "\n")
  return path
