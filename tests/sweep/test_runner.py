"""The runner with made-up runs: past a failure, stopped and gone on, and what it records."""

import os
import pathlib
import signal
import threading
import time
from typing import NamedTuple

import pytest

from moe_jax.config.run import to_json
from moe_jax.errors import BusyError
from moe_jax.report import page
from moe_jax.start import command_line
from moe_jax.sweep import runner
from tests.support.fake_runs import Swept, fakes_in
from tests.support.sweeps import TWO


@pytest.fixture
def fake(tmp_path):
  with fakes_in(tmp_path) as made:
    yield made


class History(NamedTuple):
  """Four sweeps in one folder, one after the other."""

  first: Swept  # of two arms and one that fails, evaluated with --routing
  again: Swept  # the same
  causal: Swept  # evaluated with --causal, one arm alone
  longer: Swept  # with more steps, one arm alone
  reports: list[pathlib.Path]  # made of the first


@pytest.fixture(scope="module")
def history(tmp_path_factory):
  arms = "[arm('bad', {'loss.z': 0.5}, notes='why'), *" + TWO + "]"
  with fakes_in(tmp_path_factory.mktemp("fakes")) as fakes:
    first = fakes.sweep(arms, jobs=2, target="base", evaluate=("--routing",), band="b")
    reports = list(fakes.reports)
    return History(
      first,
      fakes.sweep(arms, evaluate=("--routing",)),
      fakes.sweep(arms, evaluate=("--causal",), names=["base"]),
      fakes.sweep(arms, names=["base"], overrides={"train.steps": 40}),
      reports,
    )


def test_a_failed_run_does_not_stop_the_others(history):
  statuses = {"bad": "failed", "base": "finished", "none": "finished"}
  assert history.first.code == 1 and history.first.statuses == statuses
  for words in (
    "bad/seed0 FAILED with code 1: error: z is broken",
    "base/seed0 finished after 0:00:",
    "loss 1.5000",
    "2 of 3 finished; 1 failed",
  ):
    assert words in history.first.output
  log = history.first.logs["base"]
  assert "step     30/30" in log and "evaluated --routing" in log
  assert history.reports[-1] == pathlib.Path("out")


def test_the_record_of_a_run(history):
  failed, finished, _ = history.first.record["runs"]
  assert failed["error"].endswith("error: z is broken") and finished["error"] == ""
  assert finished["seconds"] > 0 and finished["workdir"] == "base/seed0"
  assert finished["command"] == (
    "python train.py --config=configs/debug.py --workdir=out/base/seed0"
  )
  assert finished["evaluate"] == "python eval.py --workdir=out/base/seed0 --routing"


def test_the_record_of_the_question_and_the_arms(history):
  record = history.first.record
  assert record["question"].startswith("Is it so?") and record["base"] == "configs/debug.py"
  assert record["target_arm"] == "base" and record["band"] == "b" and record["published"] == ""
  arm = record["arms"][0]
  assert arm["overrides"] == {"loss.z": 0.5} and "why" in arm["notes"]


def test_a_failed_run_is_tried_again_and_finished_ones_are_left_alone(history):
  assert history.again.code == 1 and history.again.logs["bad"].count("z is broken") == 2
  assert history.again.logs["base"] == history.first.logs["base"]
  assert "2 of 3 runs were finished before" in history.again.output


def test_other_flags_evaluate_a_finished_run_again(history):
  """Runs that were not chosen stay in the record."""
  log = history.causal.logs["base"]
  assert history.causal.code == 0 and "resuming at step 30" in log
  assert log.count("evaluated") == 2 and log.endswith("--causal\n")
  assert [r["arm"] for r in history.causal.record["runs"]] == ["bad", "base", "none"]


def test_more_steps_are_trained(history):
  """Runs of a changed sweep leave the record."""
  longer = history.longer
  assert longer.code == 0 and [r["arm"] for r in longer.record["runs"]] == ["base"]
  assert "step     40/40" in longer.logs["base"]


def test_a_run_that_somebody_else_stopped_is_not_finished(fake):
  """train.py saves and ends with 0."""
  swept = fake.sweep("[arm('told', {'loss.router_z': 0.5})]")
  assert swept.code == 1 and swept.statuses == {"told": "stopped"}
  assert "evaluated" not in swept.logs["told"] and swept.record["runs"][0]["seconds"] > 0


