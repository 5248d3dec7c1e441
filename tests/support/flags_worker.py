"""Compiles a small program under a chip's flags: flags_worker.py CHIP XLA_FLAGS.

Prints, as JSON, what is refused of an option that no compiler has, and for a GPU which options let
XLA's scheduler hide the latency of a ragged exchange.
"""

import json
import os
import sys

from moe_jax.compile.environment import ENVIRONMENT

os.environ |= ENVIRONMENT  # before jax is imported
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.compile import targets
from moe_jax.config import Config, Dispatch, Exchange, Mesh, Model, MoE, override
from moe_jax.start import flags

os.environ["XLA_FLAGS"] = sys.argv[2]
SPLIT = Config(model=Model(moe=MoE(num_experts=8)), mesh=Mesh(fsdp=2, expert=4))
RAGGED = override(
  SPLIT, {"model.moe.dispatch": Dispatch.GROUPED, "model.moe.exchange": Exchange.RAGGED}
)
TORUS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
TORUS["tpu7x"] = "tpu7x:2x2x1"


def lowered(devices, exchange):
  """Returns a matmul of gathered weights, of rows that an exchange has moved, and its gradient."""
  mesh = jax.sharding.Mesh(devices, ("x",))

  def local(x_ND, w_DD, sizes_X):
    if exchange:
      starts_X = jnp.cumsum(sizes_X) - sizes_X
      x_ND = jax.lax.ragged_all_to_all(
        x_ND, jnp.zeros_like(x_ND), starts_X, sizes_X, starts_X, sizes_X, axis_name="x"
      )
    return x_ND @ jax.lax.all_gather(w_DD, "x", tiled=True)

  specs = (P("x"), P("x"), P())
  mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P("x"), check_vma=False)
  shapes = (((1024, 512), jnp.bfloat16), ((512, 512), jnp.bfloat16), ((len(devices),), jnp.int32))
  arrays = [
    jax.ShapeDtypeStruct(*shape, sharding=NamedSharding(mesh, spec))
    for shape, spec in zip(shapes, specs, strict=True)
  ]
  return jax.jit(mapped).lower(*arrays)


def refused(program):
  try:
    program.compile(compiler_options={"is_no_flag": "1"})
  except jax.errors.JaxRuntimeError as error:
    return "is_no_flag" if "is_no_flag" in str(error) else str(error)
  return ""


def main(chip):
  tpu = chip in TORUS
  devices = targets.devices(targets.parse(TORUS[chip] if tpu else "h200-4"))
  program = lowered(devices, exchange=not tpu)

  def hidden(config):
    options = flags.compiler_options(flags.flags_of(chip, config, 2))
    return "scheduling_name" in program.compile(compiler_options=options).as_text()

  return {"split": hidden(SPLIT), "ragged": hidden(RAGGED), "refused": refused(program)}


if __name__ == "__main__":
  print(json.dumps(main(sys.argv[1])))
