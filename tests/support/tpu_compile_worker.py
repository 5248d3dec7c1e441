"""Compiles one case for a TPU that need not be present.

Writes {hlo, flops} of the forward pass and of forward and backward pass, or what its functions say.
test_tpu_compile.py runs this file in a separate process.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import sys

from moe_jax.compile.environment import ENVIRONMENT

os.environ |= ENVIRONMENT  # before jax is imported
os.environ.pop("XLA_FLAGS", None)  # those of conftest simulate devices

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax import sharding
from moe_jax.compile import targets
from moe_jax.compile.program import read_program
from moe_jax.config import Dispatch, Exchange, GroupedMatmul, Mesh, Model, MoE, override
from moe_jax.kernels.experts import Experts
from moe_jax.kernels.experts import experts as run_experts
from moe_jax.moe import validation
from moe_jax.moe.layer import on_mesh
from moe_jax.moe.routing import LayerInputs, Mode
from moe_jax.start import command_line
from tests.support.train_step_case import SPLIT, collectives, compile_config, compile_step

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


def compiled(function, *shapes):
  program = jax.jit(function).lower(*shapes).compile()
  return {"hlo": program.as_text(), "flops": program.cost_analysis()["flops"]}


def with_gradient(loss, differentiated):
  return jax.value_and_grad(loss, argnums=differentiated, has_aux=True)


def mesh_of(devices, data, expert):
  mesh = Mesh(data=data, expert=expert)
  return sharding.make_mesh(mesh, devices[: data * expert])


def array(mesh, shape, dtype, *axes):
  return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))


def layer(mesh, sizes=(B, L, D, F), **options):
  """Returns a loss of the MoE layer on a mesh, which has an auxiliary output, and its shapes."""
  B, L, D, F = sizes
  moe = MoE(num_experts=E, top_k=K, expert_dim=F, **options)

  def loss(x_BLD, logits_BLE, experts, real_BL, ids_BL, bias_E):
    inputs = LayerInputs(logits_BLE, real_BL, ids_BL, bias_E)
    out = on_mesh(x_BLD, inputs, experts, Model(moe=moe), Mode(train=True))
    total = jnp.sum(out.y_BLD.astype(jnp.float32) ** 2) + jnp.sum(out.stats.prob_E**2)
    return total, (out.y_BLD, out.stats)

  def tokens(shape, dtype):
    return array(mesh, shape, dtype, sharding.BATCH_AXES)

  def weights(shape):
    return array(mesh, shape, jnp.bfloat16, "expert")

  experts = Experts(weights((E, D, F)), weights((E, D, F)), weights((E, F, D)))
  return loss, (
    tokens((B, L, D), jnp.bfloat16),
    tokens((B, L, E), jnp.float32),
    experts,
    tokens((B, L), jnp.bool_),
    tokens((B, L), jnp.int32),
    array(mesh, (E,), jnp.float32),
  )


def compile_both(loss, shapes, differentiated=(0, 1, 2)):
  """Compiles a loss, and the loss with its gradient."""
  return [compiled(f, *shapes) for f in (loss, with_gradient(loss, differentiated))]


# The layers whose cycles are counted: large enough that matmuls take most of them.
_COUNTED = {
  "one expert a device": dict(expert=8, dispatch=Dispatch.GATHER, capacity_factor=1.25),
  "two experts a device": dict(expert=4, dispatch=Dispatch.GATHER, capacity_factor=1.25),
  "all_to_all": dict(
    expert=8, dispatch=Dispatch.GROUPED, exchange=Exchange.ALL_TO_ALL, exchange_factor=1.25
  ),
  "ragged": dict(
    expert=8, dispatch=Dispatch.GROUPED, exchange=Exchange.RAGGED, exchange_factor=1.25
  ),
}


def counted_cycles():
  """Returns the cycles by phase of forward and backward pass of each layer of _COUNTED."""
  devices = targets.devices(targets.parse("v5p:2x2x2"))
  found = {}
  for name, options in _COUNTED.items():
    expert = options.pop("expert")
    mesh = mesh_of(devices, data=8 // expert, expert=expert)
    with jax.set_mesh(mesh):
      loss, shapes = layer(mesh, (8, 2048, 2048, 4096), **options)
      program = compiled(with_gradient(loss, (0, 1, 2)), *shapes)
      found[name] = read_program(program["hlo"], dict(mesh.shape)).cycles
  return found


def split_steps():
  """Returns the collectives of a train step on 64 devices, by layout."""
  devices = targets.devices(targets.parse("v5p:4x4x4"))
  found = {}
  for fsdp, expert in ((8, 8), (64, 1)):
    mesh = Mesh(data=1, fsdp=fsdp, expert=expert)
    hlo = compile_config(dataclasses.replace(SPLIT, mesh=mesh), devices)
    found[f"{fsdp}x{expert}"] = {k: sorted(v) for k, v in collectives(hlo).items()}
  return found


def meshes(slices):
  """Returns [axis sizes, notice] of each (config, topology, overrides), by a run's functions."""
  found = []
  for path, name, overrides in slices:
    devices = targets.devices(targets.parse(name))
    config = override(command_line.load_file(path), overrides, "here")
    mesh = validation.resolve_mesh(config, len(devices)).mesh
    made = sharding.make_mesh(mesh, devices)
    found.append([dict(made.shape), sharding.split_notice(mesh, devices)])
  return found


def sorted_experts(devices, kernel):
  """Compiles the experts of sorted rows on one device."""
  mesh = mesh_of(devices, data=1, expert=1)

  def loss(x_ND, experts, sizes_E):
    y_ND = run_experts(x_ND, sizes_E, experts, kernel)
    return jnp.sum(y_ND.astype(jnp.float32) ** 2), y_ND

  experts = Experts(*(array(mesh, s, jnp.bfloat16) for s in ((E, D, F), (E, D, F), (E, F, D))))
  shapes = (array(mesh, (N, D), jnp.bfloat16), experts, array(mesh, (E,), jnp.int32))
  with jax.set_mesh(mesh):
    return compile_both(loss, shapes, (0, 1))


def cross_compile():
  import tokamax

  return tokamax.config.cross_compile(True)


def main():
  case, out = sys.argv[1:]
  if case == "cycles":
    result = counted_cycles()
  elif case == "split":
    result = split_steps()
  elif case.startswith("["):
    result = meshes(json.loads(case))
  elif case in ("splash", "reference"):
    devices = targets.devices(targets.parse("v5e:2x2"))
    result = compile_step(devices, case)
  else:
    devices = targets.devices(targets.parse("v5e:2x4"))
    # Without cross_compile tokamax sees a CPU, and silently uses XLA's ragged_dot.
    with cross_compile() if case.startswith("mosaic") else contextlib.nullcontext():
      if case in _LAYERS:
        mesh = mesh_of(devices, data=2, expert=4)
        with jax.set_mesh(mesh):
          result = compile_both(*layer(mesh, **_LAYERS[case]))
      else:
        result = sorted_experts(devices, GroupedMatmul(case))
  pathlib.Path(out).write_text(json.dumps(result))


if __name__ == "__main__":
  main()
