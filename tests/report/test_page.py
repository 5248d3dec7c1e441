"""The page: closed, escaped, and valid JSON inside."""

import base64
import hashlib
import html.parser
import json
import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from moe_jax.report import page
from tests.support import report_runs
from tests.support.report_runs import write_report

UNPRINTABLE = "\x00\x1b[31m\x7f\u202e\udfff\ud800\uffff"


class Tags(html.parser.HTMLParser):
  def __init__(self):
    super().__init__()
    self.found = []

  def handle_starttag(self, tag, attributes):
    self.found.append((tag, attributes))


@pytest.fixture(scope="module")
def evil(tmp_path_factory):
  """The report of a sweep whose texts are all markup, quotes and letters that cannot be shown."""
  markup = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'" + UNPRINTABLE
  return write_report(report_runs.markup_sweep(tmp_path_factory.mktemp("evil"), markup))


def test_the_page_loads_nothing_and_runs_no_code_of_a_text(evil):
  """No address outside, and no element or attribute that needs one, or a style of its own."""
  assert not re.search(r"https?://|url\(|@import", evil.html)
  parser = Tags()
  parser.feed(evil.html)
  tags = {tag for tag, _ in parser.found}
  assert not tags & {"img", "link", "iframe", "object", "embed", "base"}
  attributes = [pair for _, pairs in parser.found for pair in pairs]
  assert all(value.startswith("#") for name, value in attributes if name in ("src", "href"))
  assert not [name for name, _ in attributes if name.startswith("on") or name == "style"]


def test_text_of_a_sweep_is_shown_and_no_markup(evil):
  page = evil.html
  assert page.count("alert(1)") > 10 and "<!--" not in page
  assert page.count("<script") == page.count("</script>") == 2  # the data and the code


def test_text_of_a_run_cannot_end_the_data(evil):
  data = evil.html.split('id="data">')[1].split("</script>")[0]
  assert json.loads(data)[0]["text"]["tokens"][1].startswith("</script>")


@pytest.mark.parametrize("kind", ["script", "style"])
def test_the_page_allows_its_own_script_and_style_alone(kind, evil):
  """By their hashes, taken here of the bytes of the file as a browser does."""
  policy = re.search(r'Security-Policy"\s+content="([^"]*)"', evil.html)[1]
  allowed = dict(part.split(maxsplit=1) for part in policy.split(";"))
  raw = (evil.folder / "report.html").read_bytes()
  own = raw.split(f"<{kind}>".encode())[1].split(f"</{kind}>".encode())[0]
  digest = base64.b64encode(hashlib.sha256(own).digest()).decode()
  assert allowed[f"{kind}-src"] == f"'sha256-{digest}'" and allowed["default-src"] == "'none'"
  assert "unsafe" not in policy


def test_letters_that_cannot_be_shown_are_replaced(evil):
  for path in (evil.folder / "report.html", evil.folder / "report.md"):
    text = path.read_bytes().decode()  # it is UTF-8
    assert "\ufffd[31m" in text
    assert not set(text) & set(UNPRINTABLE.replace("[31m", ""))


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
