"""The memory of the devices, and the limits that a container or a scheduler sets."""

import os

import jax

from moe_jax.kernels import platform


def test_simulated_devices_share_the_memory_of_the_machine():
  machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  memory = platform.memory_bytes()
  assert memory is not None and 2**20 < memory <= machine // jax.local_device_count()


def test_limits_of_groups_of_both_versions(tmp_path):
  """A group counts, and each group that it is in; `max` and other controllers do not."""
  assert platform.cgroup_limits(tmp_path) == []  # no Linux
  proc, groups = tmp_path / "proc/self", tmp_path / "sys/fs/cgroup"
  proc.mkdir(parents=True)
  for folder, name, text in (
    ("job/task", "memory.max", "max"),
    ("job", "memory.max", "3000"),
    (".", "memory.max", "9000"),
    ("memory/old", "memory.limit_in_bytes", "2000"),
    ("cpu/old", "memory.limit_in_bytes", "1"),
  ):
    (groups / folder).mkdir(parents=True, exist_ok=True)
    (groups / folder / name).write_text(text + "\n")
  (proc / "cgroup").write_text("0::/job/task\n")
  assert sorted(platform.cgroup_limits(tmp_path)) == [3000, 9000]
  (proc / "cgroup").write_text("5:cpu,cpuacct:/old\n4:memory:/old\n")
  assert platform.cgroup_limits(tmp_path) == [2000]
  (proc / "cgroup").write_text("0::/\n")
  assert platform.cgroup_limits(tmp_path) == [9000]
