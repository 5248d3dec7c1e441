"""Compiles a train step for devices that need not be present, and finds large arrays in it."""

import dataclasses
import re
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moe_jax import config as config_lib
from moe_jax import sharding
from moe_jax.config import Attention, Dtype
from moe_jax.data import pipeline
from moe_jax.training import train

LENGTH = 1152  # a multiple of 128 that is no other size, and no product of other sizes
_CONFIG = config_lib.Config(
  model=config_lib.Model(
    vocab_size=512, num_layers=2, dim=256, num_heads=4, num_kv_heads=2, head_dim=128,
    compute_dtype=Dtype.BFLOAT16,
    moe=config_lib.MoE(num_experts=4, expert_dim=128, capacity_factor=1.25),
  ),
  data=config_lib.Data(seq_len=LENGTH, batch_size=4),
  mesh=config_lib.Mesh(data=1, expert=2, tensor=2),
)  # fmt: skip


def compile_step(devices: Sequence[jax.Device], attention: str) -> str:
  """Returns the optimized HLO of a step on four devices: heads over two, sequences over two."""
  model = dataclasses.replace(_CONFIG.model, attention=Attention(attention))
  config = dataclasses.replace(_CONFIG, model=model)
  shape = tuple(getattr(config.mesh, axis) for axis in sharding.AXES)
  axis_types = (AxisType.Auto,) * len(shape)
  mesh = Mesh(np.array(devices[:4]).reshape(shape), sharding.AXES, axis_types=axis_types)
  with jax.set_mesh(mesh):
    _, shapes, shardings = train.init_state(config, mesh)
    state = jax.tree.map(
      lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, shardings
    )
    rows = NamedSharding(mesh, PartitionSpec(sharding.BATCH_AXES))
    tokens_BL = jax.ShapeDtypeStruct((config.data.batch_size, LENGTH), np.int32, sharding=rows)
    batch = pipeline.Batch(*[tokens_BL] * len(pipeline.Batch._fields))
    step = train.compile_step(config, shardings)
    return step.lower(state, batch).compile().as_text()


def square_arrays(hlo: str) -> set[str]:
  """Returns the types of arrays with two dimensions of LENGTH, such as 'f32[2,1152,1152]'."""
  types = set(re.findall(r"\b[a-z]+\d+\[[\d,]+\]", hlo)) | set(re.findall(r"\bpred\[[\d,]+\]", hlo))
  return {t for t in types if re.findall(r"\d+", t.split("[")[1]).count(str(LENGTH)) > 1}
