"""Compiles a train step for devices that need not be present, and finds large arrays in it."""

import dataclasses
import math
import re
from collections.abc import Sequence

import jax

from moe_jax import sharding
from moe_jax.compile import programs
from moe_jax.config import Attention, Config, Data, Dtype, Mesh, Model, MoE, Remat

LENGTH = 1152  # a multiple of 128 that is no other size, and no product of other sizes
_CONFIG = Config(
  model=Model(
    vocab_size=512,
    num_layers=2,
    dim=256,
    num_heads=4,
    num_kv_heads=2,
    head_dim=128,
    compute_dtype=Dtype.BFLOAT16,
    moe=MoE(num_experts=4, expert_dim=128, capacity_factor=1.25),
  ),
  data=Data(seq_len=LENGTH, batch_size=4),
  mesh=Mesh(data=1, expert=2, tensor=2),
)


def compile_step(devices: Sequence[jax.Device], attention: str) -> str:
  """Returns the optimized HLO of a step on four devices: heads over two, sequences over two."""
  model = dataclasses.replace(_CONFIG.model, attention=Attention(attention))
  return compile_config(dataclasses.replace(_CONFIG, model=model), devices[:4])


def compile_config(config: Config, devices: Sequence[jax.Device]) -> str:
  """Returns the optimized HLO of a config's step on these devices."""
  mesh = sharding.make_mesh(config.mesh, devices)
  with jax.set_mesh(mesh):
    return programs.train_step(config, mesh)[0].lower().compile().as_text()


# A step whose weights are split over all 64 devices of a slice. 2048 / 64 is less than a row of a
# vector register, along which XLA gathers and scatters nothing.
SPLIT = Config(
  model=Model(
    vocab_size=1024,
    num_layers=2,
    dim=2048,
    num_heads=8,
    num_kv_heads=8,
    head_dim=128,
    tied_head=False,
    compute_dtype=Dtype.BFLOAT16,
    remat=Remat.FULL,
    attention=Attention.REFERENCE,
    moe=MoE(num_experts=8, expert_dim=512, capacity_factor=1.25),
  ),
  data=Data(seq_len=256, batch_size=64),
)


def collectives(hlo: str) -> dict[str, set[int]]:
  """Returns how many elements the arrays have that each kind of collective returns.

  A TPU's reduce-scatter may stand in a fusion, which is named after it.
  """
  kinds = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "all-reduce-scatter")
  found: dict[str, set[int]] = {kind: set() for kind in kinds}
  for types, op, rest in re.findall(r" = (\S.*?) ([\w\-]+?)(?:-start)?\((.*)", hlo):
    kind = "all-reduce-scatter" if "calls=%all-reduce-scatter" in rest else op
    if kind in found:
      sizes = re.findall(r"\w+\[([\d,]*)\]", types)
      found[kind] |= {math.prod(int(n) for n in size.split(",") if n) for size in sizes}
  return found


def square_arrays(hlo: str) -> set[str]:
  """Returns the types of arrays with two dimensions of LENGTH, such as 'f32[2,1152,1152]'."""
  types = set(re.findall(r"\b[a-z]+\d+\[[\d,]+\]", hlo)) | set(re.findall(r"\bpred\[[\d,]+\]", hlo))
  return {t for t in types if re.findall(r"\d+", t.split("[")[1]).count(str(LENGTH)) > 1}
