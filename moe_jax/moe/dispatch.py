"""Dispatch: how tokens reach their experts and come back.

`pack` lays tokens out in rows for the experts, `combine` adds each token's gated outputs; the
experts, and on a mesh the exchange between devices, go in between. Rows are either C slots for each
expert and routing group (`capacity_slots`: what does not fit is dropped) or all assignments sorted
by expert (`sorted_slots`: nothing is dropped). Every dispatcher gives the same answer.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax import config as config_lib
from moe_jax.moe.routers import Routing


def capacity(factor: float, tokens: int, top_k: int, num_experts: int) -> int:
  """C = ceil(factor * T*K/E), at most T. Factor 0 drops nothing: a slot for every token.

  T is the size of a routing group, never of a device's shard: what drops does not depend on the
  mesh.
  """
  if factor == 0:
    return tokens
  # The small term keeps 1.1 * 10 = 11.000000000000002 from becoming 12.
  return max(1, min(tokens, math.ceil(factor * tokens * top_k / num_experts - 1e-6)))


def flatten(routing: Routing) -> Routing:
  """Routings of M groups of T tokens -> one of M*T tokens, N assignments of each group in turn."""
  M, T, _ = routing.probs_TE.shape
  token_MN = routing.token_N + T * jnp.arange(M, dtype=jnp.int32)[:, None]
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), routing._replace(token_N=token_MN))


class Slots(NamedTuple):
  """Which assignment sits in which row; S rows, N assignments."""

  slot_N: jax.Array  # int32; S for an assignment without a row: dropped, or padding
  assignment_S: jax.Array  # int32; N for an empty row
  kept_N: jax.Array  # bool


def capacity_slots(routing: Routing, num_experts: int, groups: int, capacity: int) -> Slots:
  """Rows [E, M, C], each (expert, group) filled in the order of the group's assignments."""
  N = routing.token_N.shape[0]
  group_N = jnp.arange(N, dtype=jnp.int32) // (N // groups)
  bucket_N = routing.expert_N * groups + group_N
  order_N, place_N, start_B = _sort(bucket_N, routing.real_N, num_experts * groups)
  rank_N = place_N - start_B[bucket_N]
  kept_N = routing.real_N & (rank_N < capacity)
  slots = num_experts * groups * capacity
  slot_N = jnp.where(kept_N, bucket_N * capacity + rank_N, slots)
  place_BC = start_B[:-1, None] + jnp.arange(capacity)[None]
  filled_BC = place_BC < start_B[1:, None]
  assignment_BC = order_N.at[place_BC].get(mode="clip")
  return Slots(slot_N, jnp.where(filled_BC, assignment_BC, N).reshape(-1), kept_N)


def sorted_slots(routing: Routing, num_experts: int) -> tuple[Slots, jax.Array]:
  """(a row for each assignment, sorted by expert, padding last; int32 rows of each expert)."""
  N = routing.token_N.shape[0]
  order_N, place_N, start_E = _sort(routing.expert_N, routing.real_N, num_experts)
  filled_S = jnp.arange(N) < start_E[-1]
  slots = Slots(
    slot_N=jnp.where(routing.real_N, place_N, N),
    assignment_S=jnp.where(filled_S, order_N, N),
    kept_N=routing.real_N,
  )
  return slots, jnp.diff(start_E)


def _sort(bucket_N, real_N, buckets):
  """Stable, padding last: (order_N, its inverse, each bucket's start and the last one's end)."""
  bucket_N = jnp.where(real_N, bucket_N, buckets)
  order_N = jnp.argsort(bucket_N, stable=True).astype(jnp.int32)
  index_N = jnp.arange(order_N.shape[0], dtype=jnp.int32)
  place_N = jnp.zeros_like(order_N).at[order_N].set(index_N, unique_indices=True)
  ends = jnp.arange(buckets + 1)
  start_B = jnp.searchsorted(bucket_N[order_N], ends, method="scan_unrolled")
  return order_N, place_N, start_B.astype(jnp.int32)


class Layout(NamedTuple):
  """The static sizes of a dispatch."""

  tokens: int  # of all groups
  groups: int  # M
  num_experts: int
  choices: int  # K, or 0 where the number of a token's assignments varies
  in_token_order: bool  # assignments are those of token 0, then of token 1, ...


class Dispatcher(NamedTuple):
  pack: Callable[..., jax.Array]  # (x_TD, Routing, Slots, Layout) -> x_SD
  combine: Callable[..., jax.Array]  # (y_SD, Routing, Slots, Layout) -> y_TD


def gather_pack(x_TD: jax.Array, routing: Routing, slots: Slots, layout: Layout) -> jax.Array:
  token_S = routing.token_N.at[slots.assignment_S].get(mode="fill", fill_value=layout.tokens)
  if not layout.choices:
    return _rows_or_zero(x_TD, token_S)
  return _take_rows(x_TD, token_S, by_token(slots.slot_N, routing, layout))


