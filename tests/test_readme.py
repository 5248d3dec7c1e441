"""Every command of the README runs; only steps and sizes are cut."""

import re
import shlex
import subprocess
import sys

import pytest

from tests.support import xla
from tests.support.scripts import ONE_DEVICE, call
from tests.support.toys import ROOT

FEW = (
  "train.steps=2", "optimizer.warmup_steps=1", "eval.batches=1", "train.eval_every=2",
  "train.checkpoint_every=2", "eval.final_batches=2", "eval.batch_size=8", "data.batch_size=8",
  "model.num_layers=2", "model.dim=32",
)  # fmt: skip


def commands():
  blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
  joined = "".join(blocks).replace("\\\n", " ")
  lines = [line.split("  #")[0].strip() for line in joined.splitlines()]
  return [line for line in lines if line and not line.startswith("#")]


def test_the_two_commands_are_there():
  assert "make train" in commands() and "make test" in commands()
  assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.slow
def test_every_command_runs(tmp_path):
  python = [c for c in commands() if "python " in c]
  assert len(python) >= 6
  (tmp_path / "text").mkdir()
  for n in range(40):
    (tmp_path / "text" / f"{n}.txt").write_text(f"document {n} is about the number {n}. " * 400)
  for command in python:
    command = command.replace("runs/", f"{tmp_path}/runs/").replace("PATH", f"{tmp_path}/text")
    command = re.sub(r"\bpython ", f"{sys.executable} ", command)
    command = command.replace("XLA_FLAGS=", f"XLA_FLAGS='{xla.FAST} '")
    if "train.py" in command and "--describe" not in command:
      command += "".join(f" --config.{field}" for field in FEW)
    if "sweep.py" in command and "--dry-run" not in command:
      command += " --seeds=0 --arms=sigmoid-bias"
      command += "".join(f" --config.{field}" for field in FEW)
    if "generate.py" in command:
      command += " --max_new_tokens=16"
    if "eval.py" in command or "generate.py" in command or "--describe" in command:
      done = call(*shlex.split(command)[1:])  # the start of a process is shown by the others
    else:
      done = subprocess.run(
        command, shell=True, cwd=ROOT, env=ONE_DEVICE, capture_output=True, text=True, timeout=600
      )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
