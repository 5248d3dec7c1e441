"""Slots: a share of the GPUs and of the CPU cores each."""

import subprocess
import sys

import pytest

from moe_jax.sweep import slots


@pytest.mark.parametrize(
  ("things", "count", "shares"),
  [
    ([4, 5, 6, 7, 8], 2, [[4, 5], [6, 7, 8]]),
    ([0, 1], 3, [[0], [1], [0]]),
    ([], 2, [[], []]),
  ],
)
def test_shares_are_even_and_in_order(things, count, shares):
  assert [slots.share(things, slot, count) for slot in range(count)] == shares


def test_slots_have_gpus_of_their_own_or_share_the_memory_of_one(monkeypatch):
  monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-abc,5")
  assert slots.MachineSlots(1).environment(0) == {}
  two = slots.MachineSlots(2)
  assert two.environment(0) == {"CUDA_VISIBLE_DEVICES": "2"}
  assert two.environment(1) == {"CUDA_VISIBLE_DEVICES": "GPU-abc,5"}
  monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
  shared = {"CUDA_VISIBLE_DEVICES": "0", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.45"}
  assert slots.MachineSlots(2).environment(1) == shared


@pytest.mark.skipif(len(slots.cpus()) < 2, reason="one core cannot be shared out")
def test_the_process_of_a_slot_has_its_cores_and_gpu(monkeypatch):
  monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
  usable = slots.cpus()
  code = "import os, time; time.sleep(0.3); print(sorted(os.sched_getaffinity(0)), os.environ["
  command = [sys.executable, "-c", code + "'CUDA_VISIBLE_DEVICES'])"]
  process = slots.MachineSlots(2).start(command, 1, stdout=subprocess.PIPE, text=True)
  assert process.communicate(timeout=600)[0] == f"{usable[len(usable) // 2 :]} 0\n"
