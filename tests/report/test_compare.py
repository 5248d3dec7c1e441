"""The report of several runs: which text, tables and pictures it holds."""

import json
import re
import xml.etree.ElementTree as ElementTree

from moe_jax import report
from tests.support import report_runs
from tests.support.report_runs import FINISHED, row, sweep


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


def test_sections_of_eval_and_routing(tmp_path):
  sweep(tmp_path)
  for arm, seed in FINISHED:
    workdir = tmp_path / arm / f"seed{seed}"
    capacity = [
      {"capacity_factor": 1.0, "loss": 2.0 + seed, "drop_fraction_Z": [0.1, 0.3]},
      {"capacity_factor": 0, "loss": 1.5, "drop_fraction_Z": [0.0, 0.0]},
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
  assert len(pictures) == 9
  for name in pictures:
    if name.endswith(".svg"):
      ElementTree.parse(tmp_path / name)
    else:
      assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
