"""What an MoE layer counts: sums, so that devices, microbatches and evaluation batches add up.

Letters: T tokens of one device; N their assignments; P parts of the sequence; Z stacked layers, or
whatever else leads in `balance`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.moe.dispatch import Layout, by_token
from moe_jax.moe.routing import LayerInputs, Routing

POSITIONS = 8  # P, equal parts of the sequence in which drops are counted apart


class MoeStats(NamedTuple):
  """Sums over the real tokens. The layer returns them summed over the whole mesh.

  A stack of layers has a leading Z on every field.
  """

  tokens: jax.Array  # int32 [], real tokens
  sequences: jax.Array  # int32 [], rows with a real token
  routed_E: jax.Array  # int32, assignments before capacity
  kept_E: jax.Array  # int32, assignments that an expert computed
  kept_K: jax.Array  # int32, the same by rank of the choice; one entry for expert choice
  routed_P: jax.Array  # int32, assignments before capacity by part of the sequence
  kept_P: jax.Array  # int32
  overflow: jax.Array  # int32 [], assignments lost to a full exchange buffer, not to capacity
  prob_E: jax.Array  # float32, router probability; differentiable
  sequence_balance: jax.Array  # float32 [], the balance loss of each row alone; differentiable
  importance_E: jax.Array  # float32, gates before capacity; differentiable
  gate_kept: jax.Array  # float32 [], gates of the assignments that an expert computed
  load_E: jax.Array  # float32, noisy_topk's chance to be chosen; differentiable
  z: jax.Array  # float32 [], logsumexp(logits)^2; differentiable
  entropy: jax.Array  # float32 [], nats


class Choices(NamedTuple):
  """What became of each token, whatever the router and dispatcher; for evaluation.

  A stack of layers has a leading Z.
  """

  routed_BLE: jax.Array  # bool, before capacity
  kept_BLE: jax.Array  # bool, computed by the expert
  gate_BLE: jax.Array  # float32, before capacity; 0 where not routed


def zeros(num_layers: int, num_experts: int, choices: int) -> MoeStats:
  """Of a stack of layers that counted nothing."""
  Z, E, K = num_layers, num_experts, max(choices, 1)
  count_Z, sum_Z = jnp.zeros((Z,), jnp.int32), jnp.zeros((Z,))
  count_ZE, sum_ZE = jnp.zeros((Z, E), jnp.int32), jnp.zeros((Z, E))
  count_ZK, count_ZP = (jnp.zeros((Z, n), jnp.int32) for n in (K, POSITIONS))
  return MoeStats(
    tokens=count_Z, sequences=count_Z, routed_E=count_ZE, kept_E=count_ZE, kept_K=count_ZK,
    routed_P=count_ZP, kept_P=count_ZP, overflow=count_Z, prob_E=sum_ZE, sequence_balance=sum_Z,
    importance_E=sum_ZE, gate_kept=sum_Z, load_E=sum_ZE, z=sum_Z, entropy=sum_Z,
  )  # fmt: skip


def local_sums(
  inputs: LayerInputs, routing: Routing, kept_N: jax.Array, layout: Layout, *, drops: bool
) -> MoeStats:
  """Counts the tokens of this device.

  Args:
    inputs: of the router.
    routing: of all those tokens.
    kept_N: bool, assignments that an expert computed.
    layout: of the dispatch.
    drops: whether a missing assignment was dropped for want of a slot; if not, a full buffer of
      the exchange has lost it.
  """
  B, L, E = inputs.logits_BLE.shape
  real_BL = inputs.real_BL
  lost_N = jnp.zeros_like(kept_N) if drops else routing.real_N & ~kept_N
  probs_BLE = routing.probs_TE.reshape(B, L, E)
  prob_BE = jnp.sum(jnp.where(real_BL[..., None], probs_BLE, 0), axis=1)
  sequence_N = routing.token_N // L
  routed_BE = jnp.zeros((B, E), jnp.int32)
  routed_BE = routed_BE.at[sequence_N, routing.expert_N].add(routing.real_N.astype(jnp.int32))
  to_expert_NE = routing.expert_N[:, None] == jnp.arange(E)[None]

  part_N = (routing.token_N % L) * POSITIONS // L
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
    sequences=jnp.sum(jnp.any(real_BL, axis=1), dtype=jnp.int32),
    routed_E=jnp.sum(routed_BE, axis=0),
    kept_E=per_expert(jnp.ones_like(routing.expert_N), kept_N),
    kept_K=kept_K,
    routed_P=per_part(routing.real_N),
    kept_P=per_part(kept_N),
    overflow=jnp.sum(lost_N, dtype=jnp.int32),
    prob_E=jnp.sum(prob_BE, axis=0),
    sequence_balance=jnp.sum(balance(routed_BE, prob_BE, jnp.sum(real_BL, axis=1))),
    importance_E=per_expert(routing.gate_N, routing.real_N),
    gate_kept=jnp.sum(jnp.where(kept_N, jax.lax.stop_gradient(routing.gate_N), 0)),
    load_E=jnp.sum(jnp.where(real_BL[..., None], load_BLE, 0), axis=(0, 1)),
    z=jnp.sum(jnp.where(real_BL, z_BL, 0)),
    entropy=-jnp.sum(jnp.where(real_BL[..., None], jax.lax.stop_gradient(entropy_BLE), 0)),
  )


def choices(routing: Routing, kept_N: jax.Array, shape: tuple[int, ...]) -> Choices:
  """Where each token of this device was sent, and whether it was computed there; shape (B, L)."""
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


def balance(routed_ZE: jax.Array, prob_ZE: jax.Array, tokens_Z: jax.Array) -> jax.Array:
  """E * sum_e(f_e * P_e), float32 [Z] (Switch 2101.03961 eq. 4, GShard 2006.16668).

  f_e is the share of the assignments, before drops, and carries no gradient; P_e the mean
  probability. Uniform f and P give exactly 1 for every E and K; no tokens give 0.
  """
  routed_Z1 = jnp.maximum(jnp.sum(routed_ZE, axis=-1, keepdims=True), 1).astype(jnp.float32)
  share_ZE = routed_ZE.astype(jnp.float32) / routed_Z1
  mean_ZE = prob_ZE / jnp.maximum(tokens_Z, 1).astype(jnp.float32)[:, None]
  return routed_ZE.shape[-1] * jnp.sum(share_ZE * mean_ZE, axis=-1)
