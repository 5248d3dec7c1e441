"""Compiles a train step for an H200 that need not be present; writes its optimized HLO.

test_gpu_compile.py runs this file in a separate process.
"""

import os
import pathlib
import sys

os.environ["JAX_PLATFORMS"] = "cpu"  # otherwise jax takes the memory of a GPU that is present
os.environ.pop("XLA_FLAGS", None)  # those of conftest simulate devices

from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental import topologies

from tests.support.train_step_case import compile_step

# stream_executor's GpuTargetConfigProto, from the data sheet and CUDA's properties of the device.
H200 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
dnn_version_info { major: 9 minor: 10 }
gpu_device_info {
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 device_address_bits: 64
  l2_cache_size: 52428800 memory_bandwidth: 4800000000000 device_memory_size: 151397597184
  device_vendor: "NVIDIA Corporation" name: "NVIDIA H200"
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}
"""


def main() -> None:
  # jax would check the process's own GPU, not the one that it compiles for.
  fused_attention_stablehlo.check_compute_capability = lambda capability: True
  attention, out = sys.argv[1:]
  topology = topologies.get_topology_desc(
    platform="cuda", target_config=H200, topology="1x1x4"
  )  # slices x hosts x GPUs
  pathlib.Path(out).write_text(compile_step(topology.devices, attention))


if __name__ == "__main__":
  main()
