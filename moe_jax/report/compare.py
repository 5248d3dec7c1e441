"""Writes report.md and report.html of a sweep, or of any runs."""

import pathlib
from typing import NamedTuple

from moe_jax.errors import DamagedError
from moe_jax.report import curves, experts, inside, page, runs, sections, table


class Report(NamedTuple):
  """A report that is written."""

  page: pathlib.Path  # report.html
  notes: list[str]  # lines to print: that the target arm has no usable run, then what is left out
  code: int  # the exit code of the program that has made it


def compare(out: pathlib.Path) -> Report:
  """Writes the report of a sweep into its folder."""
  return write_report(runs.read_sweep(pathlib.Path(out)), pathlib.Path(out))


def compare_runs(workdirs: list[pathlib.Path], out: pathlib.Path, target_arm: str = "") -> Report:
  """Writes the report of workdirs that are no sweep, compared with `target_arm`, into `out`."""
  return write_report(runs.read_workdirs(workdirs, target_arm), pathlib.Path(out))


def write_report(study: runs.Study, out: pathlib.Path) -> Report:
  """Writes the report of a study into `out`."""
  compared = table.compare_arms(study)
  parts = [
    sections.question(study),
    sections.results(study, compared),
    curves.curves_section(study, compared),
    experts.balance_section(study),
    inside.inside_section(study),
    experts.capacity_section(study),
    experts.domain_section(study),
    experts.specialisation_section(study),
    sections.failures(study),
    sections.configs(study),
  ]
  path = page.write_pages(
    out, study.title, [part for part in parts if part.blocks or part.conclusion]
  )
  damaged = [run for _, run in study.runs if run.status == "damaged"]
  notes = [study.no_target, *(f"{run.name} is left out: {run.error}" for run in damaged)]
  notes = ["".join(filter(str.isprintable, note)) for note in notes if note]
  return Report(path, notes, DamagedError.code if study.no_target else 0)
