"""How XLA compiles in tests: in half the time. What is compared must be compiled alike."""

import importlib.metadata

# One piece of each program, as the processors are taken by the tests' processes. And one thread for
# each product, because the order of its sums, and with it who wins a tie of the router, would
# depend on the number of processors: with NPROC=16, two processes would not train as one.
FAST = (
  "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
  " --xla_cpu_multi_thread_eigen=false"
)
if importlib.metadata.version("jax").startswith("0.10."):
  FAST += " --xla_cpu_use_fusion_emitters=false"  # later versions end at a flag they do not know


def flags(devices: int = 1) -> str:
  """Returns XLA_FLAGS for a process with so many simulated devices."""
  many = f"--xla_force_host_platform_device_count={devices} " if devices > 1 else ""
  return many + FAST
