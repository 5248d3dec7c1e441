"""Writes report.md, with its pictures as separate files."""

import html
import pathlib
import re
from collections.abc import Callable

from moe_jax.report import blocks, charts
from moe_jax.report.blocks import ArmName, Cell, Chart, Code, Section, Table, Text
from moe_jax.storage import files

FOLDER = "report_files"


def escape(text: str) -> str:
  """Escapes a text, so that it makes no HTML, links, emphasis or cells in Markdown."""
  text = html.escape(blocks.printable(text), quote=False).replace("\\", "\\\\")
  return re.sub(r"([|*_`\[\]#])", r"\\\1", text)


def cell(value: Cell) -> str:
  """Returns the Markdown of a table's cell."""
  text = value.name if isinstance(value, ArmName) else value
  return escape(" ".join(text.split()))


def table(block: Table) -> str:
  """Returns the Markdown of a table."""
  marks = [":--" if i in block.left else "--:" for i in range(len(block.head))]
  lines = [map(cell, block.head), marks, *(map(cell, row) for row in block.rows)]
  title = f"**{escape(block.title)}**\n\n" if block.title else ""
  return title + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def text(block: Text) -> str:
  """Returns the Markdown of paragraphs; two spaces at the end of a line are a line break."""
  parts = [
    "  \n".join(f"**{escape(a)}** {escape(b)}" if a else escape(b) for a, b in lines)
    for lines in blocks.paragraphs(block.text)
  ]
  return "\n\n".join(f"<sub>{part}</sub>" if block.small else part for part in parts)


def code(block: Code) -> str:
  """Returns the Markdown of a fenced block, with a fence that does not occur in it."""
  longest = max(map(len, re.findall(r"`+", block.text)), default=0)
  fence = "`" * max(3, longest + 1)
  return f"{cell(block.title)}:\n\n{fence}text\n{blocks.printable(block.text)}\n{fence}"


_WRITERS: dict[type, Callable[..., str]] = {Table: table, Text: text, Code: code}


def write(out: pathlib.Path, title: str, sections: list[Section], picture: str) -> pathlib.Path:
  """Writes out/report.md and returns its path.

  Args:
    out: folder of the report.
    title: of the report.
    sections: of the report; their charts become files in the folder `FOLDER` of `out`.
    picture: name of the heat map's file in that folder, or ''.
  """
  folder = out / FOLDER
  parts = [f"# {cell(title)}"]
  for section in sections:
    parts.append(f"## {escape(section.title)}")
    if section.conclusion:
      parts.append("> " + escape(section.conclusion).replace("\n", "  \n> "))
    for block in section.blocks:
      if isinstance(block, Chart):
        files.write(folder / f"{block.name}.svg", charts.standalone(block))
        title = escape(block.title)
        parts.append(f"**{title}**\n\n![{title}]({FOLDER}/{block.name}.svg)")
      else:
        parts.append(_WRITERS[type(block)](block))
    if section.title == "Balance" and picture:
      parts.append(f"![Load of the experts over the steps]({FOLDER}/{picture})")
  path = out / "report.md"
  files.write(path, "\n\n".join(parts) + "\n")
  return path
