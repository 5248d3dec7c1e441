"""The report of several runs: statistics against hand calculation, and files as they are found."""

import html.parser
import json
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from moe_jax import report
from moe_jax.config import UserError
from moe_jax.report import __main__ as command
from moe_jax.report import blocks, inside, page, runs, table
from tests.support import report_runs

FINISHED = {(arm, seed): "finished" for arm in report_runs.LOSSES for seed in (0, 1)}


def sweep(out, statuses=FINISHED, **more):
  for (arm, seed), status in statuses.items():
    if status != "waiting":
      report_runs.write_run(out / arm / f"seed{seed}", arm, seed, 0 if arm == "dense" else 4)
  report_runs.write_sweep(out, statuses, **more)
  return out


class Tags(html.parser.HTMLParser):
  def __init__(self):
    super().__init__()
    self.found = []

  def handle_starttag(self, tag, attributes):
    self.found.append((tag, attributes))


def row(text, arm):
  """Cells of the results table."""
  return next(
    line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith(f"| {arm} |")
  )


def test_statistics_by_hand(tmp_path):
  compared = table.compare_arms(runs.read_sweep(sweep(tmp_path)))
  dense, moe, bad = compared.rows
  assert compared.target == pytest.approx(2.1)
  assert moe.loss.mean == pytest.approx(1.75) and moe.loss.n == 2
  assert moe.loss.std == pytest.approx(0.3 / math.sqrt(2))  # n - 1: 0.15 * sqrt(2)
  assert moe.bits_per_byte == pytest.approx(3.5)
  # 1.6 - 2.0 and 1.9 - 2.2: paired by seed, so the seeds' own spread is gone.
  assert moe.difference.mean == pytest.approx(-0.35)
  assert moe.difference.error == pytest.approx(0.05)
  assert dense.difference is None
  # 2.5 to 1.7 over 200..300 is at 2.1 half way; the other seed is there at 300.
  assert moe.reached.steps.mean == pytest.approx(275)
  assert moe.reached.seconds.mean == pytest.approx(275)
  # One dense seed ends above the target; the mean curve is there at the last step.
  assert dense.reached.steps.mean == pytest.approx(400)
  assert dense.reached.seconds.mean == pytest.approx(200)
  assert moe.reached.speedup == pytest.approx(400 / 275)
  assert moe.reached.time_speedup == pytest.approx(200 / 275)
  assert bad.reached is None
  assert moe.train_drop == pytest.approx(0.1) and moe.drop is None
  assert moe.tokens_per_s == pytest.approx(1000.5)


def test_the_table_is_written(tmp_path):
  assert report.compare(sweep(tmp_path)) == tmp_path / "report.html"
  text = (tmp_path / "report.md").read_text()
  assert row(text, "moe")[1:7] == [
    "2", "1.7500 ± 0.2121", "3.5000", "-0.3500 ± 0.0500", "275 (1.45x)", "4.6 min (0.73x)",
  ]  # fmt: skip
  assert row(text, "bad")[5:7] == ["not reached", "not reached"]
  assert "99.0" not in text  # the total loss, with its auxiliary terms
  page_text = (tmp_path / "report.html").read_text()
  for said in ("Do experts help?", "7.5x", "1.2x to 2x", "1.7500 ± 0.2121", "275 (1.45x)"):
    assert said in text and said in page_text
  assert "python train.py --workdir=moe/seed1" in text and "note of moe" in text
  assert re.search(r"\| model.moe.arm \| dense \| moe \| bad \|", text.replace("\\_", "_"))
  assert "train.seed" not in text


def test_missing_seeds_are_said(tmp_path):
  report_runs.write_run(sweep(tmp_path) / "moe/seed1", "bad", 1, 4)
  found = table.compare_arms(runs.read_sweep(tmp_path)).rows[1].reached
  assert found.steps.mean == pytest.approx(250) and found.steps.n == 1 and found.speedup is None
  report.compare(tmp_path)
  assert row((tmp_path / "report.md").read_text(), "moe")[5] == "250 (1 of 2)"


