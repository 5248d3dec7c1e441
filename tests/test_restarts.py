"""A run that is cut off goes on with other processes and devices, to the same end."""

import os
import signal
import subprocess

import jax
import numpy as np
import pytest

from tests.support.processes import Together, alone, train_command
from tests.support.scripts import built, checkpoint_of, losses_of
from tests.support.toys import ROOT

STEPS = 16
# A save waits for the one before: at a step, all but the newest of the earlier saves are complete.
OPTIONS = [
  f"--config.train.steps={STEPS}",
  "--config.train.checkpoint_every=2",
  "--config.train.eval_every=2",
  "--config.model.moe.dispatch=grouped",
  "--config.eval.batches=1",
]


def command(workdir, cache, **mesh):
  axes = [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
  return [*train_command(workdir, cache, *OPTIONS), *axes]


def start(command, devices):
  return subprocess.Popen(command, cwd=ROOT, env=alone(devices), text=True, stdout=subprocess.PIPE)


def cut_off(command, devices, step, number):
  """Runs until a step is printed, then sends a signal; returns the steps that were printed."""
  with start(command, devices) as process:
    seen = []
    for line in process.stdout:
      seen.append(line)
      if line.startswith(f"step {step:>6}/"):
        process.send_signal(number)
    assert process.wait() == (0 if number == signal.SIGTERM else -number), seen
  return seen


@pytest.fixture(scope="module")
def whole(shared_folder, cache):
  """The workdir of a run of one process with two devices that nothing cut off."""

  def run(path):
    subprocess.run(command(path / "run", cache), cwd=ROOT, env=alone(2), check=True)
    return {}

  return built(shared_folder / "never_cut_off", run).path / "run"


@pytest.mark.slow
def test_two_processes_then_one_then_two_end_as_if_never_cut_off(whole, tmp_path, cache):
  workdir = tmp_path / "run"
  with Together([*command(workdir, cache), "--heartbeat_timeout=10"]) as two:
    two.until("step      5/")
    code, _ = two.lose(1)
    assert code == -signal.SIGABRT
  seen = cut_off(command(workdir, cache), 2, 10, signal.SIGTERM)
  assert any(line.startswith(f"resuming {workdir} at step ") for line in seen)
  with Together(command(workdir, cache)) as two:
    (code, output, _), (other_code, _, _) = two.ends()
    assert code == other_code == 0
    assert f"resuming {workdir} at step 1" in output and f"step     {STEPS}/{STEPS}" in output

  assert losses_of(workdir) == losses_of(whole)
  got, want = (checkpoint_of(path, STEPS) for path in (workdir, whole))
  jax.tree.map(np.testing.assert_array_equal, got, want)  # the mesh is the same: bit for bit


@pytest.mark.slow
def test_eight_devices_then_two_then_one_end_as_if_never_cut_off(whole, tmp_path, cache):
  meshes = [(8, dict(expert=4, fsdp=2, data=1)), (2, dict(expert=2)), (1, dict(expert=1, data=1))]
  workdir = tmp_path / "run"
  for step, (devices, mesh) in zip((5, 9), meshes, strict=False):
    cut_off(command(workdir, cache, **mesh), devices, step, signal.SIGKILL)
    assert max(int(name) for name in os.listdir(workdir / "checkpoints") if name.isdecimal()) < step
  subprocess.run(command(workdir, cache, **meshes[-1][1]), cwd=ROOT, env=alone(1), check=True)

  got, want = losses_of(workdir), losses_of(whole)
  assert list(got) == list(want) == list(range(1, STEPS + 1))
  # Float32 sums in another order on each mesh, which training amplifies.
  np.testing.assert_allclose(list(got.values()), list(want.values()), rtol=1e-4)
  got, want = (checkpoint_of(path, STEPS) for path in (workdir, whole))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), got, want)
