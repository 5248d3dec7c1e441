"""Two real processes with experts on both train as one process does."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from tests.support.toys import ROOT


def command(workdir, cache, *arguments):
  return [
    sys.executable, "train.py", "--config=configs/debug.py", f"--workdir={workdir}",
    f"--config.data.cache_dir={cache}", "--config.train.steps=6", "--config.train.log_every=1",
    "--config.model.moe.dispatch=grouped", "--config.train.eval_every=6",
    "--config.train.checkpoint_every=6", "--config.mesh.expert=2",
    *arguments,
  ]  # fmt: skip


def values(workdir, name):
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return np.array([line[name] for line in lines if name in line])


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
  one = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
  subprocess.run(command(tmp_path / "one", tmp_path / "cache"), cwd=ROOT, env=one, check=True)

  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = probe.getsockname()[1]
  processes = []
  for index in range(2):
    env = {
      **os.environ,
      "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
      "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
      "JAX_NUM_PROCESSES": "2",
      "JAX_PROCESS_ID": str(index),
    }
    arguments = command(tmp_path / "two", tmp_path / "cache", "--multihost")
    processes.append(subprocess.Popen(arguments, cwd=ROOT, env=env))
  assert [process.wait(timeout=500) for process in processes] == [0, 0]

  chosen = [json.loads((tmp_path / run / "kernels.json").read_text()) for run in ("one", "two")]
  assert chosen[0] == chosen[1] and chosen[0]["grouped_matmul"] == "blocked"
  for name in ("train/loss", "train/load_balance", "validation/loss", "validation/tokens"):
    got, want = values(tmp_path / "two", name), values(tmp_path / "one", name)
    assert len(got) == len(want) > 0
    np.testing.assert_allclose(got, want, rtol=1e-5, err_msg=name)  # float32 sums, other order
