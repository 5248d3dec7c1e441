"""The ragged exchange's numbers, with an exact emulation of the collective that XLA:CPU lacks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from moe_jax import sharding
from moe_jax.config import (
  Dispatch,
  Exchange,
  ExchangeFallback,
  GroupedMatmul,
  Model,
  MoE,
  Priority,
  Router,
)
from moe_jax.kernels import experts as kernels
from moe_jax.kernels.experts import Experts
from moe_jax.moe import exchange, layer
from moe_jax.moe.routing import LayerInputs, Mode
from tests.support.toys import mesh_of

MESHES = {"expert4-data2": dict(expert=4, data=2), "mixed": dict(expert=2, fsdp=2, tensor=2)}
B, L, D, F, E, K = 8, 9, 10, 18, 8, 2


def ragged_all_to_all(
  operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name
):
  """As jax.lax documents it, but NaN where nobody sends; so, too, if the sizes do not agree."""
  # The real one's result takes its type, and so its place in shard_map, from `output`.
  assert jax.typeof(output).manual_axis_type == jax.typeof(operand).manual_axis_type
  plan = (input_offsets, send_sizes, output_offsets)
  assert all(a.dtype == jnp.int32 for a in (*plan, recv_sizes))
  all_operands = jax.lax.all_gather(operand, axis_name)
  plans = jax.lax.all_gather(jnp.stack(plan), axis_name)
  here, result = jax.lax.axis_index(axis_name), jnp.full_like(output, jnp.nan)
  for source in range(jax.lax.axis_size(axis_name)):
    start, size, to = plans[source, :, here]
    ok = (size == recv_sizes[source]) & (start + size <= operand.shape[0])
    ok &= (to + size <= output.shape[0]) & (start >= 0) & (size >= 0) & (to >= 0)
    row = jnp.arange(output.shape[0]) - to
    inside = ((row >= 0) & (row < size))[:, None]
    sent = all_operands[source].at[start + row].get(mode="clip")
    result = jnp.where(ok, jnp.where(inside, sent, result), jnp.nan)
  return result


experts_kernel = kernels.experts


def experts_with_undefined_rows(x_ND, sizes_E, weights, kernel, activation, gate):
  """NaN in the rows past the last expert's, which a kernel may leave unset."""
  if gate is not None:  # slots, of which a full number is computed
    return experts_kernel(x_ND, sizes_E, weights, kernel, activation, gate)
  y_ND = experts_kernel(x_ND, sizes_E, weights, kernel, activation)
  filled_N = jnp.arange(y_ND.shape[0]) < jnp.sum(sizes_E)
  return jnp.where(filled_N[:, None], y_ND, jnp.nan)


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
  monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_all_to_all)
  monkeypatch.setattr(kernels, "experts", experts_with_undefined_rows)


def make_inputs(skew=0.0, seed=0):
  """x_BLD, logits_BLE, experts, real_BL, weights_BLD of a loss; `skew` favours expert 0, then 1."""
  rng = np.random.default_rng(seed)

  def normal(*shape):
    return rng.normal(size=shape).astype(np.float32)

  logits_BLE = normal(B, L, E) - skew * np.arange(E, dtype=np.float32)
  experts = Experts(normal(E, D, F), normal(E, D, F), normal(E, F, D))
  real_BL = np.arange(L)[None] < rng.integers(L - 3, L + 1, (B, 1))
  return normal(B, L, D), logits_BLE, experts, real_BL, normal(B, L, D)


def run(axes, inputs, *, train=True, **options):
  """(y, statistics, gradients of x, logits and experts) of a loss on y and the statistics."""
  x_BLD, logits_BLE, experts, real_BL, weights_BLD = inputs
  options = dict(dispatch=Dispatch.GROUPED, grouped_matmul=GroupedMatmul.RAGGED_DOT) | options
  moe = MoE(num_experts=E, top_k=K, expert_dim=F, **options)

  def loss(x_BLD, logits_BLE, experts):
    ids_BL = jnp.zeros((B, L), jnp.int32)
    inputs = LayerInputs(logits_BLE, jnp.asarray(real_BL), ids_BL, jnp.zeros((E,)))
    y_BLD, stats, _ = layer.on_mesh(x_BLD, inputs, experts, Model(moe=moe), Mode(train))
    return jnp.sum(y_BLD * weights_BLD) + 0.1 * jnp.sum(stats.prob_E**2), (y_BLD, stats)

  with jax.set_mesh(mesh_of(**axes)):
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    (_, (y_BLD, stats)), grads = step(x_BLD, logits_BLE, experts)
  return jax.device_get((y_BLD, stats, grads))


