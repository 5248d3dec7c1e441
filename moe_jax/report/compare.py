"""Writes report.md and report.html of a sweep, or of any runs."""

import pathlib

from moe_jax.report import curves, experts, inside, markdown, page, runs, sections, table


def compare(out: pathlib.Path) -> pathlib.Path:
  """Writes the report of a sweep into its folder; returns the path of report.html."""
  out = pathlib.Path(out)
  return write(runs.read_sweep(out), out)


def compare_runs(
  workdirs: list[pathlib.Path], out: pathlib.Path, target_arm: str = ""
) -> pathlib.Path:
  """Writes the report of workdirs that are no sweep into the folder `out`.

  `target_arm` is the arm that the others are compared with. Returns the path of report.html.
  """
  return write(runs.read_workdirs(workdirs, target_arm), pathlib.Path(out))


def write(study: runs.Study, out: pathlib.Path) -> pathlib.Path:
  """Writes the report of a study into `out`; returns the path of report.html."""
  compared = table.compare_arms(study)
  parts = [
    sections.question(study),
    sections.results(study, compared),
    curves.section(study, compared),
    experts.balance_section(study),
    experts.capacity_section(study),
    experts.domain_section(study),
    experts.specialisation_section(study),
    sections.failures(study),
    sections.configs(study),
  ]
  parts = [section for section in parts if section.blocks or section.conclusion]
  (out / markdown.FOLDER).mkdir(parents=True, exist_ok=True)
  picture = "load.png" if inside.picture(study, out / markdown.FOLDER / "load.png") else ""
  markdown.write(out, study.title, parts, picture)
  path = out / "report.html"
  path.write_text(page.render(study.title, parts, inside.data(study)))
  return path
