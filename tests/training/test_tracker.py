"""Runs that wandb, trackio and MLflow keep a record of, without a network; and ones that fail."""

import json
import math
import os
import subprocess
import sys
import time

import pytest

from moe_jax.errors import UserError
from moe_jax.storage import workdir as workdir_lib
from moe_jax.training import tracker
from tests.support import trackers
from tests.support.scripts import CONSTANT, ONE_DEVICE
from tests.support.toys import ROOT, slow_unless, toy_config

KERNELS = {"device": "cpu", "attention": "blocks", "grouped_matmul": "blocked"}


@pytest.fixture
def workdir(tmp_path, monkeypatch):
  """A run's folder before its first step, in a working folder of the test."""
  monkeypatch.chdir(tmp_path)
  for name, value in trackers.environment(tmp_path).items():
    monkeypatch.setenv(name, value)
  path = tmp_path / "run"
  path.mkdir()
  workdir_lib.write_config(path, toy_config())
  workdir_lib.write_object(path / workdir_lib.KERNELS, KERNELS)
  return path


def library(tmp_path, monkeypatch, text):
  """Puts a trackio before the one that may be installed."""
  (tmp_path / "broken").mkdir()
  (tmp_path / "broken/trackio.py").write_text(text)
  monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"))


def steps(record, name):
  return [step for step, values in record.points if name in values]


def line(step, **values):
  return {"step": step, "train/loss": 1.5 / step} | values


def log(workdir, lines):
  for values in lines:
    workdir_lib.append_line(workdir / workdir_lib.METRICS, values)


@pytest.mark.parametrize("name", slow_unless(["wandb", "trackio"], trackers.NAMES))
def test_a_second_start_goes_on_with_the_record(name, workdir):
  """It sends what the first has not sent, and not again the steps that it takes again."""
  trackers.needs(name)
  loads = {"train/load_Z": [0.1] * 150, "train/load_ZE": [[0.5]], "train/bad": math.nan}
  record = tracker.Tracker(name, workdir)
  log(workdir, [line(1, **loads), line(2), line(3)])
  record.close()
  log(workdir, [line(4)])  # without a tracker
  workdir_lib.keep_lines(workdir / workdir_lib.METRICS, 2)  # killed after the checkpoint of step 2
  record = tracker.Tracker(name, workdir)
  log(workdir, [line(3), {"step": 3, "validation/loss": 2.0}, line(4), line(5)])
  record.close()
  kept = workdir_lib.read_object(workdir / workdir_lib.TRACKER)
  assert kept["tracker"] == name and kept["last"] == [5, False]
  found = trackers.read(name, workdir.parent, kept["id"])
  assert steps(found, "train/loss") == [1, 2, 3, 4, 5]
  assert steps(found, "validation/loss") == [3] and steps(found, "train/load_Z/149") == [1]
  assert not steps(found, "train/load_ZE") and not steps(found, "train/bad")
  assert {values["train/loss"] for step, values in found.points if "train/loss" in values} == {
    1.5 / step for step in (1, 2, 3, 4, 5)
  }
  assert str(found.config["model.dim"]) == "10" and found.config["kernels.attention"] == "blocks"
  assert found.config["commit"] == tracker.commit()
  assert not any(found.ends)


def test_a_library_that_fails_is_off_after_one_line(workdir, tmp_path, monkeypatch, capfd):
  library(tmp_path, monkeypatch, "def init(*_, **__):\n  raise OSError('no network\\nat all')\n")
  record = tracker.Tracker("trackio", workdir)
  record._process.wait()
  log(workdir, map(line, range(1, 100)))
  record.close()
  assert capfd.readouterr().err == (
    "--tracker=trackio is off until the next start, and the run goes on: no network at all\n"
  )


def test_a_library_that_hangs_costs_no_time_before_the_end(workdir, tmp_path, monkeypatch, capfd):
  library(tmp_path, monkeypatch, "import time\ntime.sleep(600)\n")
  monkeypatch.setattr(tracker, "_SECONDS", 0.5)
  record = tracker.Tracker("trackio", workdir)
  log(workdir, map(line, range(1, 100)))
  record.close()
  assert "trackio is off until the next start, and the run goes on: not" in capfd.readouterr().err
  assert record._process.wait(10) < 0


@pytest.mark.slow
def test_what_a_rewind_takes_again_is_sent_again(workdir):
  """With other rows, so other values; and plots of a live run do not end its record."""
  trackers.needs("mlflow")
  record = tracker.Tracker("mlflow", workdir)
  log(workdir, [line(1), line(2), line(3) | {"train/loss": 99.0}])
  record.close()
  alarm = {"alarm": "rewind", "step": 2, "next_batch": 5}
  workdir_lib.append_line(workdir / workdir_lib.ALARMS, alarm)
  workdir_lib.keep_lines(workdir / workdir_lib.METRICS, 2)
  record = tracker.Tracker("mlflow", workdir)
  log(workdir, [line(3), line(4)])
  (workdir / "loss.png").write_bytes(b"\x89PNG")
  while workdir_lib.read_object(workdir / workdir_lib.TRACKER)["last"] != [4, False]:
    time.sleep(0.1)
  kept = workdir_lib.read_object(workdir / workdir_lib.TRACKER)
  tracker.attach_plots(workdir)
  assert workdir_lib.read_object(workdir / workdir_lib.TRACKER) == kept
  assert trackers.status_in_mlflow(workdir.parent, kept["id"]) == "RUNNING"
  record.close()
  found = trackers.read("mlflow", workdir.parent, kept["id"])
  losses = [(step, v["train/loss"]) for step, v in found.points if "train/loss" in v]
  assert losses == [(1, 1.5), (2, 0.75), (3, 99.0), (3, 0.5), (4, 0.375)]
  assert [path.name for path in found.images] == ["loss.png"]


