"""Compiles one case for a TPU that need not be present.

Writes {hlo, flops} of the forward pass and of forward and backward pass, or the optimized HLO of a
train step. test_tpu_compile.py runs this file in a separate process.
"""

import contextlib
import json
import os
import pathlib
import sys

# libtpu must not look for the machine that it describes, nor lock itself to one process.
os.environ |= {
  "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-16", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_LOG_DIR": "disabled",
}  # fmt: skip
os.environ.pop("XLA_FLAGS", None)  # those of conftest simulate devices

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moe_jax import config as config_lib
from moe_jax import sharding
from moe_jax.config import Dispatch, Exchange, GroupedMatmul
from moe_jax.kernels.experts import Experts
from moe_jax.kernels.experts import experts as run_experts
from moe_jax.moe.layer import on_mesh
from moe_jax.moe.routing import LayerInputs
from tests.support.train_step_case import compile_step

B, L, D, F, E, K = 8, 128, 256, 384, 8, 2
N = 2048  # rows of the experts alone

_RAGGED = dict(dispatch=Dispatch.GROUPED, exchange=Exchange.RAGGED)
_LAYERS = {
  "ragged": dict(_RAGGED, grouped_matmul=GroupedMatmul.RAGGED_DOT),
  "mosaic": dict(_RAGGED, grouped_matmul=GroupedMatmul.MOSAIC),
  "all_gather": dict(
    dispatch=Dispatch.GROUPED,
    exchange=Exchange.ALL_GATHER,
    grouped_matmul=GroupedMatmul.RAGGED_DOT,
  ),
  "capacity": dict(dispatch=Dispatch.GATHER, capacity_factor=1.25),
}


def compile_both(loss, differentiated, *shapes):
  """Compiles `loss`, which has an auxiliary output, and its gradient."""
  compiled = []
  for function in (loss, jax.value_and_grad(loss, argnums=differentiated, has_aux=True)):
    program = jax.jit(function).lower(*shapes).compile()
    compiled.append({"hlo": program.as_text(), "flops": program.cost_analysis()["flops"]})
  return compiled


def mesh_of(devices, data, expert):
  devices = np.array(devices[: data * expert]).reshape(data, 1, expert, 1)
  return Mesh(devices, sharding.AXES, axis_types=(AxisType.Auto,) * len(sharding.AXES))


def array(mesh, shape, dtype, *axes):
  return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))


def layer(devices, **options):
  """Compiles the MoE layer on 8 devices: data=2, expert=4."""
  mesh = mesh_of(devices, data=2, expert=4)
  moe = config_lib.MoE(num_experts=E, top_k=K, expert_dim=F, **options)

  def loss(x_BLD, logits_BLE, experts, real_BL, ids_BL, bias_E):
    inputs = LayerInputs(logits_BLE, real_BL, ids_BL, bias_E)
    out = on_mesh(x_BLD, inputs, experts, moe, train=True)
    total = jnp.sum(out.y_BLD.astype(jnp.float32) ** 2) + jnp.sum(out.stats.prob_E**2)
    return total, (out.y_BLD, out.stats)

  def tokens(shape, dtype):
    return array(mesh, shape, dtype, sharding.BATCH_AXES)

  def weights(shape):
    return array(mesh, shape, jnp.bfloat16, "expert")

  experts = Experts(weights((E, D, F)), weights((E, D, F)), weights((E, F, D)))
  with jax.set_mesh(mesh):
    return compile_both(
      loss, (0, 1, 2), tokens((B, L, D), jnp.bfloat16), tokens((B, L, E), jnp.float32), experts,
      tokens((B, L), jnp.bool_), tokens((B, L), jnp.int32), array(mesh, (E,), jnp.float32),
    )  # fmt: skip


def sorted_experts(devices, kernel):
  """Compiles the experts of sorted rows on one device."""
  mesh = mesh_of(devices, data=1, expert=1)

  def loss(x_ND, experts, sizes_E):
    y_ND = run_experts(x_ND, sizes_E, experts, kernel)
    return jnp.sum(y_ND.astype(jnp.float32) ** 2), y_ND

  experts = Experts(*(array(mesh, s, jnp.bfloat16) for s in ((E, D, F), (E, D, F), (E, F, D))))
  with jax.set_mesh(mesh):
    return compile_both(
      loss, (0, 1), array(mesh, (N, D), jnp.bfloat16), experts, array(mesh, (E,), jnp.int32)
    )


def cross_compile():
  import tokamax

  return tokamax.config.cross_compile(True)


def main():
  case, out = sys.argv[1:]
  if case in ("splash", "reference"):
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    result = compile_step(devices, case)
  else:
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    # Without cross_compile tokamax sees a CPU, and silently uses XLA's ragged_dot.
    with cross_compile() if case.startswith("mosaic") else contextlib.nullcontext():
      if case in _LAYERS:
        result = layer(devices, **_LAYERS[case])
      else:
        result = sorted_experts(devices, GroupedMatmul(case))
  pathlib.Path(out).write_text(json.dumps(result))


if __name__ == "__main__":
  main()
