"""sweep.py as a process: a dry run, and real runs that are stopped and go on."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.support.sweeps import write_sweep
from tests.support.toys import ROOT


def test_dry_run_prints_lines_and_makes_nothing(tmp_path):
  path = write_sweep(tmp_path, "[arm('a'), arm('dense', match('dense', by='flops_per_token'))]")
  command = [sys.executable, "sweep.py", f"--sweep={path}", f"--out={tmp_path / 'out dir'}",
             "--dry-run", "--seeds=0,4", "--override=train.steps=20"]  # fmt: skip
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
  assert done.returncode == 0 and not done.stderr
  comments = [line for line in done.stdout.splitlines() if line.startswith("#")]
  lines = done.stdout.splitlines()[len(comments) :]
  assert comments[0] == "# Is it so?" and any("4 runs" in c for c in comments)
  assert any("ffn_dim=65, 187,392 FLOPs per token against 187,776 (-0.20%)" in c for c in comments)
  assert len(lines) == 4
  assert lines[1] == (
    "python train.py --config=configs/debug.py --config.data.seed=4 --config.train.steps=20 "
    f"--config.train.seed=4 '--workdir={tmp_path}/out dir/a/seed4' && "
    f"python eval.py '--workdir={tmp_path}/out dir/a/seed4'"
  )
  assert not (tmp_path / "out dir").exists()
  done = subprocess.run([*command, "--out="], cwd=ROOT, capture_output=True, text=True, timeout=99)
  assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--out is missing" in done.stderr


ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PJRT_NPROC"}
ENVIRONMENT["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # one device, and compiles faster


def start_real(tmp_path, arms, *options):
  path = write_sweep(tmp_path, arms, seeds=(0,))
  cache = [f"--override=data.cache_dir={tmp_path / 'cache'}", "--override=train.log_every=1"]
  return subprocess.Popen(
    [sys.executable, "sweep.py", f"--sweep={path}", f"--out={tmp_path / 'out'}", *cache, *options],
    cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, start_new_session=True,
  )  # fmt: skip


def statuses_of(tmp_path):
  return [r["status"] for r in json.loads((tmp_path / "out/sweep.json").read_text())["runs"]]


@pytest.mark.slow
def test_real_runs(tmp_path):
  """Interrupted, continued past an arm that fails, and finished; then the sweep has changed."""
  arms = "[arm('good', {'eval.final_batches': 1}), arm('bad', {'data.name': 'text', 'data.path': 'nowhere'})]"  # noqa: E501
  process = start_real(tmp_path, arms)
  log = tmp_path / "out/good/seed0/log.txt"
  deadline = time.time() + 120
  while not (log.exists() and "step      3/30" in log.read_text()) and time.time() < deadline:
    time.sleep(0.05)
  os.killpg(process.pid, signal.SIGINT)  # to all of the terminal's processes, as Ctrl-C does
  process.communicate(timeout=60)
  assert process.returncode == 130 and statuses_of(tmp_path) == ["stopped", "waiting"]
  assert "SIGTERM: saved step" in log.read_text()

  process = start_real(tmp_path, arms)
  output, _ = process.communicate(timeout=200)
  assert process.returncode == 1 and statuses_of(tmp_path) == ["finished", "failed"], output
  assert "resuming" in log.read_text() and "bad/seed0 FAILED with code 2: error: " in output
  assert (tmp_path / "out/report.html").exists() and (tmp_path / "out/report.md").exists()
  lines = (tmp_path / "out/good/seed0/metrics.jsonl").read_text().splitlines()
  steps = [json.loads(line)["step"] for line in lines if "train/loss" in line]
  assert steps == list(range(1, 31))

  process = start_real(tmp_path, arms.replace("1}", "1, 'optimizer.b2': 0.9}"), "--arms=good")
  output, _ = process.communicate(timeout=100)
  assert process.returncode == 1 and statuses_of(tmp_path) == ["failed", "failed"]
  assert "config.optimizer.b2=0.9 (was 0.95)" in output
