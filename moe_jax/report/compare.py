"""report.md and report.html of a sweep, or of any runs."""

import pathlib

from moe_jax.report import experts, inside, markdown, page, runs, sections, table


def compare(out: pathlib.Path) -> pathlib.Path:
  """Writes the report of a sweep into its folder; returns the path of report.html."""
  out = pathlib.Path(out)
  return write(runs.read_sweep(out), out)


def compare_runs(
  workdirs: list[pathlib.Path], out: pathlib.Path, target_arm: str = ""
) -> pathlib.Path:
  """The same for workdirs of no sweep, into the folder `out`."""
  return write(runs.read_workdirs(workdirs, target_arm), pathlib.Path(out))


def write(study: runs.Study, out: pathlib.Path) -> pathlib.Path:
  compared = table.compare(study)
  found = [
    sections.question(study),
    sections.results(study, compared),
    sections.curves(study, compared),
    experts.balance(study),
    experts.capacity(study),
    experts.by_domain(study),
    experts.specialisation(study),
    sections.failures(study),
    sections.configs(study),
  ]
  found = [section for section in found if section.blocks]
  (out / markdown.FOLDER).mkdir(parents=True, exist_ok=True)
  picture = "load.png" if inside.picture(study, out / markdown.FOLDER / "load.png") else ""
  markdown.write(out, study.title, found, picture)
  path = out / "report.html"
  path.write_text(page.render(study.title, found, inside.data(study)))
  return path
