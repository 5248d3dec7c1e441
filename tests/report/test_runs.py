"""Workdirs that no sweep made: their arms, and the command that compares them."""

import subprocess
import sys

import pytest

from moe_jax import report
from moe_jax.config import UserError
from moe_jax.report import __main__ as command
from moe_jax.report import runs
from tests.support import report_runs
from tests.support.report_runs import row


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


def test_it_needs_no_model():
  code = "import sys, moe_jax.report.__main__ as m, moe_jax.report; print(sorted(sys.modules))"
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert "'matplotlib'" in done.stdout
  for name in ("jax", "flax", "moe_jax.transformer"):
    assert f"'{name}'" not in done.stdout
