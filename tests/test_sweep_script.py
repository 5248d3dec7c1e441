"""sweep.py: a dry run, and real runs that are stopped and go on."""

import json
import os
import pathlib
import signal
import time
from typing import NamedTuple

import pytest

from tests.support.scripts import built, call
from tests.support.sweeps import TWO, start_real, write_sweep


class DryRun(NamedTuple):
  out: pathlib.Path
  comments: list[str]
  lines: list[str]


def dry_run(path, out):
  return call(
    "sweep.py", f"--sweep={path}", f"--out={out}", "--dry-run", "--seeds=0,4",
    "--config.train.steps=20", "--cache_dir=my cache",
  )  # fmt: skip


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
  """Two arms with two seeds each, in a folder with a blank in its name."""
  folder = tmp_path_factory.mktemp("dry")
  path = write_sweep(folder, "[arm('a'), arm('dense', match('dense', by='flops_per_token'))]")
  done = dry_run(path, folder / "out dir")
  assert done.returncode == 0 and not done.stderr
  comments = [line for line in done.stdout.splitlines() if line.startswith("#")]
  return DryRun(folder / "out dir", comments, done.stdout.splitlines()[len(comments) :])


def test_a_dry_run_begins_with_the_question_and_counts_the_runs(dry):
  assert dry.comments[0] == "# Is it so?" and any("4 runs" in c for c in dry.comments)


def test_a_dry_run_says_how_a_twin_was_matched(dry):
  note = "ffn_dim=65, 187,392 FLOPs per token against 187,776 (-0.20%)"
  assert any(note in c for c in dry.comments)


def test_a_dry_run_prints_the_commands_of_each_run(dry):
  assert len(dry.lines) == 4
  assert dry.lines[1] == (
    "python train.py --config=configs/debug.py --config.data.seed=4 --config.train.steps=20 "
    f"--config.train.seed=4 '--workdir={dry.out}/a/seed4' --cache_dir='my cache' && "
    f"python eval.py '--workdir={dry.out}/a/seed4' --cache_dir='my cache'"
  )


def test_a_dry_run_makes_no_folder(dry):
  assert not dry.out.exists()


def test_a_sweep_without_a_folder_is_refused_in_one_line(tmp_path):
  done = dry_run(write_sweep(tmp_path, TWO), "")
  assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--out is missing" in done.stderr


ARMS = (
  "[arm('good', {'eval.final_batches': 1}),"
  " arm('bad', {'data.name': 'text', 'data.path': 'nowhere'})]"
)


def ended(process, folder):
  output, _ = process.communicate(timeout=600)
  return of_sweep(process.returncode, output, folder)


def of_sweep(code, output, folder):
  record = json.loads((folder / "out/sweep.json").read_text())
  log = (folder / "out/good/seed0/log.txt").read_text()
  statuses = [run["status"] for run in record["runs"]]
  return {"code": code, "output": output, "statuses": statuses, "log": log}


@pytest.fixture(scope="module")
def real(shared_folder, cache):
  """A sweep that is interrupted, goes on past an arm that fails, and is then changed."""

  def build(folder):
    process = start_real(folder, cache, ARMS)
    log = folder / "out/good/seed0/log.txt"
    deadline = time.time() + 600
    while not (log.exists() and "step      3/30" in log.read_text()) and time.time() < deadline:
      time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # to all of the terminal's processes, as Ctrl-C does
    said = {"interrupted": ended(process, folder)}
    said["resumed"] = ended(start_real(folder, cache, ARMS), folder)
    said["reports"] = sorted(p.name for p in (folder / "out").glob("report.*"))
    changed = ARMS.replace("1}", "1, 'optimizer.b2': 0.9}")
    sweep, out = write_sweep(folder, changed, seeds=(0,)), folder / "out"
    done = call("sweep.py", f"--sweep={sweep}", f"--out={out}", "--arms=good",
                f"--cache_dir={cache}", "--config.train.log_every=1")  # fmt: skip
    said["changed"] = of_sweep(done.returncode, done.stdout, folder)
    return said

  return built(shared_folder / "sweep", build)


@pytest.mark.slow
def test_ctrl_c_stops_a_sweep_and_its_run_saves(real):
  interrupted = real.said["interrupted"]
  assert interrupted["code"] == 130 and interrupted["statuses"] == ["stopped", "waiting"]
  assert "SIGTERM: saved step" in interrupted["log"]


@pytest.mark.slow
def test_a_sweep_goes_on_past_an_arm_that_fails(real):
  resumed = real.said["resumed"]
  assert resumed["code"] == 1 and resumed["statuses"] == ["finished", "failed"], resumed["output"]
  assert "resuming" in resumed["log"]
  assert "bad/seed0 FAILED with code 2: error: " in resumed["output"]


@pytest.mark.slow
def test_a_sweep_ends_with_its_reports(real):
  assert real.said["reports"] == ["report.html", "report.md"]


@pytest.mark.slow
def test_a_run_that_went_on_has_every_step_once(real):
  lines = (real.path / "out/good/seed0/metrics.jsonl").read_text().splitlines()
  steps = [json.loads(line)["step"] for line in lines if "train/loss" in line]
  assert steps == list(range(1, 31))


@pytest.mark.slow
def test_a_changed_arm_is_refused_in_its_old_workdir(real):
  changed = real.said["changed"]
  assert changed["code"] == 1 and changed["statuses"] == ["failed", "failed"]
  assert "config.optimizer.b2=0.9 (was 0.95)" in changed["output"]
