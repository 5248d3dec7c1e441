"""The runner with made-up runs: past a failure, stopped and gone on, and what it records."""

import json
import os
import pathlib
import signal
import textwrap
import threading
import time

import pytest

from moe_jax import command_line, report
from moe_jax import config as config_lib
from moe_jax.config import UserError
from moe_jax.sweep import runner
from tests.support.sweeps import TWO, write_sweep
from tests.support.toys import ROOT

FAKE_TRAIN = """
  import json, pathlib, signal, sys, time
  words = dict(word.split("=", 1) for word in sys.argv[1:])
  workdir, steps = pathlib.Path(words["--workdir"]), int(words.get("--config.train.steps", 30))
  told = []
  signal.signal(signal.SIGTERM, lambda *_: told.append(1))
  if "--config.loss.z" in words:
    sys.exit("error: z is broken")
  newest = workdir / "newest"
  start = int(newest.read_text()) if newest.exists() else 0
  print(f"resuming at step {start}" if start else "new")
  for step in range(start + 1, steps + 1):
    print(f"step {step:>6}/{steps}  loss 1.0000  9.00 steps/s  ETA 0:00:01", flush=True)
    newest.write_text(str(step))
    deadline = time.time() + 60
    while step == 5 and pathlib.Path("slow").exists() and not told and time.time() < deadline:
      time.sleep(0.02)
    told += [1] * (step == 7 and "--config.loss.router_z" in words)
    if told:
      print(f"SIGTERM: saved step {step}")
      sys.exit(0)
  (workdir / "checkpoints" / str(steps)).mkdir(parents=True, exist_ok=True)
"""
FAKE_EVAL = """
  import json, pathlib, sys
  workdir = pathlib.Path(sys.argv[1].partition("=")[2])
  step = int((workdir / "newest").read_text())
  (workdir / "eval.json").write_text(json.dumps({"step": step, "loss": 1.5}))
  print("evaluated", *sys.argv[2:])
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
  """A folder with a train.py and an eval.py that need no jax; returns (run the sweep, reports)."""
  for name, text in (("train", FAKE_TRAIN), ("eval", FAKE_EVAL)):
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
  (tmp_path / "configs").mkdir()
  (tmp_path / "configs/debug.py").write_text((ROOT / "configs/debug.py").read_text())
  monkeypatch.chdir(tmp_path)
  reports = []
  monkeypatch.setattr(report, "compare", reports.append)

  def sweep(arms, jobs=1, overrides=(), names=(), **more):
    path = write_sweep(tmp_path, arms, seeds=(0,), **more)
    code = runner.run(path, pathlib.Path("out"), jobs=jobs, dry_run=False, arms=names, seeds=[],
                      overrides=overrides)  # fmt: skip
    record = json.loads(pathlib.Path("out/sweep.json").read_text())
    return code, record, {r["arm"]: r["status"] for r in record["runs"]}

  return sweep, reports


def log_of(name):
  return pathlib.Path(f"out/{name}/seed0/log.txt").read_text()


def test_runs_to_the_end_past_a_failure(fake, capsys):
  sweep, reports = fake
  arms = "[arm('bad', {'loss.z': 0.5}, notes='why'), *" + TWO + "]"
  code, record, statuses = sweep(arms, jobs=2, target="base", evaluate=("--routing",), band="b")
  assert code == 1 and statuses == {"bad": "failed", "base": "finished", "none": "finished"}
  failed, finished, _ = record["runs"]
  assert failed["error"].endswith("error: z is broken") and finished["error"] == ""
  assert finished["seconds"] > 0 and finished["workdir"] == "base/seed0"
  assert finished["command"] == (
    "python train.py --config=configs/debug.py --workdir=out/base/seed0"
  )
  assert finished["evaluate"] == "python eval.py --workdir=out/base/seed0 --routing"
  assert record["question"].startswith("Is it so?") and record["base"] == "configs/debug.py"
  assert record["target_arm"] == "base" and record["band"] == "b" and record["published"] == ""
  assert record["arms"][0]["overrides"] == {"loss.z": 0.5} and "why" in record["arms"][0]["notes"]
  assert "step     30/30" in log_of("base") and "evaluated --routing" in log_of("base")
  assert reports[-1] == pathlib.Path("out")
  said = capsys.readouterr().out
  assert "bad/seed0 FAILED with code 1: error: z is broken" in said
  assert "base/seed0 finished after 0:00:" in said and "loss 1.5000" in said
  assert "2 of 3 finished; 1 failed" in said

  # Again: what is finished stays, what failed is tried once more, and other flags evaluate again.
  before = log_of("base")
  code, _, statuses = sweep(arms, evaluate=("--routing",))
  assert code == 1 and log_of("base") == before and log_of("bad").count("z is broken") == 2
  assert "2 of 3 runs were finished before" in capsys.readouterr().out
  code, record, _ = sweep(arms, evaluate=("--causal",), names=["base"])
  assert code == 0 and "resuming at step 30" in log_of("base")
  assert log_of("base").count("evaluated") == 2 and log_of("base").endswith("--causal\n")
  # The runs that were not chosen stay in the record, unless the sweep has changed since.
  assert [r["arm"] for r in record["runs"]] == ["bad", "base", "none"]
  code, record, _ = sweep(arms, names=["base"], overrides=["train.steps=40"])
  assert code == 0 and [r["arm"] for r in record["runs"]] == ["base"]
  assert "step     40/40" in log_of("base")


def test_a_run_that_somebody_else_stopped(fake):
  """train.py then saves and ends with 0, but the run is not finished."""
  code, record, statuses = fake[0]("[arm('told', {'loss.router_z': 0.5})]")
  assert code == 1 and statuses == {"told": "stopped"} and "evaluated" not in log_of("told")
  assert record["runs"][0]["seconds"] > 0


def test_a_changed_config_or_lost_record_is_seen(fake):
  sweep, _ = fake
  assert sweep("[arm('a')]")[0] == 0
  config = command_line.load_file("configs/debug.py")
  workdir = pathlib.Path("out/a/seed0")
  (workdir / "config.json").write_text(config_lib.to_json(config))
  before = log_of("a")
  pathlib.Path("out/sweep.json").unlink()  # as if a scheduler had run the lines of --dry-run
  assert sweep("[arm('a')]")[0] == 0 and log_of("a") == before
  # Not skipped, so that train.py says what has changed.
  assert sweep("[arm('a', {'optimizer.b2': 0.9})]")[0] == 0
  assert log_of("a").startswith(before) and "optimizer.b2=0.9" in log_of("a")


def test_a_signal_stops_and_the_same_command_goes_on(fake, capsys):
  sweep, reports = fake
  slow = pathlib.Path("slow")
  slow.write_text("")

  def interrupt():
    deadline = time.time() + 180
    while time.time() < deadline:
      logs = [pathlib.Path(f"out/{name}/seed0/log.txt") for name in ("base", "none")]
      if all(log.exists() and "step      5/30" in log.read_text() for log in logs):
        return os.kill(os.getpid(), signal.SIGINT)
      time.sleep(0.02)

  arms = TWO[:-1] + ", arm('later', {'train.steps': 20})]"
  # A shell starts background jobs with SIGINT ignored, and a sweep leaves it so.
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    threading.Thread(target=interrupt, daemon=True).start()
    code, _, statuses = sweep(arms, jobs=2)
  finally:
    signal.signal(signal.SIGINT, before)
  assert code == 128 + signal.SIGINT
  assert statuses == {"base": "stopped", "none": "stopped", "later": "waiting"}
  assert "SIGTERM: saved step 5" in log_of("base") and not reports
  assert "stopped; the same command goes on" in capsys.readouterr().out
  slow.unlink()
  code, _, statuses = sweep(arms, jobs=2)
  assert code == 0 and set(statuses.values()) == {"finished"}
  assert "resuming at step 5" in log_of("none") and log_of("none").count("step      5/30") == 1


def test_one_sweep_at_a_time(fake, tmp_path):
  sweep, _ = fake
  out = tmp_path / "out"
  out.mkdir()
  with runner.locked(out), pytest.raises(UserError, match="another sweep works there"):
    sweep("[arm('a')]")
  assert sweep("[arm('a')]")[0] == 0


def test_a_broken_report_loses_no_run(fake, monkeypatch, capsys):
  def broken(out):
    raise KeyError("load_ZE")

  monkeypatch.setattr(report, "compare", broken)
  code, _, statuses = fake[0]("[arm('a')]")
  assert code == 1 and statuses == {"a": "finished"}
  assert "no report: KeyError: 'load_ZE'" in capsys.readouterr().out
