"""The page and the Markdown: closed, escaped, and with the drawings inside."""

import base64
import hashlib
import html
import html.parser
import re
import xml.etree.ElementTree as ElementTree

import pytest

from moe_jax.report import blocks
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


def test_what_is_empty_is_left_out():
  small, code = blocks.Text("note", small=True), blocks.Code("log", " \n")
  empty, full = blocks.Table("none", ["arm"], []), blocks.Table("", ["arm"], [["a"]])
  assert blocks.Section("s", [small, empty, full, code]).filled == [small, full]
  assert blocks.Section("s", [small, empty, code]).filled == []
  assert blocks.Section("s", [small, empty, code], always=True).filled == [small]


def test_the_page_loads_nothing_and_runs_no_code_of_a_text(evil):
  """No script, no address outside, and no element or attribute that needs one, or a style."""
  assert not re.search(r"https?://|url\(|@import", evil.html)
  parser = Tags()
  parser.feed(evil.html)
  tags = {tag for tag, _ in parser.found}
  assert not tags & {"script", "svg", "link", "iframe", "object", "embed", "base"}
  attributes = [pair for _, pairs in parser.found for pair in pairs]
  sources = [value for name, value in attributes if name == "src"]
  assert len(sources) >= 6 and tags >= {"h1", "table", "img", "details", "i"}
  assert all(value.startswith("data:image/svg+xml;base64,") for value in sources)
  assert all(value.startswith("#") for name, value in attributes if name == "href")
  assert not [name for name, _ in attributes if name.startswith("on") or name == "style"]


def test_text_of_a_sweep_is_shown_and_no_markup(evil):
  assert evil.html.count("alert(1)") > 10 and "<!--" not in evil.html
  assert html.unescape(evil.html).count("</script><script>alert(1)") > 10


def test_the_page_allows_its_own_style_alone(evil):
  """By its hash, taken here of the bytes of the file as a browser does; and no script at all."""
  policy = re.search(r'Security-Policy" content="([^"]*)"', evil.html)[1]
  allowed = dict(part.split(maxsplit=1) for part in policy.split(";"))
  raw = (evil.folder / "report.html").read_bytes()
  own = raw.split(b"<style>")[1].split(b"</style>")[0]
  digest = base64.b64encode(hashlib.sha256(own).digest()).decode()
  assert allowed == {
    "default-src": "'none'",
    "img-src": "data:",
    "style-src": f"'sha256-{digest}'",
    "base-uri": "'none'",
    "form-action": "'none'",
  }


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
  drawings = sorted((evil.folder / "report_files").glob("*.svg"))
  inside = [base64.b64decode(found) for found in re.findall(r"svg\+xml;base64,([^\"]*)", evil.html)]
  assert sorted(inside) == sorted(drawing.read_bytes() for drawing in drawings) != []
  for drawing in inside:
    tags = {node.tag.rpartition("}")[2] for node in ElementTree.fromstring(drawing).iter()}
    assert "text" in tags and not tags & {"script", "foreignObject", "a"}
  assert any(b"alert(1)" in drawing for drawing in inside)
