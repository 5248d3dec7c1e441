"""--watch: what each run does now, told from its files and from the process that holds its lock."""

import json
import os
import pty
import re
import resource
import signal
import subprocess
import sys
import termios
import time

import pytest

from moe_jax.config import Config, Health, Train
from moe_jax.errors import UserError
from moe_jax.report import __main__ as command
from moe_jax.storage import workdir as workdir_lib
from tests.support import report_runs
from tests.support.locks import holder
from tests.support.scripts import ONE_DEVICE, python
from tests.support.toys import ROOT

UNSIZED = {name: v for name, v in os.environ.items() if name not in ("COLUMNS", "LINES")}
EVERY = {"steps": 40, "log_every": 1, "eval_every": 20, "checkpoint_every": 20}


@pytest.fixture
def look(monkeypatch, capsys):
  """Of a folder: {run: its line from the state on}."""

  def looked(*folders):
    monkeypatch.setattr(sys, "argv", ["report", "--watch", *map(str, folders)])
    assert command.main() == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["run", "state", "step"]
    return {line.split()[0]: re.sub(" +", " ", line.partition(" ")[2].strip()) for line in lines}

  return looked


def begin(folder, **health):
  """What a start writes; it was an hour ago."""
  workdir_lib.make(folder)
  workdir_lib.write_config(folder, Config(train=Train(**EVERY), health=Health(**health)))
  set_back(folder / "config.json", 3600)
  set_back(folder, 3600)
  return folder


def log(folder, step, steps_per_s=2.0, name="train", ago=0.0):
  values = {f"{name}/loss": 10 / step, f"{name}/steps_per_s": steps_per_s, f"{name}/load_ZE": [0.5]}
  workdir_lib.append_line(folder / "metrics.jsonl", {"step": step, **values})
  set_back(folder / "metrics.jsonl", ago)
  set_back(folder, ago)


def save(folder, step, ago=0.0):
  path = folder / f"checkpoints/{step}"
  path.mkdir(parents=True)
  set_back(path, ago)


def set_back(path, seconds):
  os.utime(path, (0, time.time() - seconds))


def test_a_run_from_its_start_to_a_kill(tmp_path, look):
  run = begin(tmp_path / "a/seed0")
  assert look(tmp_path) == {"a/seed0": "waits 0/40"}
  with holder(run) as process:
    assert look(tmp_path) == {"a/seed0": "starts 0/40 0:00:00"}
    log(run, 10)
    assert look(tmp_path) == {"a/seed0": "trains 10/40 1.0000 2 0:00:15 0:00:00"}
    log(run, 20)
    assert look(tmp_path)["a/seed0"].startswith("evaluates 20/40 0.5000 2 0:00:10 ")
    log(run, 20, name="validation")
    save(run, 20)
    assert look(tmp_path)["a/seed0"].startswith("trains 20/40 0.5000 0.5000 2 0:00:10 ")
    log(run, 21, ago=100)
    assert look(tmp_path)["a/seed0"].startswith("trains")
    set_back(run / "metrics.jsonl", 130)
    set_back(run, 130)
    assert look(tmp_path) == {"a/seed0": "hangs 21/40 0.4762 0.5000 2 0:02:10"}
    process.send_signal(signal.SIGSTOP)
    assert look(tmp_path)["a/seed0"].startswith("hangs")
    process.kill()
    process.wait()
    assert look(tmp_path) == {"a/seed0": "stopped 21/40 0.4762 0.5000 2 0:02:10"}
  save(run, 40)
  assert look(tmp_path)["a/seed0"].startswith("ended")
  assert look(run).keys() == {"seed0"} and look(run, tmp_path / "a").keys() == {"seed0"}


def test_a_run_that_goes_on_starts_until_it_has_a_line_of_its_own(tmp_path, look):
  run = begin(tmp_path / "a")
  log(run, 20)  # after its start, which has taken later lines away
  save(run, 20, ago=4000)
  with holder(run):
    assert look(tmp_path)["a"].startswith("starts 20/40")
    log(run, 21)
    assert look(tmp_path)["a"].startswith("trains 21/40")
    set_back(run / "config.json", -1)
    assert look(tmp_path)["a"].startswith("starts 21/40")


@pytest.mark.parametrize("ago, state", [(1700, "evaluates"), (1900, "hangs")])
def test_an_evaluation_may_take_as_long_as_a_step(ago, state, tmp_path, look):
  run = begin(tmp_path / "a")
  with holder(run):
    log(run, 20, ago=ago)
    assert look(tmp_path)["a"].startswith(f"{state} 20/40")


