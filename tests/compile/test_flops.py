"""FLOPs that are counted from a traced step, against those that a config says from its shapes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.compile import flops, programs
from moe_jax.config import Attention, Dispatch, GroupedMatmul, Mesh, Remat, override
from moe_jax.model import cost
from tests.support.toys import mesh_of
from tests.support.train_step_case import SPLIT

CONFIG = override(
  SPLIT,
  {
    "model.dim": 64,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.head_dim": 16,
    "model.moe.expert_dim": 32,
    "model.attention": Attention.REFERENCE,
    "model.remat": Remat.NONE,
    "data.batch_size": 8,
    "data.seq_len": 64,
  },
)


def counted(config, **axes):
  config = dataclasses.replace(config, mesh=Mesh(**{"data": 1} | axes))
  devices = mesh_of(**axes)
  with jax.set_mesh(devices):
    traced, tokens = programs.train_step(config, devices)
    found = flops.count(traced.jaxpr, cost.mean_keys(config))
  return found, cost.count(config).flops_per_token * tokens


def attention(config):
  """FLOPs of all scores and sums, forward and backward; the reference computes [L, L] of them."""
  B, L, model = config.data.batch_size, config.data.seq_len, config.model
  return 3 * 2 * 2 * B * L * L * model.num_heads * model.head_dim * model.num_layers


def test_grouped_experts_do_what_the_shapes_say():
  fields = {"model.moe.dispatch": Dispatch.GROUPED, "model.moe.capacity_factor": 1.0}
  config = override(CONFIG, fields | {"model.moe.grouped_matmul": GroupedMatmul.RAGGED_DOT})
  found, useful = counted(config)
  # The config counts the keys that a query sees, half of them, and no products with gates.
  causal = attention(config) * (1 - cost.mean_keys(config) / config.data.seq_len)
  gates = found.phases.get("combine", 0)
  assert found.total == pytest.approx(useful + causal + gates, rel=1e-6)
  assert gates < 0.01 * useful
  assert found.kernels == pytest.approx(found.phases["experts"], rel=1e-6)


def test_slots_cost_the_capacity_factor():
  one, _ = counted(override(CONFIG, {"model.moe.capacity_factor": 1.0}))
  two, _ = counted(override(CONFIG, {"model.moe.capacity_factor": 2.0}))
  assert two.phases["experts"] == pytest.approx(2 * one.phases["experts"], rel=1e-6)
  assert two.phases["attention"] == one.phases["attention"]


def test_full_remat_computes_the_forward_pass_again():
  none, _ = counted(CONFIG)
  full, _ = counted(override(CONFIG, {"model.remat": Remat.FULL}))
  assert full.phases["attention"] == pytest.approx(4 / 3 * none.phases["attention"], rel=0.01)
  # Of the experts two of three matrices: the outputs of slots have their gates in them.
  assert full.phases["experts"] == pytest.approx(11 / 9 * none.phases["experts"], rel=0.01)


@pytest.mark.parametrize("axes", [dict(expert=4), dict(data=2, fsdp=2, expert=2), dict(tensor=2)])
def test_devices_share_the_same_work(axes):
  """What shard_map does on one device counts for all, and nobody does it twice."""
  whole, _ = counted(CONFIG)
  split, _ = counted(CONFIG, **axes)
  assert split.phases["experts"] == pytest.approx(whole.phases["experts"], rel=1e-6)
  assert split.phases["attention"] == pytest.approx(whole.phases["attention"], rel=1e-6)


def test_loops_and_kernels():
  def step(x_ND, w_DD):
    with jax.named_scope("experts"):
      return jax.lax.scan(lambda x, _: (x @ w_DD, None), x_ND, None, length=7)[0]

  shapes = (jax.ShapeDtypeStruct((3, 5), jnp.float32), jax.ShapeDtypeStruct((5, 5), np.float32))
  found = flops.count(jax.jit(step).trace(*shapes).jaxpr, 1.0)
  assert found.phases == {"experts": 7 * 2 * 3 * 5 * 5} and found.kernels == 0


def test_of_a_conditional_the_false_branch_counts():
  def step(x_ND, w_DD, overflows):
    with jax.named_scope("experts"):
      return jax.lax.cond(overflows, lambda: x_ND @ w_DD @ w_DD, lambda: x_ND @ w_DD)

  shapes = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((3, 5), (5, 5)))
  traced = jax.jit(step).trace(*shapes, jax.ShapeDtypeStruct((), np.bool_))
  assert flops.count(traced.jaxpr, 1.0).phases == {"experts": 2 * 3 * 5 * 5}


@pytest.mark.parametrize("rows", [1, 8])
def test_flash_attention_is_counted_for_the_keys_that_it_reads(rows):
  """Two products forward, and backward three for queries and four for keys; one row or many."""
  fields = {"model.head_dim": 128, "data.seq_len": 128, "data.batch_size": rows}
  config = override(CONFIG, fields | {"model.attention": Attention.SPLASH})
  found, _ = counted(config)
  keys = (128 + 1) / 2
  product = 2 * rows * config.model.num_heads * 128 * 128 * keys
  assert found.kernels == pytest.approx((2 + 3 + 4) * product * config.model.num_layers)
