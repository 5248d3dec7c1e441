"""Workdirs that no sweep made: their arms, and the command that compares them."""

import sys

import pytest

from moe_jax.errors import UserError
from moe_jax.report import __main__ as command
from moe_jax.report import page, runs
from tests.support import report_runs
from tests.support.report_runs import row
from tests.support.scripts import python


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
  """Runs of no sweep; the last one was killed."""
  folder = tmp_path_factory.mktemp("workdirs")
  names = {
    "dense-s0": ("dense", 0),
    "dense-s1": ("dense", 1),
    "a/moe/0": ("moe", 0),
    "a/moe/1": ("moe", 1),
    "alone_s1": ("bad", 1),
  }
  for name, (arm, seed) in names.items():
    report_runs.write_run(folder / name, arm, seed)
  path = folder / "alone_s1/metrics.jsonl"
  path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
  (folder / "alone_s1/log.txt").write_text("error: killed\n")
  return [folder / name for name in names]


def test_names_that_differ_by_the_seed_are_one_arm(workdirs):
  study = runs.read_workdirs(workdirs, "dense")
  assert {a.name: [r.name for r in a.runs] for a in study.arms} == {
    "dense": ["dense-s0", "dense-s1"],
    "a/moe": ["a/moe/0", "a/moe/1"],
    "alone_s1": ["alone_s1"],
  }


def test_the_command_writes_the_report_and_says_where(workdirs, capsys, monkeypatch):
  monkeypatch.setattr(sys, "argv", ["report", *map(str, workdirs), "--target=dense"])
  command.main()
  folder = workdirs[0].parent
  assert str(folder / "report.html") in capsys.readouterr().out
  text = (folder / "report.md").read_text()
  assert row(text, "a/moe")[4] == "-0.3500 ± 0.0500" and "error: killed" in text


def test_what_is_no_arm_no_run_or_no_sweep_is_refused(workdirs, tmp_path):
  with pytest.raises(UserError, match="--target=x: no such arm; there are: dense, a/moe"):
    runs.read_workdirs(workdirs, "x")
  with pytest.raises(UserError, match="neither a run"):
    runs.read_workdirs([tmp_path / "nothing"])
  with pytest.raises(UserError, match="no sweep"):
    page.compare(tmp_path)


def test_the_command_imports_no_jax():
  code = "import sys; from moe_jax.report import __main__, page, single; print(sys.modules.keys())"
  done = python("-c", code, check=True)
  assert "'matplotlib'" in done.stdout
  for name in ("jax", "flax", "moe_jax.model"):
    assert f"'{name}'" not in done.stdout
