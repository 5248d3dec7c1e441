"""The peer of `python -m benchmarks compile`: MaxText's training step, by its own train_compile.

It runs in an environment of its own, Python 3.12 with `pip install 'maxtext[tpu]==0.2.5'
libtpu==0.0.50.1`, and imports nothing of ours:

  PYTHON benchmarks/peer_compile.py JSON HLO model_name=mixtral-8x7b compile_topology=v5p-128 ...

writes what moe_jax.compile writes; the words after the two files are MaxText's.
"""

import importlib.metadata
import json
import os
import pathlib
import sys
import time

# As in moe_jax/compile/environment.py, whose package this environment does not have.
os.environ |= {
  "JAX_PLATFORMS": "cpu",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-16",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_LOG_DIR": "disabled",
}
os.environ.pop("XLA_FLAGS", None)


def main() -> None:
  """Compiles what the command line names, and writes what came of it."""
  json_file, hlo_file, *words = sys.argv[1:]
  import jax
  import maxtext
  from maxtext.trainers.pre_train import train_compile

  def keep(compiled, _: str) -> None:
    memory = compiled.memory_analysis()
    pathlib.Path(hlo_file).write_text(compiled.as_text())
    state = compiled.input_shardings[0]
    result = {
      "memory": {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
      },
      "mesh": dict(jax.tree.leaves(state)[0].mesh.shape),
      "compile_seconds": time.perf_counter() - start,
      "cpu_seconds": time.process_time() - cpu,
      "versions": {name: importlib.metadata.version(name) for name in ("maxtext", "jax", "libtpu")},
    }
    pathlib.Path(json_file).write_text(json.dumps(result))

  train_compile.save_compiled = keep  # which it calls with the compiled step
  base = pathlib.Path(maxtext.__path__[0]) / "configs/base.yml"
  start, cpu = time.perf_counter(), time.process_time()
  train_compile.main(["train_compile", str(base), f"compiled_trainstep_file={hlo_file}", *words])


if __name__ == "__main__":
  main()