def gather_combine(y_SD: jax.Array, routing: Routing, slots: Slots, layout: Layout) -> jax.Array:
  if layout.choices:
    y_TKD = _rows_or_zero(y_SD, by_token(slots.slot_N, routing, layout))
    gate_TK = by_token(routing.gate_N, routing, layout)
    y_TD = jnp.einsum("TKD,TK->TD", y_TKD, gate_TK, preferred_element_type=jnp.float32)
  else:
    y_ND = _rows_or_zero(y_SD, slots.slot_N).astype(jnp.float32) * routing.gate_N[:, None]
    y_TD = jnp.zeros((layout.tokens, y_SD.shape[1]), jnp.float32).at[routing.token_N].add(y_ND)
  return y_TD.astype(y_SD.dtype)


def _rows_or_zero(x_SD, index):
  # An empty row reads as zeros: experts run on it, and their weight gradients must stay finite.
  return x_SD.at[index].get(mode="fill", fill_value=0)


def by_token(x_N: jax.Array, routing: Routing, layout: Layout) -> jax.Array:
  """[T, K]: of the assignments of each token, whatever their priority."""
  if not layout.in_token_order:
    x_N = x_N[jnp.argsort(routing.token_N, stable=True)]
  return x_N.reshape(-1, layout.choices)


@jax.custom_vjp
def _take_rows(x_TD, token_S, slot_TK):
  """x_TD[token_S]; the gradient is a gather too, where autodiff would add rows in any order."""
  return _rows_or_zero(x_TD, token_S)


def _take_rows_forward(x_TD, token_S, slot_TK):
  return _take_rows(x_TD, token_S, slot_TK), slot_TK


def _take_rows_backward(slot_TK, dx_SD):
  dx_TKD = _rows_or_zero(dx_SD, slot_TK)
  return jnp.sum(dx_TKD.astype(jnp.float32), axis=1).astype(dx_SD.dtype), None, None


_take_rows.defvjp(_take_rows_forward, _take_rows_backward)


def _one_hots(routing, slots, layout):
  """[M, N, T] and [M, N, E, C], float32: where an assignment comes from, and its slot."""
  M, E = layout.groups, layout.num_experts
  T, C = layout.tokens // M, slots.assignment_S.shape[0] // (E * M)
  from_NT = jax.nn.one_hot(routing.token_N % T, T, dtype=jnp.float32)
  to_NE = jax.nn.one_hot(routing.expert_N, E, dtype=jnp.float32)
  to_NC = jax.nn.one_hot(slots.slot_N % C, C, dtype=jnp.float32) * slots.kept_N[:, None]
  to_NEC = to_NE[:, :, None] * to_NC[:, None]
  return from_NT.reshape(M, -1, T), to_NEC.reshape(M, -1, E, C)


def _einsum_pack(x_TD, routing, slots, layout):
  from_MNT, to_MNEC = _one_hots(routing, slots, layout)
  mask_EMCT = jnp.einsum("MNEC,MNT->EMCT", to_MNEC, from_MNT).astype(x_TD.dtype)
  x_MTD = x_TD.reshape(layout.groups, -1, x_TD.shape[-1])
  return jnp.einsum("EMCT,MTD->EMCD", mask_EMCT, x_MTD).reshape(-1, x_TD.shape[-1])


def _einsum_combine(y_SD, routing, slots, layout):
  from_MNT, to_MNEC = _one_hots(routing, slots, layout)
  gate_MN = routing.gate_N.reshape(layout.groups, -1)
  gate_MTEC = jnp.einsum("MNT,MNEC,MN->MTEC", from_MNT, to_MNEC, gate_MN)
  y_EMCD = y_SD.reshape(layout.num_experts, layout.groups, -1, y_SD.shape[-1])
  y_MTD = jnp.einsum("MTEC,EMCD->MTD", gate_MTEC, y_EMCD.astype(jnp.float32))
  return y_MTD.reshape(-1, y_SD.shape[-1]).astype(y_SD.dtype)


def _dense_pack(x_TD, routing, slots, layout):
  """Every expert gets every token."""
  return jnp.tile(x_TD, (layout.num_experts, 1))


def _dense_combine(y_SD, routing, slots, layout):
  gate_N = jnp.where(routing.real_N, routing.gate_N, 0)
  gate_TE = jnp.zeros((layout.tokens, layout.num_experts), jnp.float32)
  gate_TE = gate_TE.at[routing.token_N, routing.expert_N].add(gate_N)
  y_ETD = y_SD.reshape(layout.num_experts, layout.tokens, -1).astype(jnp.float32)
  return jnp.einsum("TE,ETD->TD", gate_TE, y_ETD).astype(y_SD.dtype)


DISPATCHERS = {
  config_lib.Dispatch.GATHER: Dispatcher(gather_pack, gather_combine),
  config_lib.Dispatch.GROUPED: Dispatcher(gather_pack, gather_combine),
  config_lib.Dispatch.EINSUM: Dispatcher(_einsum_pack, _einsum_combine),
  config_lib.Dispatch.DENSE: Dispatcher(_dense_pack, _dense_combine),
}