@pytest.mark.parametrize(
  ("losses", "target", "expected"),
  [
    ([3.0, 2.0, 1.0], 1.5, 250),
    ([3.0, 2.0, 1.0], 1.0, 300),
    ([3.0, 1.0, 2.5], 2.0, 150),  # the first time
    ([3.0, 2.0, 1.0], 4.0, 100),  # before the first evaluation, nobody knows when
    ([3.0, 2.0, 1.0], 0.5, None),
    ([math.nan, 2.0, 1.0], 1.5, 250),
    ([3.0, math.nan, 1.0], 1.5, 300),
    ([math.nan, math.nan, math.nan], 1.5, None),
  ],
)
def test_crossing(losses, target, expected):
  found = table.crossing(np.array([100, 200, 300]), np.array(losses), target)
  assert found == (None if expected is None else pytest.approx(expected))


def test_spread():
  assert table.spread([]) is None and table.spread([None]) is None
  assert blocks.plus_minus(table.spread([1.5])) == "1.5000"  # one seed has no spread
  assert blocks.plus_minus(table.spread([1.0, 2.0, 6.0])) == "3.0000 ± 2.6458"  # sqrt((4+1+9)/2)
  assert blocks.plus_minus(table.spread([1.0, math.nan])) == "nan"  # a divergence is not left out


def test_runs_that_did_not_finish(tmp_path):
  statuses = FINISHED | {("moe", 0): "failed", ("moe", 1): "running", ("bad", 1): "waiting"}
  sweep(tmp_path, statuses)
  report_runs.write_run(tmp_path / "moe/seed0", "moe", 0, 4, steps=(100, 200))
  path = tmp_path / "moe/seed1/metrics.jsonl"
  path.write_text(path.read_text()[:-30])  # the last line is being written
  alarm = {"step": 7, "alarm": "collapse", "layer": 1, "value": 1.0, "limit": 0.5, "message": "oh"}
  (tmp_path / "moe/seed1/alarms.jsonl").write_text(json.dumps(alarm) + '\n{"step": 8, "al')
  (tmp_path / "bad/seed0/eval.json").write_text('{"loss": 1.0, "st')
  report.compare(tmp_path)
  text = (tmp_path / "report.md").read_text()
  assert row(text, "moe")[1:3] == ["0 of 2", "-"] and row(text, "moe")[-1] == "1"
  assert row(text, "bad")[1:3] == ["1 of 2", "3.0000"]
  assert "error: loss is nan" in text and "| moe | 0 | failed | 200 |" in text
  assert "| moe | 1 | running | 400 |" in text and "| moe | 1 | collapse | 1 | 7 | 1 | oh |" in text
  assert "3 finished, 1 failed, 1 running, 1 waiting" in text


def test_nothing_ran_yet(tmp_path):
  report.compare(sweep(tmp_path, dict.fromkeys(FINISHED, "waiting")))
  assert row((tmp_path / "report.md").read_text(), "moe")[1:3] == ["0 of 2", "-"]


def test_losses_of_one_source(tmp_path):
  """eval.json is used when all finished runs have one of their last step, else for none."""
  sweep(tmp_path)
  for arm, seed in FINISHED:
    report_runs.write_eval(tmp_path / arm / f"seed{seed}", 1.0 + seed, drop_fraction_Z=[0.2, 0.4])
  compared = table.compare_arms(runs.read_sweep(tmp_path))
  assert compared.rows[1].loss.mean == pytest.approx(1.5) and "1,000 tokens" in compared.source
  assert compared.rows[1].drop == pytest.approx(0.3)
  assert compared.target == pytest.approx(2.1)  # of the curves, which are what reaches it
  report_runs.write_eval(tmp_path / "bad/seed0", 1.0, step=300)
  compared = table.compare_arms(runs.read_sweep(tmp_path))
  assert compared.rows[1].loss.mean == pytest.approx(1.75) and "eval.json" not in compared.source