def compare(got, want):
  def one(path, a, b):
    exact = np.issubdtype(b.dtype, np.integer)
    # float32 sums of some hundred products, in another order
    tolerance = dict(rtol=0) if exact else dict(rtol=1e-4, atol=1e-5 * np.abs(b).max())
    np.testing.assert_allclose(a, b, **tolerance, err_msg=jax.tree_util.keystr(path))

  jax.tree_util.tree_map_with_path(one, got, want)


def test_emulation_gives_the_documented_example():
  operand = jnp.array([[1], [2], [2], [3], [4], [0]], jnp.float32)
  plan = jnp.array([[0, 1], [1, 2], [0, 0], [1, 1], [0, 1], [1, 1], [1, 2], [2, 1]], jnp.int32)
  mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])

  def exchange(operand, plan):
    output = jnp.zeros_like(operand, shape=(4, 1))
    return ragged_all_to_all(operand, output, *plan, axis_name="x")

  with jax.set_mesh(mesh):
    x = PartitionSpec("x")
    got = jax.jit(jax.shard_map(exchange, in_specs=(x, x), out_specs=x))(operand, plan)
  nan = float("nan")  # where the example keeps the 0 of its output
  np.testing.assert_array_equal(got.ravel(), [1, 3, nan, nan, 2, 2, 4, nan])


@pytest.mark.parametrize("router", [Router.TOPK, Router.EXPERT_CHOICE])
@pytest.mark.parametrize("mesh", MESHES)
def test_ragged_equals_all_gather(mesh, router):
  """With buffers for any load nothing is lost, however skewed the routing."""
  inputs = make_inputs(skew=0.3)
  got, want = (
    run(MESHES[mesh], inputs, router=router, exchange=exchange, exchange_factor=0.0)
    for exchange in (Exchange.RAGGED, Exchange.ALL_GATHER)
  )
  compare(got, want)
  y_BLD, stats, grads = got
  assert stats.overflow == 0 and (stats.kept_E == stats.routed_E).all()
  assert stats.routed_E[0] > 2 * stats.routed_E[-1] or router is Router.EXPERT_CHOICE
  assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves((y_BLD, grads)))


