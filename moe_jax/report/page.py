"""Writes report.md and report.html of a sweep, or of any runs, from the templates beside this file.

What a run holds is text: the one environment escapes every value for HTML, the other for Markdown.
"""

import base64
import hashlib
import html
import pathlib
import re
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from moe_jax.errors import DamagedError, UserError
from moe_jax.report import charts, experts, inside, reading, runs, sections, table
from moe_jax.report.blocks import Chart, Excerpt, printable
from moe_jax.storage import files

FOLDER = "report_files"  # of the pictures of report.md


def escaped(value: Any) -> str:
  """Escapes a value, so that it makes no HTML, links, emphasis or cells in Markdown."""
  if isinstance(value, Markup):
    return value
  text = html.escape(printable(str(value)), quote=False).replace("\\", "\\\\")
  return re.sub(r"([|*_`\[\]#])", r"\\\1", text)


def fenced(text: str) -> Markup:
  """Returns a fenced block of Markdown, with a fence that does not occur in the text."""
  fence = "`" * max(3, *(len(ticks) + 1 for ticks in re.findall("`+", text)), 0)
  return Markup(f"{fence}text\n{printable(text)}\n{fence}")


def _environment(**options: Any) -> jinja2.Environment:
  made = jinja2.Environment(
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    **options,
  )
  made.filters |= {
    "kind": lambda block: type(block).__name__,
    "words": lambda cell: " ".join(str(cell).split()),
    "fenced": fenced,
  }
  return made


_MARKDOWN = _environment(autoescape=False, finalize=escaped)
_HTML = _environment(
  autoescape=True, finalize=lambda v: v if isinstance(v, Markup) else printable(str(v))
)


class Report(NamedTuple):
  """A report that is written."""

  page: pathlib.Path  # report.html
  notes: list[str]  # lines to print: that the target arm has no usable run, then what is left out
  code: int  # the exit code of the program that has made it


def compare(out: pathlib.Path) -> Report:
  """Writes the report of a sweep into its folder."""
  return write_report(runs.read_sweep(out), out)


def compare_runs(workdirs: list[pathlib.Path], out: pathlib.Path, target_arm: str = "") -> Report:
  """Writes the report of workdirs that are no sweep, compared with `target_arm`, into `out`."""
  return write_report(runs.read_workdirs(workdirs, target_arm), out)


def write_report(study: runs.Study, out: pathlib.Path) -> Report:
  """Writes report.md, its pictures, and report.html of a study into `out`."""
  compared = table.compare_arms(study)
  parts = [
    sections.question(study),
    sections.results(study, compared),
    sections.curves(study, compared),
    experts.balance_section(study),
    inside.inside_section(study),
    experts.capacity_section(study),
    experts.domain_section(study),
    experts.specialisation_section(study),
    sections.failures(study),
    sections.configs(study),
  ]
  folder, path = out / FOLDER, out / "report.html"
  with files.storage_errors(folder):
    folder.mkdir(parents=True, exist_ok=True)
  if not reading.is_inside(folder, out):
    raise UserError(f"{folder} is a link that leads out of {out}; remove it")
  shown = [part._replace(blocks=part.filled) for part in parts if part.always or part.filled]
  blocks = [block for part in shown for block in part.blocks]
  facts = {"title": study.title, "sections": shown, "folder": FOLDER}
  markdown = _MARKDOWN.get_template("report.md.j2").render(facts)
  counts = [len(block.experts.rows) for block in blocks if isinstance(block, Excerpt)]
  colours = {"colours": charts.COLOURS, "experts": max(counts, default=0)}
  style = _HTML.get_template("page.css").render(colours)
  digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
  page = _HTML.get_template("report.html.j2").render(facts, style=Markup(style), digest=digest)
  for chart in (block for block in blocks if isinstance(block, Chart)):
    files.write(folder / f"{chart.name}.svg", chart.svg)
  files.write(path.with_suffix(".md"), markdown)
  files.write(path, page)
  damaged = [run for _, run in study.runs if run.status == "damaged"]
  notes = [study.no_target, *(f"{run.name} is left out: {run.error}" for run in damaged)]
  notes = ["".join(filter(str.isprintable, note)) for note in notes if note]
  return Report(path, notes, DamagedError.code if study.no_target else 0)
