"""The statistics of an MoE layer, as sums, so that devices, microbatches and batches add up.

Letters: T tokens of one device; N their assignments; P parts of the sequence; Z stacked layers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.kernels import context
from moe_jax.moe import exchange
from moe_jax.moe.balance import balance_loss
from moe_jax.moe.dispatch import Layout, by_token
from moe_jax.moe.routing import LayerInputs, Routing

POSITIONS = 8  # P, the equal parts of the sequence whose drops are counted separately


class MoeStats(NamedTuple):
  """Sums over the real tokens. The layer returns them summed over the whole mesh.

  A stack of layers has a leading Z on every field.
  """

  tokens: jax.Array  # int32 [], real tokens
  sequences: jax.Array  # int32 [], sequences with a real token
  routed_E: jax.Array  # int32, assignments before capacity
  kept_E: jax.Array  # int32, assignments that an expert computed
  kept_K: jax.Array  # int32, kept assignments by rank of the choice; one entry for expert choice
  routed_P: jax.Array  # int32, assignments before capacity by part of the sequence
  kept_P: jax.Array  # int32, kept assignments by part of the sequence
  overflow: jax.Array  # int32 [], assignments lost to a full exchange buffer, not to capacity
  prob_E: jax.Array  # float32, router probability; differentiable
  sequence_balance: jax.Array  # float32 [], the balance loss of each sequence; differentiable
  importance_E: jax.Array  # float32, gates before capacity; differentiable
  gate_kept: jax.Array  # float32 [], gates of the assignments that an expert computed
  load_E: jax.Array  # float32, noisy_topk's chance to be chosen; differentiable
  z: jax.Array  # float32 [], logsumexp(logits)^2; differentiable
  entropy: jax.Array  # float32 [], nats


class Choices(NamedTuple):
  """The experts that each token was routed to, and those that computed it; for evaluation.

  A stack of layers has a leading Z.
  """

  routed_BLE: jax.Array  # bool, before capacity
  kept_BLE: jax.Array  # bool, computed by the expert
  gate_BLE: jax.Array  # float32, before capacity; 0 where not routed


def zeros(num_layers: int, num_experts: int, choices: int) -> MoeStats:
  """Returns statistics of zero for a stack of layers, each field with a leading Z.

  Args:
    num_layers: Z.
    num_experts: E.
    choices: K, or 0 if tokens differ in their number of assignments.
  """
  Z, E, K = num_layers, num_experts, max(choices, 1)
  count_Z, sum_Z = jnp.zeros((Z,), jnp.int32), jnp.zeros((Z,))
  count_ZE, sum_ZE = jnp.zeros((Z, E), jnp.int32), jnp.zeros((Z, E))
  count_ZK, count_ZP = (jnp.zeros((Z, n), jnp.int32) for n in (K, POSITIONS))
  return MoeStats(
    tokens=count_Z,
    sequences=count_Z,
    routed_E=count_ZE,
    kept_E=count_ZE,
    kept_K=count_ZK,
    routed_P=count_ZP,
    kept_P=count_ZP,
    overflow=count_Z,
    prob_E=sum_ZE,
    sequence_balance=sum_Z,
    importance_E=sum_ZE,
    gate_kept=sum_Z,
    load_E=sum_ZE,
    z=sum_Z,
    entropy=sum_Z,
  )


def local_sums(
  inputs: LayerInputs, routing: Routing, kept_N: jax.Array, layout: Layout, *, drops: bool
) -> MoeStats:
  """Returns the sums over the tokens of this device.

  Args:
    inputs: what the router read on this device.
    routing: the assignments of this device's tokens.
    kept_N: bool, assignments that an expert computed.
    layout: of the dispatch.
    drops: whether assignments without an expert were dropped for want of a slot; if False, a full
      exchange buffer lost them, and they count as overflow.
  """
  B, L, E = inputs.logits_BLE.shape
  real_BL = inputs.real_BL
  lost_N = jnp.zeros_like(kept_N) if drops else routing.real_N & ~kept_N
  probs_BLE = routing.probs_TE.reshape(B, L, E)
  prob_BE = jnp.sum(jnp.where(real_BL[..., None], probs_BLE, 0), axis=1)
  sequence_N = routing.token_N // L
  routed_BE = jnp.zeros((B, E), jnp.int32)
  routed_BE = routed_BE.at[sequence_N, routing.expert_N].add(routing.real_N.astype(jnp.int32))
  of_rows = (routed_BE, prob_BE, jnp.sum(real_BL, axis=1))
  of_sequences = exchange.of_sequences(of_rows)
  real_B = exchange.of_sequences(jnp.any(real_BL, axis=1)).astype(bool)
  to_expert_NE = routing.expert_N[:, None] == jnp.arange(E)[None]

  part_N = context.places(routing.token_N % L, L) * POSITIONS // (L * context.parts())
  to_part_NP = part_N[:, None] == jnp.arange(POSITIONS)[None]

  def per_expert(x_N: jax.Array, where_N: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(to_expert_NE & where_N[:, None], x_N[:, None], 0), axis=0)

  def per_part(where_N: jax.Array) -> jax.Array:
    return jnp.sum(to_part_NP & where_N[:, None], axis=0, dtype=jnp.int32)

  if layout.choices:
    kept_K = jnp.sum(by_token(kept_N, routing.assignments, layout), axis=0, dtype=jnp.int32)
  else:
    kept_K = jnp.sum(kept_N, keepdims=True, dtype=jnp.int32)
  entropy_BLE = jax.scipy.special.xlogy(probs_BLE, probs_BLE)
  z_BL = jax.nn.logsumexp(inputs.logits_BLE, axis=-1) ** 2
  load_BLE = routing.load_TE.reshape(B, L, E)
  return MoeStats(
    tokens=jnp.sum(real_BL, dtype=jnp.int32),
    sequences=jnp.sum(real_B, dtype=jnp.int32),
    routed_E=jnp.sum(routed_BE, axis=0),
    kept_E=per_expert(jnp.ones_like(routing.expert_N), kept_N),
    kept_K=kept_K,
    routed_P=per_part(routing.real_N),
    kept_P=per_part(kept_N),
    overflow=jnp.sum(lost_N, dtype=jnp.int32),
    prob_E=jnp.sum(prob_BE, axis=0),
    sequence_balance=jnp.sum(balance_loss(*of_sequences)),
    importance_E=per_expert(routing.gate_N, routing.real_N),
    gate_kept=jnp.sum(jnp.where(kept_N, jax.lax.stop_gradient(routing.gate_N), 0)),
    load_E=jnp.sum(jnp.where(real_BL[..., None], load_BLE, 0), axis=(0, 1)),
    z=jnp.sum(jnp.where(real_BL, z_BL, 0)),
    entropy=-jnp.sum(jnp.where(real_BL[..., None], jax.lax.stop_gradient(entropy_BLE), 0)),
  )


def trace_choices(routing: Routing, kept_N: jax.Array, shape: tuple[int, ...]) -> Choices:
  """Returns the experts of each token of this device, a batch of `shape` (B, L)."""
  B, L = shape
  E = routing.probs_TE.shape[-1]
  index = (routing.token_N, routing.expert_N)
  none_TE = jnp.zeros((B * L, E), bool)
  gate_N = jnp.where(routing.real_N, routing.gate_N, 0)
  return Choices(
    routed_BLE=none_TE.at[index].max(routing.real_N).reshape(B, L, E),
    kept_BLE=none_TE.at[index].max(kept_N).reshape(B, L, E),
    gate_BLE=jnp.zeros((B * L, E)).at[index].add(gate_N).reshape(B, L, E),
  )


def by_gate(
  routed_ZTE: np.ndarray, kept_ZTE: np.ndarray, gate_ZTE: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Orders each token's experts by their gates, the largest first, from arrays of Choices.

  Returns:
    expert_ZTK, int32, gate_ZTK and dropped_ZTK, where K is the most experts that a token has; one
    that has fewer gets -1, 0 and False.
  """
  K = routed_ZTE.sum(axis=-1).max(initial=0)
  order_ZTE = np.argsort(np.where(routed_ZTE, -gate_ZTE, np.inf), axis=-1, kind="stable")
  order_ZTK = order_ZTE[..., :K]
  parts = (routed_ZTE, routed_ZTE & ~kept_ZTE, gate_ZTE)
  has_ZTK, dropped_ZTK, gate_ZTK = (np.take_along_axis(x, order_ZTK, -1) for x in parts)
  return np.where(has_ZTK, order_ZTK, -1).astype(np.int32), gate_ZTK, dropped_ZTK