def what_fits(chosen_BLE, devices, X, rows):
  """kept_BLE: each device's buffer fills by sender, from each by expert, then by token."""
  kept_BLE = np.zeros_like(chosen_BLE)
  for sequences in np.split(np.arange(B), devices // X):  # of one group of X devices
    for experts in np.split(np.arange(E), X):
      room = rows
      for sender in np.split(sequences, X):
        for e in experts:
          for b in sender:
            for t in np.flatnonzero(chosen_BLE[b, :, e])[:room]:
              kept_BLE[b, t, e] = True
              room -= 1
  return kept_BLE


def reference(x_BLD, logits_BLE, experts, chosen_BLE, kept_BLE):
  gate_BLE = jnp.where(chosen_BLE, jax.nn.softmax(logits_BLE), 0)
  gate_BLE /= jnp.maximum(jnp.sum(gate_BLE, axis=-1, keepdims=True), 1e-9)
  h_BLEF = jax.nn.silu(jnp.einsum("BLD,EDF->BLEF", x_BLD, experts.gate_EDF))
  h_BLEF *= jnp.einsum("BLD,EDF->BLEF", x_BLD, experts.up_EDF)
  y_BLED = jnp.einsum("BLEF,EFD->BLED", h_BLEF, experts.down_EFD)
  return jnp.einsum("BLED,BLE->BLD", y_BLED, jnp.where(kept_BLE, gate_BLE, 0))


@pytest.mark.parametrize("mesh", MESHES)
def test_overflow_is_counted_and_contributes_nothing(mesh):
  axes, inputs = MESHES[mesh], make_inputs(skew=0.5)
  x_BLD, logits_BLE, experts, real_BL, weights_BLD = inputs
  y_BLD, stats, grads = run(axes, inputs, exchange=Exchange.RAGGED, exchange_factor=1.0)

  rank_BLE = np.argsort(np.argsort(-logits_BLE, axis=-1), axis=-1)
  chosen_BLE = (rank_BLE < K) & real_BL[..., None]
  X, devices = axes["expert"], np.prod([axes.get(a, 1) for a in sharding.BATCH_AXES])
  kept_BLE = what_fits(chosen_BLE, devices, X, rows=B * L * K // devices)
  lost = chosen_BLE.sum() - kept_BLE.sum()
  assert 0.1 * chosen_BLE.sum() < lost < 0.7 * chosen_BLE.sum()
  gone_BL = chosen_BLE.any(-1) & ~kept_BLE.any(-1)
  assert gone_BL.any() and (kept_BLE.any(-1) & (kept_BLE != chosen_BLE).any(-1)).any()

  np.testing.assert_array_equal(stats.routed_E, chosen_BLE.sum((0, 1)))
  np.testing.assert_array_equal(stats.kept_E, kept_BLE.sum((0, 1)))
  assert stats.overflow == lost
  np.testing.assert_array_equal(y_BLD[gone_BL], 0)
  np.testing.assert_array_equal(grads[0][gone_BL], 0)

  def loss(x_BLD, logits_BLE, experts):
    y_BLD = reference(x_BLD, logits_BLE, experts, chosen_BLE, kept_BLE)
    prob_E = jnp.sum(jnp.where(real_BL[..., None], jax.nn.softmax(logits_BLE), 0), axis=(0, 1))
    return jnp.sum(y_BLD * weights_BLD) + 0.1 * jnp.sum(prob_E**2), y_BLD

  want = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(x_BLD, logits_BLE, experts)
  compare((grads, y_BLD), want)


def test_ragged_plan_by_hand():
  """Three devices of two experts, four rows each: the first is full before the last one's turn."""
  counts_XXE = jnp.array(
    [
      [[1, 1], [0, 2], [0, 0]],  # device 0 has 2 rows for 0, 2 for 1, none for 2
      [[2, 1], [1, 0], [0, 1]],
      [[0, 2], [0, 0], [3, 0]],
    ],
    jnp.int32,
  )
  # send_start, send, at_receiver, receive_start, receive, at_sender, expert_R
  want = [
    [[0, 2, 4], [2, 2, 0], [0, 0, 0], [0, 2, 4], [2, 2, 0], [0, 0, 0], [0, 1, 0, 0]],
    [[0, 3, 4], [2, 1, 1], [2, 2, 0], [0, 2, 3], [2, 1, 0], [2, 3, 2], [1, 1, 0, -1]],
    [[0, 2, 2], [0, 0, 3], [4, 3, 1], [0, 0, 1], [0, 1, 3], [4, 4, 2], [1, 0, 0, 0]],
  ]
  for here, plan in enumerate(want):
    got = exchange.ragged_plan(counts_XXE, here, 4)
    assert [a.tolist() for a in got] == plan


BUFFERS = [Exchange.RAGGED, Exchange.ALL_TO_ALL]


@pytest.mark.parametrize("router", [Router.TOPK, Router.EXPERT_CHOICE])
@pytest.mark.parametrize("exchange", BUFFERS)
@pytest.mark.parametrize("mesh", MESHES)
def test_what_overflows_is_computed_exactly(mesh, exchange, router):
  """As with buffers for any load, but for the matmul's rounding, which depends on its rows."""
  axes, inputs = MESHES[mesh], make_inputs(skew=0.5)
  options = dict(exchange=exchange, router=router)
  want = run(axes, inputs, **options)
  small = dict(exchange_factor=0.4)
  assert run(axes, inputs, **options, **small)[1].overflow > 0
  got = run(axes, inputs, **options, **small, exchange_fallback=ExchangeFallback.EXACT)
  assert got[1].overflow == 0 and (got[1].kept_E == got[1].routed_E).all()
  compare(got, want)


@pytest.mark.parametrize("exchange", BUFFERS)
def test_the_fallback_changes_nothing_where_all_fits(exchange):
  axes, inputs = MESHES["mixed"], make_inputs()
  options = dict(exchange=exchange, exchange_factor=1.9)
  want = run(axes, inputs, **options)
  assert want[1].overflow == 0
  got = run(axes, inputs, **options, exchange_fallback=ExchangeFallback.EXACT)
  jax.tree.map(np.testing.assert_array_equal, got, want)


CHUNKED = {
  **{exchange.value: dict(exchange=exchange) for exchange in Exchange},
  "slots": dict(dispatch=Dispatch.GATHER, group_size=3, capacity_factor=0.7),
  "priority": dict(dispatch=Dispatch.GATHER, group_size=3, priority=Priority.CHOICE),
  "expert_choice": dict(router=Router.EXPERT_CHOICE, group_size=3, capacity_factor=1.2),
  "exact": dict(
    exchange=Exchange.RAGGED, exchange_factor=0.4, exchange_fallback=ExchangeFallback.EXACT
  ),
}


@pytest.mark.parametrize("case", CHUNKED)
def test_chunks_give_the_same(case):
  axes, inputs = MESHES["mixed"], make_inputs(skew=0.3)
  want = run(axes, inputs, **CHUNKED[case])
  got = run(axes, inputs, **CHUNKED[case], exchange_chunks=3)
  assert want[1].overflow == 0
  compare(got, want)
