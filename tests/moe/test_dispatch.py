"""Dispatchers by hand: slots, drops, capacity; and the oracle's set of drops."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import Dispatch, MoE, Router
from moe_jax.moe import dispatch, routers
from moe_jax.moe.routing import Assignments, RouterInputs
from tests.support import routings
from tests.support.routings import ROUTINGS, E


@pytest.mark.preflight
@pytest.mark.parametrize("routing", ROUTINGS)
def test_the_assignments_dropped_are_the_oracles(routing):
  """Assignment by assignment: who was kept, not only how many."""
  values, _ = routings.inputs()
  moe = routings.moe_config(routing)
  logits_TE = (values.x_BLD @ values.weights["router_DE"]).reshape(-1, E)
  scale_TE = np.log1p(np.exp(values.x_BLD @ values.weights["noise_DE"])).reshape(-1, E) + 0.01
  bias_E = values.bias_E if moe.bias_update_rate else np.zeros(E)
  capacity = dispatch.capacity(moe.capacity_factor, moe.group_size, moe.top_k, E)
  spec = routers.ROUTERS[moe.router]

  @jax.jit
  def assign(inputs):
    more = dict(capacity=capacity) if spec.takes_capacity else {}
    assigned = spec.function(inputs, moe, **more)
    slots = dispatch.capacity_slots(assigned, E, 1, capacity)
    return assigned.token_N, assigned.expert_N, assigned.real_N, slots.kept_N, slots.slot_N

  got = set()
  for start in range(0, len(logits_TE), moe.group_size):
    part = slice(start, start + moe.group_size)
    inputs = RouterInputs(
      jnp.float32(logits_TE[part]),
      jnp.array(values.real_BL.reshape(-1)[part]),
      jnp.array(values.ids_BL.reshape(-1)[part]),
      jnp.float32(bias_E),
      jnp.float32(values.noise_BLE.reshape(-1, E)[part]),
      {"noise_scale": jnp.float32(scale_TE[part])},
    )
    for token, expert, real, kept, slot in zip(*map(np.asarray, assign(inputs)), strict=True):
      assert kept == (slot < E * capacity) and (not kept or slot // capacity == expert)
      if real:
        got.add((int(token) + start, int(expert), bool(kept)))
  assert got == set(routings.expected(routing, False).assignments)


def by_hand(experts, real):
  T = len(experts)
  return Assignments(jnp.arange(T), jnp.array(experts), jnp.ones(T), jnp.array(real))


def layout_by_hand(tokens, capacity):
  """One group, two experts, K=1."""
  return dispatch.Layout(
    tokens=tokens,
    groups=1,
    experts=2,
    capacity=capacity,
    slots=True,
    choices=1,
    in_token_order=True,
    exchange_factor=0.0,
  )


def test_drops_by_hand():
  """T=4, E=2, K=1, C=1: the second token of each expert is dropped, padding takes no slot."""
  assigned = by_hand([0, 1, 0, 1], [True, False, True, True])
  layout = layout_by_hand(tokens=4, capacity=1)
  x_TD = jnp.arange(8.0).reshape(4, 2)
  rows = dispatch.gather_pack(x_TD, assigned, layout)
  slots = rows.slots
  assert slots.kept_N.tolist() == [True, False, False, True]
  assert slots.slot_N.tolist() == [0, 2, 2, 1]  # 2 = E*C: no slot
  assert slots.assignment_S.tolist() == [0, 3]
  assert rows.x.tolist() == [[[0, 1]], [[6, 7]]]  # [E, C, D]
  combined_TD = dispatch.gather_combine(rows.x, assigned, slots, layout)
  assert combined_TD.tolist() == [[0, 1], [0, 0], [0, 0], [6, 7]]


def test_sorted_rows_by_hand():
  """The same assignments without a capacity: expert 0 has rows 0 and 1, expert 1 has row 2."""
  slots, sizes_E = dispatch.sorted_slots(by_hand([0, 1, 0, 1], [True, False, True, True]), 2)
  assert sizes_E.tolist() == [2, 1]
  assert slots.slot_N.tolist() == [0, 4, 1, 2]
  assert slots.assignment_S.tolist() == [0, 2, 3, 4]


def test_slots_have_the_gates_of_their_assignments():
  """An empty one holds any token, so its gate must be 0; no gradient is of what stands there."""
  assigned = by_hand([0, 0, 1], [True, True, True])._replace(gate_N=jnp.array([0.5, 0.25, 0.125]))
  layout, gather = layout_by_hand(tokens=3, capacity=3), dispatch.DISPATCHERS[Dispatch.GATHER]

  def gates(gate_N):
    return gather.pack(jnp.ones((3, 2)), assigned._replace(gate_N=gate_N), layout).gate

  gate_ER, pull = jax.vjp(gates, assigned.gate_N)
  assert gate_ER.tolist() == [[0.5, 0.25, 0], [0.125, 0, 0]]
  assert pull(jnp.arange(1.0, 7).reshape(2, 3))[0].tolist() == [1, 2, 4]


@pytest.mark.parametrize("dispatcher", ["gather", "einsum"])
def test_combine_reads_no_empty_slot(dispatcher):
  """Empty slots hold whatever an expert made of nothing: here NaN, which would show."""
  assigned = by_hand([0, 0, 1], [True, True, True])
  slots = dispatch.capacity_slots(assigned, 2, 1, capacity=3)
  y_ECD = jnp.full((2, 3, 5), jnp.nan).at[0, :2].set(1.0).at[1, 0].set(2.0)
  if dispatcher == "einsum":  # multiplies by a one-hot, so its experts must make 0 of 0
    y_ECD = jnp.nan_to_num(y_ECD)
  combine = dispatch.DISPATCHERS[Dispatch(dispatcher)].combine
  y_TD = combine(y_ECD, assigned, slots, layout_by_hand(tokens=3, capacity=3))
  np.testing.assert_array_equal(y_TD, [[1.0] * 5, [1.0] * 5, [2.0] * 5])


@pytest.mark.parametrize(
  ("factor", "expected_capacity"),
  [(1.0, 4), (1.25, 5), (1.3, 6), (1.1, 5), (math.inf, 16), (9.0, 16), (0.01, 1)],
)
def test_capacity_by_hand(factor, expected_capacity):
  assert dispatch.capacity(factor, tokens=16, top_k=2, num_experts=8) == expected_capacity


@pytest.mark.parametrize("how", list(Dispatch))
@pytest.mark.parametrize("router", [Router.TOPK, Router.EXPERT_CHOICE])
def test_a_dispatch_that_never_drops_ignores_the_capacity_factor(how, router):
  """Unless the router takes the capacity: expert choice has one with every dispatcher."""
  moe = MoE(num_experts=8, router=router, dispatch=how, capacity_factor=0.5)
  dropless = how in (Dispatch.GROUPED, Dispatch.DENSE) and router is Router.TOPK
  assert dispatch.layout_of(moe, (3, 16), train=True).capacity == (16 if dropless else 2)