@pytest.mark.parametrize("steps_per_s, ago, state", [(0.01, 900, "trains"), (0.01, 1100, "hangs")])
def test_a_slow_run_may_be_silent_for_longer(steps_per_s, ago, state, tmp_path, look):
  run = begin(tmp_path / "a")
  with holder(run):
    log(run, 5, steps_per_s=steps_per_s, ago=ago)
    assert look(tmp_path)["a"].startswith(f"{state} 5/40")


@pytest.mark.parametrize(
  "health, kind, step, state",
  [
    ({"on_alarm": "stop"}, "collapse", 12, "alarm 10/40 it is bad"),
    ({"on_alarm": "stop"}, "collapse", 9, "stopped"),  # and went on with another config
    ({"on_alarm": "warn"}, "collapse", 12, "stopped"),
    ({"on_nonfinite": "stop"}, "nonfinite", 12, "alarm 10/40 it is bad"),
    ({"on_nonfinite": "warn"}, "nonfinite", 12, "stopped"),
  ],
)
def test_an_alarm_that_ended_a_run_is_told(health, kind, step, state, tmp_path, look):
  run = begin(tmp_path / "a", **health)
  log(run, 10)
  line = {"step": step, "alarm": kind, "layer": 1, "message": "it is\nbad"}
  workdir_lib.append_line(run / "alarms.jsonl", line)
  assert look(tmp_path)["a"].startswith(state)


def test_an_error_at_the_end_of_the_log_is_told_until_the_run_goes_on(tmp_path, look):
  run = begin(tmp_path / "a")
  log(run, 10)
  (run / "log.txt").write_text("step 10\nerror: no \x1b[2J room\n")
  assert look(tmp_path) == {"a": r"error 10/40 error: no \x1b[2J room"}
  (run / "log.txt").write_text("error: no room\n$ python train.py\nSIGTERM: saved step 10\n")
  assert look(tmp_path)["a"].startswith("stopped 10/40")


def test_a_sweep_names_runs_that_wait_and_that_failed(tmp_path, look):
  statuses = {("dense", 0): "finished", ("moe", 0): "failed", ("moe", 1): "waiting"}
  report_runs.sweep(tmp_path, statuses)
  record = json.loads((tmp_path / "sweep.json").read_text())
  record["runs"][1]["error"] = "Traceback\nKeyError: 7\n"
  (tmp_path / "sweep.json").write_text(json.dumps(record))
  save(tmp_path / "dense/seed0", 400)
  lines = look(tmp_path)
  assert list(lines) == ["moe/seed0", "moe/seed1", "dense/seed0"]  # in the order of its states
  assert lines["moe/seed0"] == "error 400/400 KeyError: 7"
  assert lines["moe/seed1"] == "waits"
  assert lines["dense/seed0"].startswith("ended 400/400 9.0000 2.0000 ")


def test_weights_alone_wait_for_no_training(tmp_path, look):
  save(begin(tmp_path / "a"), 0)
  begin(tmp_path / "a/hf")  # holds the config.json of another program
  assert look(tmp_path) == {"a": "weights 0/40 0:00:00"}


def test_what_is_damaged_is_one_line_beside_the_others(tmp_path, look):
  for name in ("cut", "garbage", "number", "whole"):
    log(begin(tmp_path / name), 10)
  (tmp_path / "cut/config.json").write_text("{")
  (tmp_path / "sweep.json").write_text("[]")
  for name, line in (("garbage", "\0\0\n"), ("number", '{"step": 11, "train/loss": [1}\n')):
    with (tmp_path / name / "metrics.jsonl").open("a") as file:
      file.write(line)
  with (tmp_path / "whole/metrics.jsonl").open("a") as file:
    file.write('{"step": 11, "tra')  # which a run is writing
  os.mkfifo(begin(tmp_path / "pipe") / "metrics.jsonl")
  lines = look(tmp_path)
  assert [line.split()[0] for line in lines.values()] == ["damaged"] * 4 + ["stopped", "waits"]
  assert "sweep.json is damaged (it holds a list, not an object)" in lines["sweep.json"]
  assert "config.json is damaged" in lines["cut"]
  assert "metrics.jsonl is damaged: its last line has no step" in lines["garbage"]
  assert lines["whole"].startswith("stopped 10/40 1.0000 2 ")