def test_sections_of_eval_and_routing(tmp_path):
  sweep(tmp_path)
  for arm, seed in FINISHED:
    workdir = tmp_path / arm / f"seed{seed}"
    capacity = [
      {"capacity_factor": 1.0, "loss": 2.0 + seed, "drop_fraction_Z": [0.1, 0.3]},
      {"capacity_factor": "inf", "loss": 1.5, "drop_fraction_Z": [0.0, 0.0]},
    ]
    more = {"domains": {"prose": {"bits_per_byte": 1.25 + seed}}}
    more |= {"causal": {"loss": 2.5, "teacher_forced_loss": 2.25, "gap": 0.25}}
    report_runs.write_eval(
      workdir, 1.0, **({} if arm == "dense" else more | {"capacity": capacity})
    )
    if arm != "dense":
      report_runs.write_routing(workdir, 4)
  report.compare(tmp_path)
  text = (tmp_path / "report.md").read_text()
  assert "| arm | 1 | no drops |" in text
  assert "| moe | 2.5000 ± 0.7071 / 20.0 | 1.5000 ± 0.0000 / 0.0 |" in text
  assert "| moe | 1.7500 ± 0.7071 |" in text
  assert "| moe | 2.2500 ± 0.0000 | 2.5000 ± 0.0000 | 0.2500 ± 0.0000 |" in text
  assert "| moe | 3 | 0.250 | 40.0 | 25.0 | 60.0 | 45.0 |" in text
  assert "| moe | 5.0 | 15.0 |" in text  # drops by choice
  pictures = re.findall(r"\]\((report_files/\S+)\)", text)
  assert len(pictures) == 10
  for name in pictures:
    if name.endswith(".svg"):
      ElementTree.parse(tmp_path / name)
    else:
      assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_heat_map_bins():
  lines = [{"step": s, "load_ZE": [[s / 10, 1 - s / 10]]} for s in (1, 2, 3, 4)]
  run = runs.Run(name="a", seed=0, status="finished", train=lines)
  found = inside.heat(run, 2)
  assert found["steps"] == [2, 4]
  # Loads 0.15 and 0.35 of two experts, whose fair share is a half.
  np.testing.assert_allclose(found["load_ZES"], [[[0.3, 0.7], [1.7, 1.3]]])


def test_arms_of_plain_workdirs(tmp_path, capsys, monkeypatch):
  names = {"dense-s0": ("dense", 0), "dense-s1": ("dense", 1), "a/moe/0": ("moe", 0),
           "a/moe/1": ("moe", 1), "alone_s1": ("bad", 1)}  # fmt: skip
  for name, (arm, seed) in names.items():
    report_runs.write_run(tmp_path / name, arm, seed)
  path = tmp_path / "alone_s1/metrics.jsonl"
  path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
  (tmp_path / "alone_s1/log.txt").write_text("error: killed\n")
  paths = [tmp_path / name for name in names]
  study = runs.read_workdirs(paths, "dense")
  assert {a.name: [r.name for r in a.runs] for a in study.arms} == {
    "dense": ["dense-s0", "dense-s1"], "a/moe": ["a/moe/0", "a/moe/1"], "alone_s1": ["alone_s1"],
  }  # fmt: skip
  assert study.arms[2].runs[0].status == "unfinished" and not study.arms[2].finished
  monkeypatch.setattr(sys, "argv", ["report", *map(str, paths), "--target=dense"])
  command.main()
  assert str(tmp_path / "report.html") in capsys.readouterr().out
  text = (tmp_path / "report.md").read_text()
  assert row(text, "a/moe")[4] == "-0.3500 ± 0.0500" and "error: killed" in text
  with pytest.raises(UserError, match="--target=x: no such arm; there are: dense, a/moe"):
    runs.read_workdirs(paths, "x")
  with pytest.raises(UserError, match="neither a run"):
    runs.read_workdirs([tmp_path / "nothing"])
  with pytest.raises(UserError, match="no sweep"):
    report.compare(tmp_path)


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


def test_it_needs_no_model():
  code = "import sys, moe_jax.report.__main__ as m, moe_jax.report; print(sorted(sys.modules))"
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert "'matplotlib'" in done.stdout
  for name in ("jax", "flax", "moe_jax.transformer"):
    assert f"'{name}'" not in done.stdout
