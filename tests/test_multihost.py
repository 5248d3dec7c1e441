"""Two real processes with experts on both train as one process does."""

import json
import os
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

from moe_jax import sharding
from moe_jax.config import UserError
from tests.support.toys import ROOT


def command(workdir, cache, *arguments):
  return [
    sys.executable, "train.py", "--config=configs/debug.py", f"--workdir={workdir}",
    f"--cache_dir={cache}", "--config.train.steps=6", "--config.train.log_every=1",
    "--config.model.moe.dispatch=grouped", "--config.train.eval_every=6",
    "--config.train.checkpoint_every=6", "--config.mesh.expert=2",
    *arguments,
  ]  # fmt: skip


def values(workdir, name):
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return np.array([line[name] for line in lines if name in line])


def start_two(workdir, cache, *arguments, **options):
  """Two processes of one device each that train together."""
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
    line = command(workdir, cache, "--multihost", *arguments)
    processes.append(subprocess.Popen(line, cwd=ROOT, env=env, text=True, **options))
  return processes


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
  one = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
  subprocess.run(command(tmp_path / "one", tmp_path / "cache"), cwd=ROOT, env=one, check=True)
  processes = start_two(tmp_path / "two", tmp_path / "cache")
  assert [process.wait(timeout=500) for process in processes] == [0, 0]

  chosen = [json.loads((tmp_path / run / "kernels.json").read_text()) for run in ("one", "two")]
  assert chosen[0] == chosen[1] and chosen[0]["grouped_matmul"] == "blocked"
  for name in ("train/loss", "train/load_balance", "validation/loss", "validation/tokens"):
    got, want = values(tmp_path / "two", name), values(tmp_path / "one", name)
    assert len(got) == len(want) > 0
    np.testing.assert_allclose(got, want, rtol=1e-5, err_msg=name)  # float32 sums, other order


@pytest.mark.slow
def test_sigterm_to_one_process_saves_and_stops_both(tmp_path):
  arguments = ["--config.train.steps=100000", "--config.train.eval_every=100000",
               "--config.train.checkpoint_every=100000"]  # fmt: skip
  processes = start_two(tmp_path / "run", tmp_path / "cache", *arguments, stdout=subprocess.PIPE)
  for line in processes[0].stdout:
    if line.startswith("step      3/"):
      break
  processes[1].send_signal(signal.SIGTERM)
  printed = [process.communicate(timeout=200)[0] for process in processes]
  assert [process.returncode for process in processes] == [0, 0]
  (step,) = (int(path.name) for path in (tmp_path / "run/checkpoints").iterdir())
  assert f"saved step {step}; the same command resumes the run there" in printed[0]


@pytest.mark.slow
def test_a_tensor_axis_over_two_processes_is_refused(tmp_path):
  """Each would feed its own sequences where the axis needs the same ones on both."""
  arguments = ["--config.mesh.expert=1", "--config.mesh.tensor=2", "--config.model.num_kv_heads=2"]
  processes = start_two(tmp_path / "run", tmp_path / "cache", *arguments, stderr=subprocess.PIPE)
  errors = [process.communicate(timeout=200)[1] for process in processes]
  assert all(process.returncode for process in processes)
  assert "config.mesh.tensor=2: every process feeds sequences of its own" in errors[0]


def test_every_sequence_is_of_one_process():
  within = np.arange(8).reshape(2, 2, 1, 2) // 4
  sharding.check_processes(within)  # two processes of four devices, tensor inside of each
  sharding.check_processes(within[::-1])  # in another order, as on a TPU's torus
  with pytest.raises(UserError, match="divides the 4 device"):
    sharding.check_processes(np.arange(8).reshape(2, 2, 1, 2) % 2)
