"""Dispatchers: how a group's tokens reach their experts and come back.

A dispatcher is two functions with the experts between them, `combine(experts(pack(x)))`: `pack`
lays tokens out in C slots per expert, `combine` adds each token's gated outputs. All dispatchers
give the same answer; `dense` is the oracle that needs no slots.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax import config as config_lib
from moe_jax.routers import Routing


def capacity(factor: float, tokens: int, top_k: int, num_experts: int) -> int:
  """C = ceil(factor * T*K/E), at most T. Factor 0 drops nothing: a slot for every token.

  T is the size of a routing group, never of a device's shard: what drops does not depend on the
  mesh.
  """
  if factor == 0:
    return tokens
  # The small term keeps 1.1 * 10 = 11.000000000000002 from becoming 12.
  return max(1, min(tokens, math.ceil(factor * tokens * top_k / num_experts - 1e-6)))


class Slots(NamedTuple):
  """Where each assignment sits in the [E*C] slots; dropped ones and padding sit at E*C."""

  slot_N: jax.Array  # int32
  kept_N: jax.Array  # bool


def assign_slots(routing: Routing, num_experts: int, capacity: int) -> Slots:
  """Fills every expert's slots in the order of the assignments; what does not fit is dropped."""
  to_expert_NE = jax.nn.one_hot(routing.expert_N, num_experts, dtype=jnp.int32)
  to_expert_NE = to_expert_NE * routing.real_N[:, None].astype(jnp.int32)
  before_NE = jnp.cumsum(to_expert_NE, axis=0) - to_expert_NE
  rank_N = jnp.sum(before_NE * to_expert_NE, axis=-1)
  kept_N = routing.real_N & (rank_N < capacity)
  slot_N = jnp.where(kept_N, routing.expert_N * capacity + rank_N, num_experts * capacity)
  return Slots(slot_N, kept_N)


class Dispatcher(NamedTuple):
  pack: Callable[..., jax.Array]  # (x_TD, Routing, Slots, E, C) -> x_ECD
  combine: Callable[..., jax.Array]  # (y_ECD, Routing, Slots, T) -> y_TD


def _gather_pack(x_TD, routing, slots, num_experts, capacity):
  T, D = x_TD.shape
  token_S = jnp.full((num_experts * capacity,), T, jnp.int32)
  token_S = token_S.at[slots.slot_N].set(routing.token_N, mode="drop")
  # Empty slots read as zeros: the experts run on them and their weight gradients must stay finite.
  x_SD = x_TD.at[token_S].get(mode="fill", fill_value=0)
  return x_SD.reshape(num_experts, capacity, D)


def _gather_combine(y_ECD, routing, slots, tokens):
  y_SD = y_ECD.reshape(-1, y_ECD.shape[-1])
  y_ND = y_SD.at[slots.slot_N].get(mode="fill", fill_value=0).astype(jnp.float32)
  y_ND = y_ND * routing.gate_N[:, None]
  y_TD = jnp.zeros((tokens, y_SD.shape[-1]), jnp.float32)
  return y_TD.at[routing.token_N].add(y_ND).astype(y_ECD.dtype)


def _one_hots(routing, slots, tokens, num_slots):
  from_token_NT = jax.nn.one_hot(routing.token_N, tokens, dtype=jnp.float32)
  to_slot_NS = jax.nn.one_hot(slots.slot_N, num_slots, dtype=jnp.float32)  # slot E*C: all zeros
  return from_token_NT, to_slot_NS


def _einsum_pack(x_TD, routing, slots, num_experts, capacity):
  from_NT, to_NS = _one_hots(routing, slots, x_TD.shape[0], num_experts * capacity)
  mask_ST = jnp.einsum("NS,NT->ST", to_NS, from_NT).astype(x_TD.dtype)
  return jnp.einsum("ST,TD->SD", mask_ST, x_TD).reshape(num_experts, capacity, -1)


def _einsum_combine(y_ECD, routing, slots, tokens):
  y_SD = y_ECD.reshape(-1, y_ECD.shape[-1])
  from_NT, to_NS = _one_hots(routing, slots, tokens, y_SD.shape[0])
  gate_TS = jnp.einsum("NT,NS,N->TS", from_NT, to_NS, routing.gate_N)
  return jnp.einsum("TS,SD->TD", gate_TS, y_SD.astype(jnp.float32)).astype(y_ECD.dtype)


def _dense_pack(x_TD, routing, slots, num_experts, capacity):
  assert capacity == x_TD.shape[0], "the dense oracle has one slot per expert and token"
  return jnp.broadcast_to(x_TD[None], (num_experts, *x_TD.shape))


def _dense_combine(y_ECD, routing, slots, tokens):
  gate_N = jnp.where(routing.real_N, routing.gate_N, 0)
  gate_TE = jnp.zeros((tokens, y_ECD.shape[0]), jnp.float32)
  gate_TE = gate_TE.at[routing.token_N, routing.expert_N].add(gate_N)
  return jnp.einsum("TE,ETD->TD", gate_TE, y_ECD.astype(jnp.float32)).astype(y_ECD.dtype)


DISPATCHERS = {
  config_lib.Dispatch.GATHER: Dispatcher(_gather_pack, _gather_combine),
  config_lib.Dispatch.EINSUM: Dispatcher(_einsum_pack, _einsum_combine),
  config_lib.Dispatch.DENSE: Dispatcher(_dense_pack, _dense_combine),
}