def test_the_process_of_a_killed_run_ends(workdir, tmp_path, monkeypatch):
  """Where the library hangs."""
  library(tmp_path, monkeypatch, "import time\ntime.sleep(600)\n")
  command = "import sys; from moe_jax.training import tracker; tracker._SECONDS = 1; tracker.main()"
  env = os.environ | {"PYTHONPATH": f"{tmp_path}/broken:{ROOT}"}
  command = [sys.executable, "-c", command, "trackio", workdir, workdir / "x"]
  child = subprocess.Popen(command, stdin=subprocess.PIPE, cwd=ROOT, env=env)
  child.stdin.close()  # by the system, of a process that is killed
  assert child.wait(60) == 1


def test_a_password_is_not_printed():
  assert (
    tracker.shown_place("postgresql://me:secret@host/db?sslkey=secret") == "postgresql://host/db"
  )
  assert tracker.shown_place("sqlite:////tmp/x.db") == "sqlite:////tmp/x.db"


def test_a_line_that_is_half_written_is_sent_when_it_is_whole(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text("one\ntw")
  with open(path) as file:
    assert list(tracker._whole_lines(file)) == ["one\n"]
    path.write_text("one\ntwo\nthree\n")
    assert list(tracker._whole_lines(file)) == ["two\n", "three\n"]


def test_a_library_that_is_not_installed_is_named(monkeypatch):
  monkeypatch.setattr(tracker.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UserError, match=r"--tracker=wandb: .*: pip install 'moe_jax\[wandb\]'"):
    tracker.check("wandb")


def numbers(workdir, name):
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return [(line["step"], line[name]) for line in lines if name in line]


@pytest.mark.slow
@pytest.mark.parametrize("name", trackers.NAMES)
def test_a_run_that_is_killed_and_one_that_is_stopped(name, tmp_path, cache, text):
  """Its record has all points, the config, the plots; the run is as one without a tracker."""
  trackers.needs(name)
  env = ONE_DEVICE | trackers.environment(tmp_path) | {"PYTHONPATH": str(ROOT)}
  del env["MOE_JAX_CACHE"]

  def start(script, workdir, *arguments):
    command = [sys.executable, ROOT / script, f"--workdir={workdir}", f"--cache_dir={cache}"]
    return subprocess.Popen([*command, *arguments], cwd=tmp_path, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip

  def train(workdir, last, *arguments):
    words = [
      "train.log_every=1",
      "train.eval_every=4",
      "train.checkpoint_every=4",
      "eval.batches=1",
    ]
    fields = [*words, "data.name=text", f"data.path={text}", f"train.steps={last}"]
    config = f"--config={ROOT}/configs/debug.py"
    return start(
      "train.py", workdir, config, CONSTANT, *(f"--config.{f}" for f in fields), *arguments
    )

  def until(process, step):
    for line in process.stdout:
      if line.startswith(f"step {step:>6}/"):
        return

  run, flag = tmp_path / "a" / "run", f"--tracker={name}"
  killed = train(run, 100_000, flag)
  until(killed, 6)
  killed.kill()
  killed.communicate()
  stopped = train(run, 100_000, flag)
  until(stopped, 10)
  stopped.terminate()
  said, errors = stopped.communicate()
  assert stopped.returncode == 0 and "SIGTERM: saved step" in said, errors
  last = workdir_lib.saved_steps(run)[-1] + 2
  for process in (train(run, last, flag), start("eval.py", run), train(tmp_path / "b", last)):
    _, errors = process.communicate()
    assert process.returncode == 0, errors
  assert numbers(run, "train/loss") == numbers(tmp_path / "b", "train/loss")
  record = workdir_lib.read_object(run / workdir_lib.TRACKER)["id"]
  found = trackers.read(name, tmp_path, record)
  for metric in ("train/loss", "validation/loss"):
    logged = [(step, values[metric]) for step, values in found.points if metric in values]
    assert sorted(logged) == numbers(run, metric)  # each once
  assert found.config["kernels.attention"] and found.config["data.path"] == str(text)
  plots = sorted(path.name for path in found.images)
  assert [plot.split("_")[0].split(".")[0] for plot in plots] == ["balance", "load", "loss"] or (
    name == "trackio" and len(plots) == 3
  )
  assert all(path.read_bytes().startswith(b"\x89PNG") for path in found.images)
  assert os.listdir(run).count("tracker.json") == 1
