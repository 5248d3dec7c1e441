"""The page: closed, escaped, and valid JSON inside."""

import html.parser
import json
import math
import re
import xml.etree.ElementTree as ElementTree

from moe_jax import report
from moe_jax.report import page
from tests.support import report_runs
from tests.support.report_runs import sweep


class Tags(html.parser.HTMLParser):
  def __init__(self):
    super().__init__()
    self.found = []

  def handle_starttag(self, tag, attributes):
    self.found.append((tag, attributes))


def test_the_page_is_closed_and_escaped(tmp_path):
  """Nothing from outside, and nobody's text becomes markup."""
  evil = "<script>alert(1)</script><img src=x onerror=alert(2)>"
  sweep(tmp_path)
  record = json.loads((tmp_path / "sweep.json").read_text())
  record["question"] = record["published"] = evil
  for entry in (*record["arms"], *record["runs"]):
    key = "name" if "name" in entry else "arm"
    entry[key] = entry[key].replace("moe", f"moe{evil}|`x`")
    entry["error"] = f"``` {evil}"
  record["runs"][0]["status"] = "failed"
  report_runs.write_json(tmp_path / "sweep.json", record)
  report_runs.write_routing(tmp_path / "moe/seed0", 4, tokens=("a", "</script>", "<!--", "d", "e"))
  report.compare(tmp_path)
  made = (tmp_path / "report.html").read_text()
  assert not re.search(r"https?://|url\(|@import", made)
  tags = Tags()
  tags.feed(made)
  assert not {tag for tag, _ in tags.found} & {"img", "link", "iframe", "object", "embed", "base"}
  attributes = [pair for _, pairs in tags.found for pair in pairs]
  assert all(value.startswith("#") for name, value in attributes if name in ("src", "href"))
  assert not [name for name, _ in attributes if name.startswith("on")]
  assert made.count("alert(1)") > 10 and "<!--" not in made
  assert made.count("<script") == made.count("</script>") == 2  # the data and the code
  data = made.split('id="data">')[1].split("</script>")[0]
  assert json.loads(data)[0]["text"]["tokens"][1] == "</script>"
  text = (tmp_path / "report.md").read_text()
  outside_fences = re.sub(r"^(```+)text\n.*?^\1$", "", text, flags=re.S | re.M)
  assert "alert(1)" in outside_fences and "<script" not in outside_fences
  assert "<img" not in outside_fences
  for drawing in (tmp_path / "report_files").glob("*.svg"):
    ElementTree.parse(drawing)


def test_json_has_no_nan():
  assert page.embedded({"a": [math.nan, 1.5, "<"]}) == '{"a":[null,1.5,"\\u003c"]}'
