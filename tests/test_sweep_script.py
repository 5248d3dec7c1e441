"""sweep.py: a dry run, and real runs that are stopped and go on."""

import json
import os
import signal
import time

import pytest

from tests.support.scripts import call
from tests.support.sweeps import TWO, start_real, write_sweep


def dry_run(path, out):
  return call(
    "sweep.py",
    f"--sweep={path}",
    f"--out={out}",
    "--dry-run",
    "--seeds=0,4",
    "--config.train.steps=20",
    "--cache_dir=my cache",
  )


def test_a_dry_run_prints_the_commands_of_each_run_and_makes_nothing(tmp_path):
  """Two arms with two seeds each, in a folder with a blank in its name."""
  out = tmp_path / "out dir"
  arms = "[arm('a'), arm('dense', match('dense', by='flops_per_token'))]"
  done = dry_run(write_sweep(tmp_path, arms), out)
  assert done.returncode == 0 and not done.stderr and not out.exists()
  comments = [line for line in done.stdout.splitlines() if line.startswith("#")]
  lines = done.stdout.splitlines()[len(comments) :]
  assert comments[0] == "# Is it so?" and any("4 runs" in c for c in comments)
  note = "ffn_dim=65, 187,392 FLOPs per token against 187,776 (-0.20%)"
  assert any(note in c for c in comments)
  assert len(lines) == 4
  assert lines[1] == (
    "python train.py --config=configs/debug.py --config.data.seed=4 --config.train.steps=20 "
    f"--config.train.seed=4 '--workdir={out}/a/seed4' --cache_dir='my cache' && "
    f"python eval.py '--workdir={out}/a/seed4' --cache_dir='my cache'"
  )


def test_a_sweep_without_a_folder_is_refused_in_one_line(tmp_path):
  done = dry_run(write_sweep(tmp_path, TWO), "")
  assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--out is missing" in done.stderr


def ended(process, folder):
  output, _ = process.communicate(timeout=600)
  return of_sweep(process.returncode, output, folder)


def of_sweep(code, output, folder):
  record = json.loads((folder / "out/sweep.json").read_text())
  log = (folder / "out/good/seed0/log.txt").read_text()
  return code, output, [run["status"] for run in record["runs"]], log


@pytest.mark.slow
def test_a_sweep_is_interrupted_and_goes_on_past_an_arm_that_fails(tmp_path, cache):
  arms = (
    "[arm('good', {'eval.final_batches': 1}),"
    " arm('bad', {'data.name': 'text', 'data.path': 'nowhere'})]"
  )
  process = start_real(tmp_path, cache, arms)
  log = tmp_path / "out/good/seed0/log.txt"
  deadline = time.time() + 600
  while not (log.exists() and "step      3/30" in log.read_text()) and time.time() < deadline:
    time.sleep(0.05)
  os.killpg(process.pid, signal.SIGINT)  # to all of the terminal's processes, as Ctrl-C does
  code, _, statuses, said = ended(process, tmp_path)
  assert code == 130 and statuses == ["stopped", "waiting"] and "SIGTERM: saved step" in said

  code, output, statuses, said = ended(start_real(tmp_path, cache, arms), tmp_path)
  assert code == 1 and statuses == ["finished", "failed"] and "resuming" in said, output
  assert "bad/seed0 FAILED with code 2: error: " in output
  assert sorted(p.name for p in (tmp_path / "out").glob("report.*")) == ["report.html", "report.md"]
  lines = (tmp_path / "out/good/seed0/metrics.jsonl").read_text().splitlines()
  steps = [json.loads(line)["step"] for line in lines if "train/loss" in line]
  assert steps == list(range(1, 31))  # each once

  # A changed arm is refused in its old workdir.
  changed = write_sweep(tmp_path, arms.replace("1}", "1, 'optimizer.b2': 0.9}"), seeds=(0,))
  done = call(
    "sweep.py",
    f"--sweep={changed}",
    f"--out={tmp_path / 'out'}",
    "--arms=good",
    f"--cache_dir={cache}",
    "--config.train.log_every=1",
  )
  code, output, statuses, _ = of_sweep(done.returncode, done.stdout, tmp_path)
  assert code == 1 and statuses == ["failed", "failed"]
  assert "config.optimizer.b2=0.9 (was 0.95)" in output