def test_a_file_that_did_not_change_is_not_read_again(tmp_path, look):
  path = begin(tmp_path / "a") / "metrics.jsonl"
  log(tmp_path / "a", 10, ago=50)
  times = path.stat().st_atime, path.stat().st_mtime
  assert look(tmp_path)["a"].startswith("stopped 10/40")
  text = path.read_text()
  path.write_text(text.replace("10", "15"))
  os.utime(path, times)
  assert look(tmp_path)["a"].startswith("stopped 10/40")
  set_back(path, 40)
  assert look(tmp_path)["a"].startswith("stopped 15/40")


def test_what_is_no_folder_here_is_refused(tmp_path, look):
  for name in ("gs://bucket/runs", str(tmp_path / "none")):
    with pytest.raises(UserError, match=f"^{name}: no folder on this machine; name one"):
      look(tmp_path, name)
  assert python("-m", "moe_jax.report", "--watch", tmp_path).stdout.endswith("silent for\n")


def test_a_hundred_runs_are_quick_and_need_no_jax(tmp_path):
  """Each with 40 lines of 100 kB after its last evaluation."""
  line = {
    "step": 1,
    "train/loss": 2.5,
    "train/steps_per_s": 2.0,
    "train/load_ZE": [0.123456] * 9999,
  }
  lines = json.dumps({"step": 1, "validation/loss": 2.0}) + "\n" + (json.dumps(line) + "\n") * 40
  (tmp_path / "lines").write_text(lines)
  for n in range(100):
    run = begin(tmp_path / f"arm{n // 10}/seed{n % 10}")
    (run / "metrics.jsonl").hardlink_to(tmp_path / "lines")
  code = f"""
import runpy, sys
sys.argv = ["report", "--watch", {str(tmp_path)!r}]
try:
  runpy.run_module("moe_jax.report", run_name="__main__")
finally:
  print({{"jax", "numpy", "matplotlib"}} & sys.modules.keys())
"""
  before = resource.getrusage(resource.RUSAGE_CHILDREN)
  done = python("-c", code)
  used = resource.getrusage(resource.RUSAGE_CHILDREN)
  seconds = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
  assert seconds < 2, seconds  # of one core: 0.9, with the start of Python
  assert done.returncode == 0 and done.stdout.count(" stopped  1/40  2.5000  2.0000 ") == 100
  assert done.stdout.endswith("set()\n")


def test_a_terminal_shows_what_fits_and_again_until_ctrl_c(tmp_path):
  for n in range(12):
    log(begin(tmp_path / f"{'long' * 20}{n:02}"), 10)
  terminal, inner = pty.openpty()
  termios.tcsetwinsize(inner, (8, 70))
  words = [sys.executable, "-m", "moe_jax.report", "--watch", str(tmp_path)]
  with subprocess.Popen(words, cwd=ROOT, env=UNSIZED, stdin=inner, stdout=inner) as process:
    shown = b""
    while shown.count(b"\x1b[H\x1b[J") < 3:
      shown += os.read(terminal, 1 << 12)
    process.send_signal(signal.SIGINT)
  assert process.returncode == 130
  os.close(terminal), os.close(inner)
  first, second = shown.decode().split("\x1b[H\x1b[J")[1:3]
  lines = first.splitlines()
  assert len(lines) == 7 and all(len(line) < 70 for line in lines) and lines[-1] == "and 7 more"
  assert re.match(r"(long)?\w*00  stopped  10/40  1.0000  ", lines[1]), lines[1]
  assert second.splitlines()[0] == lines[0]


@pytest.mark.slow
def test_a_real_run(tmp_path, look):
  command = [
    sys.executable,
    "train.py",
    "--config=configs/debug.py",
    f"--workdir={tmp_path}/runs/a",
  ]
  command += [
    f"--cache_dir={tmp_path}/cache",
    "--config.train.steps=200",
    "--config.train.log_every=1",
  ]
  (tmp_path / "runs").mkdir()

  def train(until):
    """Starts it; returns its states up to this one."""
    with subprocess.Popen(command, cwd=ROOT, env=ONE_DEVICE, stdout=subprocess.DEVNULL) as process:
      seen = []
      while process.poll() is None and until not in seen:
        line = look(tmp_path / "runs").get("a", "")
        seen += [line.split()[0]] if line and line.split()[0] not in seen else []
        time.sleep(0.02)
      process.send_signal(signal.SIGTERM)
    return seen

  assert train("trains")[-2:] == ["starts", "trains"]
  assert look(tmp_path / "runs")["a"].startswith("stopped ")
  seen = train("")
  assert seen[0] == "stopped" and {"starts", "trains"} <= {*seen} and "hangs" not in seen
  assert re.match(r"ended 200/200 \d\.\d{4} \d\.\d{4} ", look(tmp_path / "runs")["a"])
