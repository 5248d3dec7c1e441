"""Context parallelism computes what one device computes: losses, gradients, drops, choices."""

import dataclasses

import jax
import numpy as np
import pytest

from moe_jax import sharding
from moe_jax.config import BalanceScope, Loss, Router, override
from moe_jax.errors import UserError
from moe_jax.kernels import context
from moe_jax.model import transformer
from moe_jax.moe import validation
from tests.support.toys import (
  gradients,
  mesh_of,
  set_up,
  toy_batch,
  toy_config,
  with_delta,
  with_latents,
  with_options,
)

L = 16  # four pieces of four tokens, or eight of two


def config_of(fields=None, model=lambda model: model, **moe):
  """Returns a config that drops assignments, and whose losses are all heavy enough to show."""
  moe = {"capacity_factor": 0.8, "eval_capacity_factor": 0.8, "group_size": 4} | moe
  config = toy_config({"data.seq_len": L} | (fields or {}), **moe)
  loss = dataclasses.replace(config.loss, load_balance=1.0, router_z=0.1, z=0.1)
  return override(config, {"loss": loss, "model": model(config.model)})


SEQUENCE = {"loss": Loss(balance_scope=BalanceScope.SEQUENCE), "train.accumulation": 2}
CASES = {
  "alone": (dict(context=2), config_of(jitter=0.1)),
  "experts": (
    dict(context=4, expert=2),
    config_of({"loss.load": 0.1}, router=Router.NOISY_TOPK, group_size=2),
  ),
  "weights": (dict(context=2, fsdp=2, tensor=2), config_of(model=with_options)),
  "latents": (dict(context=2, fsdp=2), config_of(model=with_latents)),
  "microbatches": (dict(data=2, context=4), config_of(SEQUENCE, group_size=2)),
  "chunks": (dict(context=2, expert=2), config_of({"model.loss_chunk": 12})),
}
EVERYDAY = ("experts", "weights")


def taken(config, axes):
  """Returns the gradients, metrics, logits and choices of a step, on the host."""
  mesh, state, step = set_up(config, axes)

  def outputs(state, batch):
    out = transformer.evaluate(config.model, state.params, state.bias_ZE, batch, trace=True)
    return gradients(state, batch, config), out

  with jax.set_mesh(mesh):
    batch = sharding.to_global(toy_batch(config), mesh)
    grads, out = jax.device_get(jax.jit(outputs)(state, batch))
    return grads, jax.device_get(step(state, batch)[1]), out


@pytest.mark.parametrize(
  "name", [pytest.param(n, marks=[] if n in EVERYDAY else [pytest.mark.slow]) for n in CASES]
)
def test_parts_of_sequences_compute_what_one_device_computes(name):
  axes, config = CASES[name]
  one, parts = taken(config, {}), taken(config, axes)
  assert 0.05 < one[1]["drop_fraction_Z"].mean() < 0.6

  def compare(path, got, want):
    # float32 sums in another order; gradients are of order 0.01 to 1
    where = jax.tree_util.keystr(path)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6, err_msg=where)

  jax.tree_util.tree_map_with_path(compare, parts, one)
  np.testing.assert_allclose(parts[1]["loss"], one[1]["loss"], rtol=1e-6)
  np.testing.assert_array_equal(parts[2].choices.kept_BLE, one[2].choices.kept_BLE)


def test_rows_are_the_pieces_of_sequences_and_join_again():
  x_BL = np.arange(4 * L, dtype=np.int32).reshape(4, L)
  mesh = mesh_of(data=2, context=2)
  with jax.set_mesh(mesh):
    rows_BL, again_BL = jax.jit(lambda x: (context.split(x), context.join(context.split(x))))(x_BL)
  np.testing.assert_array_equal(again_BL, x_BL)
  np.testing.assert_array_equal(rows_BL[0], [0, 1, 2, 3, 12, 13, 14, 15])
  for shard in rows_BL.addressable_shards:  # two rows on each device: of two sequences one part
    assert shard.data.shape == (2, L // 2)
    assert len({int(row[0]) // L for row in shard.data}) == 2
  part = np.stack([context.Part(i, 2, None).places(np.arange(L // 2), L // 2) for i in range(2)])
  np.testing.assert_array_equal(part, context.order(L, 2).reshape(2, -1))
  assert sorted(part.reshape(-1)) == list(range(L))


@pytest.mark.parametrize(
  ("config", "message"),
  [
    (
      config_of({"data.seq_len": 18, "mesh.context": 4}, group_size=0),
      "data.seq_len=18 with config.mesh.context=4.*multiple of 8",
    ),
    (
      config_of({"mesh.context": 2}, group_size=8),
      "group_size=8 with config.mesh.context=2.* set group_size to 4 or a divisor",
    ),
    (config_of({"mesh.context": 2}, group_size=0), "group_size=0 with config.mesh.context=2"),
    (
      config_of({"mesh.context": 2}, model=with_delta),
      "mesh.context=2 with config.model.delta.value_heads=6.* set context=1",
    ),
  ],
)
def test_refuses_by_name(config, message):
  with pytest.raises(UserError, match=message):
    validation.validate(config)


def test_groups_that_change_nothing_need_no_size():
  dropless = dict(capacity_factor=float("inf"), eval_capacity_factor=float("inf"), group_size=0)
  validation.validate(config_of({"mesh.context": 2}, **dropless))