def test_a_finished_run_without_a_record_is_left_alone_unless_its_config_has_changed(fake):
  """As if a scheduler had run the lines of --dry-run; train.py says what has changed."""
  before = fake.sweep("[arm('a')]")
  assert before.code == 0
  config = command_line.load_file("configs/debug.py")
  pathlib.Path("out/a/seed0/config.json").write_text(to_json(config))
  pathlib.Path("out/sweep.json").unlink()
  same = fake.sweep("[arm('a')]")
  assert same.code == 0 and same.logs == before.logs
  pathlib.Path("out/sweep.json").unlink()
  changed = fake.sweep("[arm('a', {'optimizer.b2': 0.9})]")
  assert changed.code == 0 and changed.logs["a"].startswith(before.logs["a"])
  assert "optimizer.b2=0.9" in changed.logs["a"]


def test_a_run_that_a_cluster_has_finished_meanwhile_is_left_alone_unless_its_flags_have_changed(
  fake,
):
  """Where the sweep that watched it was ended, it waits in the record."""
  before = fake.sweep("[arm('a')]")
  path = pathlib.Path("out/sweep.json")
  left = path.read_text().replace('"finished"', '"waiting"')
  path.write_text(left)
  same = fake.sweep("[arm('a')]")
  assert same.code == 0 and same.logs == before.logs
  path.write_text(left)
  changed = fake.sweep("[arm('a')]", evaluate=("--causal",))
  assert changed.code == 0 and changed.logs["a"].count("evaluated") == 2


def interrupt_at_step_5():
  deadline = time.time() + 600
  while time.time() < deadline:
    logs = [pathlib.Path(f"out/{name}/seed0/log.txt") for name in ("base", "none")]
    if all(log.exists() and "step      5/30" in log.read_text() for log in logs):
      return os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.02)


def test_a_signal_stops_what_runs_and_the_same_command_goes_on(fake):
  """No step is repeated."""
  arms, slow = TWO[:-1] + ", arm('later', {'train.steps': 20})]", pathlib.Path("slow")
  slow.write_text("")
  # A shell starts background jobs with SIGINT ignored, and a sweep leaves it so.
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    threading.Thread(target=interrupt_at_step_5, daemon=True).start()
    stopped = fake.sweep(arms, jobs=2)
  finally:
    signal.signal(signal.SIGINT, before)
  assert stopped.code == 128 + signal.SIGINT
  assert stopped.statuses == {"base": "stopped", "none": "stopped", "later": "waiting"}
  assert "SIGTERM: saved step 5" in stopped.logs["base"] and not fake.reports
  assert "stopped; the same command continues" in stopped.output
  slow.unlink()
  resumed = fake.sweep(arms, jobs=2)
  assert resumed.code == 0 and set(resumed.statuses.values()) == {"finished"}
  log = resumed.logs["none"]
  assert "resuming at step 5" in log and log.count("step      5/30") == 1


def test_one_sweep_at_a_time_works_in_a_folder(fake):
  out = fake.folder / "out"
  out.mkdir()
  with runner.locked(out), pytest.raises(BusyError, match="another sweep runs there"):
    fake.sweep("[arm('a')]")
  assert fake.sweep("[arm('a')]").code == 0


def test_a_report_without_its_target_is_the_code_of_the_sweep_and_is_told_once(fake, monkeypatch):
  told = page.Report(pathlib.Path("report.html"), ["no target", "a is left out"], 4)
  monkeypatch.setattr(page, "compare", lambda out: told)
  swept = fake.sweep(TWO)
  assert swept.code == 4 and set(swept.statuses.values()) == {"finished"}
  lines = [line.partition("] ")[2] for line in swept.output.splitlines()]
  assert lines[-3:] == ["no target", "a is left out", "2 of 2 finished"]
  assert lines.count("no target") == 1


def test_a_broken_report_loses_no_run(fake, monkeypatch):
  def broken(out):
    raise KeyError("load_ZE")

  monkeypatch.setattr(page, "compare", broken)
  swept = fake.sweep("[arm('a')]")
  assert swept.code == 1 and swept.statuses == {"a": "finished"}
  assert "no report: KeyError: 'load_ZE'" in swept.output
