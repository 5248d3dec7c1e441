"""Compiles our training step for a TPU that need not be present, in a process of its own.

  python -m benchmarks.compile_ours --config=configs/mixtral_8x7b.py --topology=v5p:4x4x4 \
    --json=FILE --hlo=FILE --config.data.batch_size=64

writes the optimized program's text to --hlo and {"memory", "mesh", "flops", "compile_seconds"} to
--json, as benchmarks/peer_compile.py does for the peer.
"""

import json
import math
import os
import pathlib
import time
from typing import Any

# libtpu must not look for the machine that it describes, nor lock itself to one process.
ENVIRONMENT = {
  "JAX_PLATFORMS": "cpu",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-16",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_LOG_DIR": "disabled",
}


def compile_step(config: Any, topology: str) -> tuple[Any, dict[str, int]]:
  """Returns the compiled training step of a config on a topology's devices, and its mesh."""
  import jax
  import numpy as np
  from jax.experimental import topologies
  from jax.sharding import NamedSharding, PartitionSpec

  from moe_jax import sharding
  from moe_jax.data import pipeline
  from moe_jax.moe import validation
  from moe_jax.storage import checkpoint
  from moe_jax.training import setup as setup_lib
  from moe_jax.training import step as step_lib

  devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
  config = validation.resolve_mesh(config, len(devices))
  mesh = sharding.make_mesh(config.mesh, devices)
  with jax.set_mesh(mesh):
    setup = setup_lib.make(config, mesh)
    rows = NamedSharding(mesh, PartitionSpec(sharding.BATCH_AXES))
    size = (config.data.batch_size, config.data.seq_len)
    tokens_BL = jax.ShapeDtypeStruct(size, np.int32, sharding=rows)
    batch = pipeline.Batch(*[tokens_BL] * len(pipeline.Batch._fields))
    state = checkpoint.abstract(setup.shapes, setup.shardings)
    compiled = step_lib.compile_step(setup).lower(state, batch).compile()
  return compiled, dict(mesh.shape)


def main() -> None:
  """Compiles the config that the command line names, and writes what came of it."""
  os.environ |= ENVIRONMENT
  os.environ.pop("XLA_FLAGS", None)  # those of tests simulate devices
  from moe_jax.config import override
  from moe_jax.start import command_line

  parser = command_line.Parser(__doc__, fields=True)
  parser.flag("config", "", "the config file")
  parser.flag("topology", "", "of the devices, as v5p:4x4x4")
  parser.flag("json", "", "the file of what came of it")
  parser.flag("hlo", "", "the file of the program's text")
  args = parser.read()
  config = override(command_line.load_file(args.config), args.overrides, args.config)

  from moe_jax.model import cost

  start, cpu = time.perf_counter(), time.process_time()
  compiled, mesh = compile_step(config, args.topology)
  memory = compiled.memory_analysis()
  pathlib.Path(args.hlo).write_text(compiled.as_text())
  counts, tokens = cost.count(config), config.data.batch_size * config.data.seq_len
  result = {
    "memory": {
      "arguments": memory.argument_size_in_bytes,
      "temporaries": memory.temp_size_in_bytes,
      "aliased": memory.alias_size_in_bytes,
    },
    "flops": {"model": counts.flops_per_token * tokens / math.prod(mesh.values())},
    "mesh": mesh,
    "compile_seconds": time.perf_counter() - start,
    "cpu_seconds": time.process_time() - cpu,
  }
  pathlib.Path(args.json).write_text(json.dumps(result))


if __name__ == "__main__":
  main()
