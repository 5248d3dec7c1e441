"""The page: closed, escaped, and valid JSON inside."""

import html.parser
import json
import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from moe_jax.report import page
from tests.support import report_runs
from tests.support.report_runs import sweep, write_report


class Tags(html.parser.HTMLParser):
  def __init__(self):
    super().__init__()
    self.found = []

  def handle_starttag(self, tag, attributes):
    self.found.append((tag, attributes))


@pytest.fixture(scope="module")
def evil(tmp_path_factory):
  """The report of a sweep whose texts are all markup."""
  markup = "<script>alert(1)</script><img src=x onerror=alert(2)>"
  out = sweep(tmp_path_factory.mktemp("evil"))
  record = json.loads((out / "sweep.json").read_text())
  record["question"] = record["published"] = markup
  for entry in (*record["arms"], *record["runs"]):
    key = "name" if "name" in entry else "arm"
    entry[key] = entry[key].replace("moe", f"moe{markup}|`x`")
    entry["error"] = f"``` {markup}"
  record["runs"][0]["status"] = "failed"
  report_runs.write_json(out / "sweep.json", record)
  report_runs.write_routing(out / "moe/seed0", 4, tokens=("a", "</script>", "<!--", "d", "e"))
  return write_report(out)


@pytest.fixture
def tags(evil):
  """(tag, attributes) of all elements of the page."""
  parser = Tags()
  parser.feed(evil.html)
  return parser.found


def test_the_page_names_no_address_outside(evil):
  assert not re.search(r"https?://|url\(|@import", evil.html)


def test_the_page_has_no_element_that_loads_something(tags):
  assert not {tag for tag, _ in tags} & {"img", "link", "iframe", "object", "embed", "base"}


def test_links_stay_in_the_page(tags):
  attributes = [pair for _, pairs in tags for pair in pairs]
  assert all(value.startswith("#") for name, value in attributes if name in ("src", "href"))


def test_no_attribute_runs_code(tags):
  assert not [name for _, pairs in tags for name, _ in pairs if name.startswith("on")]


def test_text_of_a_sweep_is_shown_and_no_markup(evil):
  page = evil.html
  assert page.count("alert(1)") > 10 and "<!--" not in page
  assert page.count("<script") == page.count("</script>") == 2  # the data and the code


def test_text_of_a_run_cannot_end_the_data(evil):
  data = evil.html.split('id="data">')[1].split("</script>")[0]
  assert json.loads(data)[0]["text"]["tokens"][1] == "</script>"


def test_the_markdown_has_no_markup_outside_fences(evil):
  outside = re.sub(r"^(```+)text\n.*?^\1$", "", evil.markdown, flags=re.S | re.M)
  assert "alert(1)" in outside and "<script" not in outside
  assert "<img" not in outside


def test_the_drawings_are_well_formed(evil):
  drawings = list((evil.folder / "report_files").glob("*.svg"))
  assert drawings
  for drawing in drawings:
    ElementTree.parse(drawing)


def test_json_has_no_nan():
  assert page.embedded({"a": [math.nan, 1.5, "<"]}) == '{"a":[null,1.5,"\\u003c"]}'
