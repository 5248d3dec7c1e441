"""Settings that must be made before jax starts: processes, simulated devices, compiled programs."""

import ctypes
import os

import jax

from moe_jax.data import cache


def start(*, multihost: bool = False) -> None:
  """Makes the settings. To be called once, before the first jax computation.

  Args:
    multihost: whether to join the other processes of the job. jax finds them itself on a TPU pod
      and under SLURM; elsewhere the environment variables JAX_COORDINATOR_ADDRESS,
      JAX_NUM_PROCESSES and JAX_PROCESS_ID name them.
  """
  if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
    # A collective of simulated devices needs a thread for each of them, or it waits for ever.
    os.environ.setdefault("PJRT_NPROC", "32")
  if multihost:
    given = (os.environ.get(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
    count, index = (None if number is None else int(number) for number in given)
    jax.distributed.initialize(num_processes=count, process_id=index)
  _keep_freed_memory()
  programs = cache.programs()
  if programs is not None:
    jax.config.update("jax_compilation_cache_dir", str(programs))


def _keep_freed_memory() -> None:
  """Lets the C library keep the memory of freed arrays, which the next step then uses again.

  By default it returns large arrays to the system and asks for them again in the next step, and a
  thread cannot use what another has freed. On a CPU, page faults then take 10 to 20% of a training
  step. Only glibc has the settings; elsewhere nothing is done.
  """
  libc = ctypes.CDLL(None)
  if hasattr(libc, "mallopt"):
    libc.mallopt(-4, 0)  # M_MMAP_MAX: a large array is no memory mapping of its own
    libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: freed memory is not returned to the system
    libc.mallopt(-8, 1)  # M_ARENA_MAX: all threads share one heap
