"""Every field of a config and every word that it can take, as text and as docs/config.md:

python -m moe_jax.config.docs > docs/config.md
"""

import inspect
import itertools
import operator
import textwrap
from collections.abc import Iterator
from typing import NamedTuple

from moe_jax.config.fields import LARGEST_INT, Choice, spelled, walk
from moe_jax.config.run import Config


class FieldRow(NamedTuple):
  """What is known about a field."""

  name: str  # in its section
  kind: type
  default: str
  help: str
  bounds: str


def documented_sections() -> Iterator[tuple[str, str, list[FieldRow]]]:
  """(name, what it is about, its fields) of each section: "model", "model.moe", and so on."""
  fields = ((*name.rsplit(".", 1), field, default) for name, field, default in walk(Config()))
  for name, members in itertools.groupby(fields, operator.itemgetter(0)):
    rows = [
      FieldRow(leaf, of.type, spelled(default), of.metadata["help"], str(of.metadata["bounds"]))
      for _, leaf, of, default in members
    ]
    yield name, inspect.getdoc(operator.attrgetter(name)(Config())) or "", rows


def text() -> str:
  """For --help: a paragraph for each section, a line or two for each field."""
  lines = []
  for name, about, rows in documented_sections():
    lines.append(f"config.{name}: {about}")
    for row in rows:
      words = "|".join(c.value for c in row.kind) if issubclass(row.kind, Choice) else row.bounds
      line = f"  {f'{row.name} = {row.default}':<28} {row.help}" + f" ({words})" * bool(words)
      lines += textwrap.wrap(line, 100, subsequent_indent=" " * 31, break_on_hyphens=False)
    lines.append("")
  return "\n".join(lines)


def markdown() -> str:
  lines = [
    "# Configuration",
    "",
    "Every field of a run. Set one in a config file, or on the command line of `train.py`,",
    "`sweep.py` and `python -m benchmarks inference`: `--config.model.moe.top_k=1`.",
    "`train.py --config=FILE --diff` prints where a config differs from these defaults. An",
    f"integer is at most {LARGEST_INT}, where its row does not say otherwise.",
    "",
    "This page is written by `python -m moe_jax.config.docs > docs/config.md` from",
    "[`moe_jax/config`](../moe_jax/config).",
  ]
  kinds: dict[type[Choice], None] = {}
  for name, about, rows in documented_sections():
    lines += ["", f"## config.{name}", "", about, ""]
    lines += ["| field | default | meaning | values |", "|---|---|---|---|"]
    for row in rows:
      values = row.bounds
      if issubclass(row.kind, Choice):
        kinds[row.kind] = None
        values = f"[{row.kind.__name__}](#{row.kind.__name__.lower()})"
      elif row.kind is bool:
        values = "true, false"
      default = f"`{row.default}`" if row.default else "empty"
      lines.append(f"| `{row.name}` | {default} | {row.help} | {values} |")
  for kind in kinds:
    lines += ["", f"## {kind.__name__}", "", inspect.getdoc(kind) or "", ""]
    lines += [f"- `{c.value}`" + f": {c.meaning}" * bool(c.meaning) for c in kind]
  return "\n".join(lines) + "\n"


if __name__ == "__main__":
  print(markdown(), end="")
