"""What the pages for people name exists: links, headings, paths, scripts, flags, config fields."""

import re

import pytest

from moe_jax.config.run import field_names
from tests.support.toys import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# A path below one of these folders, or below moe_jax/, where tables leave it out.
PATH = re.compile(
  r"(?<![\w/.-])(?:(?:tests|configs|moe_jax|docs|benchmarks)/[\w./-]*\w|\w+/[\w/]*\w\.py)\b"
)
COMMAND = re.compile(r"python (?:-m )?([\w./]+)((?:[^\n`|&]|\|\|)*)")


def text_of(page):
  return page.read_text().replace("\\\n", " ")


def anchors(page):
  """The ids that GitHub gives to the headings of a page."""
  titles = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
  return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def missing(page):
  """What a page names and is not there, one string each."""
  text, found = text_of(page), []
  for target in re.findall(r"\]\(([^)\s]+)\)", text):
    if re.match(r"[a-z]+:", target):
      continue
    name, _, anchor = target.partition("#")
    there = page.parent / name if name else page
    if not there.exists() or (anchor and anchor not in anchors(there)):
      found.append(f"link {target}")
  for name in PATH.findall(re.sub(r"https?://\S+", "", text)):
    if not (ROOT / name).exists() and not (ROOT / "moe_jax" / name).exists():
      found.append(f"path {name}")
  for script, arguments in COMMAND.findall(text):
    found += missing_of_command(script, arguments)
  targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
  found += [
    f"make {t}" for t in re.findall(r"(?:`|^|    )make ([a-z-]+)", text) if t not in targets
  ]
  fields = re.findall(r"--?config\.([a-z_0-9.]*\w)", text)
  return found + [f"field config.{name}" for name in fields if name not in field_names()]


def missing_of_command(script, arguments):
  """A script or flags that are not there; other modules, such as pip, are not looked at."""
  if script == "benchmarks":
    source = ROOT / "benchmarks/__main__.py"
  elif script.endswith(".py"):
    source = ROOT / script
  else:
    return []
  if not source.exists():
    return [f"script {script}"]
  text = source.read_text()
  text += (ROOT / "moe_jax/start/command_line.py").read_text()
  defined = re.findall(r'(?:flag|add|add_argument)\(\s*"-*([\w-]+)"', text)
  flags = re.findall(r"(?<=\s)--([a-z_-]+)\b(?!\.)", arguments)
  return [f"{script} --{flag}" for flag in flags if flag not in (*defined, "config", "help")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_exists(page):
  assert not missing(page)


def test_the_index_has_every_page():
  index = (ROOT / "docs/README.md").read_text()
  for page in PAGES[2:]:
    assert page.name == "README.md" or f"({page.name})" in index, page.name
