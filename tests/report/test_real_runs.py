"""Reports on runs that train.py, eval.py, the import and the upcycling have made: none is damaged.

The runs are those of tests/support/real_runs.py. Numbers are compared with the runs' eval.json.
"""

import json
import re
import shutil
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from moe_jax.errors import DamagedError, si
from moe_jax.report import __main__ as command
from moe_jax.report import page, runs
from moe_jax.start import command_line
from moe_jax.storage import workdir as workdir_lib
from moe_jax.sweep import runner
from tests.support import real_runs
from tests.support.report_runs import row
from tests.support.toys import ROOT

LEAD = "The target arm, dense, has no usable run: no arm is compared with it."


@pytest.fixture(scope="module")
def real(shared_folder):
  return real_runs.real_runs(shared_folder)


@pytest.fixture(scope="module")
def found(real):
  return {name: runs.read_run(real / place, name) for name, place in real_runs.RUNS.items()}


def evaluation(real, name):
  return json.loads((real / real_runs.RUNS[name] / "eval.json").read_text())


@pytest.mark.parametrize("name", [name for name in real_runs.RUNS if name != "killed"])
def test_a_real_run_is_usable(name, found):
  assert (found[name].status, found[name].error) == ("finished", "")


def test_a_killed_run_is_unfinished_at_its_last_whole_line(found, real):
  assert (found["killed"].status, found["killed"].step) == ("unfinished", real_runs.KILLED_STEP - 1)
  lines = real / "killed" / workdir_lib.METRICS
  assert not lines.read_bytes().endswith(b"\n")  # it was killed while it wrote a line


def test_a_run_that_went_on_has_every_step_once(found):
  assert [line["step"] for line in found["moe"].train] == list(range(1, 7))
  assert (found["moe"].sizes["Z"], found["dense"].sizes["Z"]) == (2, 0)


@pytest.fixture(scope="module")
def together(real, tmp_path_factory):
  """The report on all of the runs, with the dense one as the target, and its text."""
  out = tmp_path_factory.mktemp("together")
  workdirs = [real / place for place in real_runs.RUNS.values()]
  written = page.compare_runs(workdirs, out, real_runs.RUNS["dense"])
  return written, (out / "report.md").read_text()


def test_the_report_leaves_no_real_run_out(together):
  written, text = together
  assert written.notes == [] and written.code == 0
  assert "6 arms, 6 runs: 5 finished, 1 unfinished." in text
  assert "| imported | 0 |" not in text  # weights that were not trained here have no late training


@pytest.mark.parametrize("name", ["dense", "moe", "one", "upcycled", "imported"])
def test_the_table_has_the_numbers_of_eval_json(name, together, real):
  cells, said = row(together[1], real_runs.RUNS[name]), evaluation(real, name)
  # Every step, one or six, was followed by an evaluation of the same text.
  assert cells[1:4] == ["1", f"{said['loss']:.4f}", f"{said['bits_per_byte']:.4f}"]
  parameters = f"{si(said['parameters'])}, {si(said['active_parameters'])}"
  assert parameters in cells


@pytest.mark.parametrize("table", ["capacities", "domains", "causal", "routing"])
def test_a_table_of_the_evaluation_has_its_numbers(table, together, real):
  said = evaluation(real, "moe")
  routing = json.loads((real / real_runs.RUNS["moe"] / "routing.json").read_text())
  shown = {
    "capacities": [
      f"{point['loss']:.4f} / {100 * np.mean(point['drop_fraction_Z']):.1f}"
      for point in said["capacity"]
    ],
    "domains": [f"{said['domains'][name]['bits_per_byte']:.4f}" for name in ("even", "odd")],
    "causal": [f"{said['causal'][name]:.4f}" for name in ("teacher_forced_loss", "loss", "gap")],
    "routing": [
      "1",
      f"{routing['domain_separation_Z'][1]:.3f}",
      f"{100 * routing['repeat_rate_Z'][1]:.1f}",
    ],
  }[table]
  assert f"| {real_runs.RUNS['moe']} | {' | '.join(shown)} |" in together[1]


def test_every_picture_of_the_markdown_is_a_file_that_can_be_read(together):
  written, text = together
  pictures = re.findall(r"\]\((report_files/\S+)\)", text)
  assert len(pictures) == 9
  for name in pictures:
    content = (written.page.parent / name).read_bytes()
    if name.endswith(".svg"):
      ElementTree.fromstring(content)
    else:
      assert content.startswith(b"\x89PNG")


def test_a_conclusion_names_the_arm_without_a_usable_run(together):
  results = together[1].split("## Results")[1].split("\n\n")[1]
  assert "killed is missing here, without a usable run that has this number." in results


@pytest.fixture
def swept(real, tmp_path, monkeypatch):
  """A copy of the sweep, with a file like that which has made it."""
  out = shutil.copytree(real / "sweep", tmp_path / "sweep")
  monkeypatch.chdir(ROOT)
  path, _ = real_runs.plan(tmp_path, real.parent / "real_text")
  fields = real_runs.fields(real.parent / "real_text")
  return out, lambda: runner.run_sweep(
    path, out, jobs=1, dry_run=False, arms=(), seeds=(), overrides=fields
  )


def test_a_sweep_compares_with_its_dense_arm(swept, real, capsys):
  out, run = swept
  assert run() == 0 and "2 of 2 runs were finished before" in capsys.readouterr().out
  text = (out / "report.md").read_text()
  dense, moe = evaluation(real, "dense"), evaluation(real, "moe")
  assert row(text, "dense")[2] == f"{dense['loss']:.4f}"
  assert row(text, "moe")[4] == f"{moe['loss'] - dense['loss']:+.4f}"
  assert "missing here" not in text  # a dense arm has no experts to balance


def test_a_dense_run_in_an_arm_of_moe_runs_is_named(swept):
  out, run = swept
  run()
  record = json.loads((out / "sweep.json").read_text())
  record["runs"][0] |= {"arm": "moe", "seed": 1}
  (out / "sweep.json").write_text(json.dumps(record))
  why = "has other layers or experts than the other runs of its arm"
  assert [run.error.endswith(why) for _, run in runs.read_sweep(out).runs] == [False, True]


def test_a_sweep_without_its_target_says_so_first_and_once(swept, capsys, monkeypatch):
  out, run = swept
  with (out / "dense/seed0/metrics.jsonl").open("a") as lines:
    lines.write("no JSON\n")
  assert run() == DamagedError.code
  first, second, last = capsys.readouterr().out.splitlines()[-3:]
  assert first.endswith(f"] {LEAD}") and "] dense/seed0 is left out: " in second
  assert last.endswith("2 of 2 finished")
  text = (out / "report.md").read_text()
  assert text.split("\n\n")[2] == f"> {LEAD}"
  assert f"## Results\n\n> {LEAD}" in text and "dense is missing here" in text
  assert "dense is missing" not in text.split("## Balance")[1].split("## Domains")[0]
  monkeypatch.setattr("sys.argv", ["report", str(out)])
  monkeypatch.setattr("sys.unraisablehook", sys.unraisablehook)
  with pytest.raises(SystemExit) as ended:
    command_line.one_line_errors(lambda: exit(command.main()))
  said = capsys.readouterr()
  assert ended.value.code == DamagedError.code and said.out.startswith("wrote ")
  assert said.err.splitlines()[0] == LEAD and said.err.count("is left out") == 1
