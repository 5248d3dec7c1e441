"""Slots: a share of the GPUs and of the CPU cores each."""

import subprocess
import sys

from moe_jax.sweep import slots


def test_shares():
  assert [slots.share([4, 5, 6, 7, 8], slot, 2) for slot in range(2)] == [[4, 5], [6, 7, 8]]
  assert [slots.share([0, 1], slot, 3) for slot in range(3)] == [[0], [1], [0]]
  assert slots.share([], 1, 2) == []


def test_slots_have_their_own_gpus_and_cores(monkeypatch):
  monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-abc,5")
  two = slots.Slots(2)
  assert two.environment(0) == {"CUDA_VISIBLE_DEVICES": "2"}
  assert two.environment(1) == {"CUDA_VISIBLE_DEVICES": "GPU-abc,5"}
  assert slots.Slots(1).environment(0) == {}
  monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
  shared = {"CUDA_VISIBLE_DEVICES": "0", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.45"}
  assert slots.Slots(2).environment(1) == shared
  usable = slots.cpus()
  if len(usable) > 1:
    code = "import os, time; time.sleep(0.3); print(sorted(os.sched_getaffinity(0)), os.environ["
    command = [sys.executable, "-c", code + "'CUDA_VISIBLE_DEVICES'])"]
    process = slots.Slots(2).start(command, 1, stdout=subprocess.PIPE, text=True)
    assert process.communicate(timeout=60)[0] == f"{usable[len(usable) // 2 :]} 0\n"
    with slots.Slots(2).as_first():
      assert slots.cpus() == usable[: len(usable) // 2]
    assert slots.cpus() == usable
