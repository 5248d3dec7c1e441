"""The losses, from sums over the whole batch: cross entropy, z-losses, load balance.

A forward pass returns sums and counts, never means, so that devices, microbatches and evaluation
batches add up, and the loss of accumulated microbatches is the loss of the full batch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax import config as config_lib
from moe_jax.expert_parallel import MoeStats


class Sums(NamedTuple):
  """Sums over the real targets of a batch, and the MoE statistics of its tokens."""

  nll: jax.Array  # float32 [], nats
  z: jax.Array  # float32 [], logsumexp(output logits)^2
  targets: jax.Array  # int32 []
  moe: MoeStats  # stacked on Z


class Losses(NamedTuple):
  """float32 scalars; the terms are unweighted."""

  total: jax.Array  # what is minimised
  cross_entropy: jax.Array  # nats per token, the language-model loss alone
  load_balance: jax.Array  # mean over the MoE layers; 1.0 is perfect balance
  router_z: jax.Array  # mean over the MoE layers
  z: jax.Array


def sums(logits_BLV: jax.Array, targets_BL: jax.Array, real_BL: jax.Array, moe: MoeStats) -> Sums:
  """Cross-entropy sums of float32 logits; padding (real_BL False) counts nowhere."""
  log_z_BL = jax.nn.logsumexp(logits_BLV, axis=-1)
  target_BL = jnp.take_along_axis(logits_BLV, targets_BL[..., None], axis=-1)[..., 0]
  return Sums(
    nll=jnp.sum(jnp.where(real_BL, log_z_BL - target_BL, 0)),
    z=jnp.sum(jnp.where(real_BL, log_z_BL**2, 0)),
    targets=jnp.sum(real_BL, dtype=jnp.int32),
    moe=moe,
  )


def load_balance(moe: MoeStats, top_k: int) -> jax.Array:
  """E * sum_e(f_e * P_e) per layer, float32 [Z] (Switch 2101.03961 eq. 4, GShard 2006.16668).

  f_e is the share of assignments, before drops, and carries no gradient; P_e the mean probability.
  Both over the global batch (2501.11873). Uniform f and P give exactly 1 for every E and K.
  """
  tokens_Z1 = jnp.maximum(moe.tokens, 1).astype(jnp.float32)[:, None]
  share_ZE = moe.routed_E.astype(jnp.float32) / (tokens_Z1 * top_k)
  return moe.routed_E.shape[-1] * jnp.sum(share_ZE * moe.prob_E / tokens_Z1, axis=-1)


def total(sums: Sums, loss: config_lib.Loss, moe: config_lib.MoE, num_moe_layers: int) -> Losses:
  """The training loss. The number of layers is checked: a lost statistic must not read as 0."""
  targets = jnp.maximum(sums.targets, 1).astype(jnp.float32)
  cross_entropy, z = sums.nll / targets, sums.z / targets
  if sums.moe.tokens.shape[0] != num_moe_layers:
    raise ValueError(f"statistics of {sums.moe.tokens.shape[0]} of {num_moe_layers} MoE layers")
  if num_moe_layers:
    balance = jnp.mean(load_balance(sums.moe, moe.top_k))
    tokens_Z = jnp.maximum(sums.moe.tokens, 1).astype(jnp.float32)
    router_z = jnp.mean(sums.moe.z / tokens_Z)  # ST-MoE 2202.08906 eq. 5
  else:
    balance = router_z = jnp.zeros(())
  weighted = loss.load_balance * balance + loss.router_z * router_z + loss.z * z
  return Losses(cross_entropy + weighted, cross_entropy, balance, router_z, z)
