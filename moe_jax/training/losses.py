"""The losses, from sums over the whole batch: cross entropy, z-losses, load balance.

A forward pass returns sums and counts, never means, so that devices, microbatches and evaluation
batches add up, and the loss of accumulated microbatches is the loss of the full batch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax import config as config_lib
from moe_jax.config import BalanceScope
from moe_jax.moe import counts
from moe_jax.moe.counts import MoeStats


class Sums(NamedTuple):
  """Sums over the real targets of a batch, and the MoE statistics of its tokens."""

  nll: jax.Array  # float32 [], nats
  z: jax.Array  # float32 [], logsumexp(output logits)^2
  targets: jax.Array  # int32 []
  moe: MoeStats  # stacked on Z
  microbatches: jax.Array  # int32 []
  balance_Z: jax.Array  # float32, sum of the microbatches' load balance losses


class Losses(NamedTuple):
  """float32 scalars; the terms are unweighted."""

  total: jax.Array  # what is minimised
  cross_entropy: jax.Array  # nats per token, the language-model loss alone
  load_balance: jax.Array  # mean over the MoE layers; 1.0 is perfect balance
  router_z: jax.Array  # mean over the MoE layers
  z: jax.Array
  importance: jax.Array  # mean over the MoE layers; 1.0 is perfect balance of the gates
  load: jax.Array  # the same of noisy_topk's chances to be chosen; 0.0 with other routers


def sums(logits_BLV: jax.Array, targets_BL: jax.Array, real_BL: jax.Array, moe: MoeStats) -> Sums:
  """Cross-entropy sums of float32 logits; padding (real_BL False) counts nowhere."""
  nll_BL, log_z_BL = token_nll(logits_BLV, targets_BL)
  return Sums(
    nll=jnp.sum(jnp.where(real_BL, nll_BL, 0)),
    z=jnp.sum(jnp.where(real_BL, log_z_BL**2, 0)),
    targets=jnp.sum(real_BL, dtype=jnp.int32),
    moe=moe,
    microbatches=jnp.ones((), jnp.int32),
    balance_Z=counts.balance(moe.routed_E, moe.prob_E, moe.tokens),
  )


def token_nll(logits_BLV: jax.Array, targets_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(nats of each target, logsumexp of its logits), float32 [B, L]."""
  log_z_BL = jax.nn.logsumexp(logits_BLV, axis=-1)
  target_BL = jnp.take_along_axis(logits_BLV, targets_BL[..., None], axis=-1)[..., 0]
  return log_z_BL - target_BL, log_z_BL


def load_balance(sums: Sums, scope: BalanceScope) -> jax.Array:
  """The load balance loss of each layer, float32 [Z], over the tokens of `scope`; 1.0 is balance.

  Smaller scopes ask for more: each row, or each microbatch, balanced by itself (2501.11873).
  """
  moe = sums.moe
  if scope is BalanceScope.SEQUENCE:
    return moe.sequence_balance / jnp.maximum(moe.sequences, 1)
  if scope is BalanceScope.MICROBATCH:
    return sums.balance_Z / sums.microbatches
  return counts.balance(moe.routed_E, moe.prob_E, moe.tokens)


def cv_squared_plus_one(x_ZE: jax.Array) -> jax.Array:
  """E * sum(x^2) / sum(x)^2, float32 [Z]: Shazeer's CV(x)^2 (1701.06538 eq. 7); 1.0: equal."""
  total_Z = jnp.maximum(jnp.sum(x_ZE, axis=-1), 1e-20)
  return x_ZE.shape[-1] * jnp.sum((x_ZE / total_Z[:, None]) ** 2, axis=-1)


def total(sums: Sums, loss: config_lib.Loss, num_moe_layers: int) -> Losses:
  """The training loss. The number of layers is checked: a lost statistic must not read as 0."""
  targets = jnp.maximum(sums.targets, 1).astype(jnp.float32)
  cross_entropy, z = sums.nll / targets, sums.z / targets
  moe = sums.moe
  if moe.tokens.shape[0] != num_moe_layers:
    raise ValueError(f"statistics of {moe.tokens.shape[0]} of {num_moe_layers} MoE layers")
  balance = router_z = importance = load = jnp.zeros(())
  if num_moe_layers:
    balance = jnp.mean(load_balance(sums, loss.balance_scope))
    tokens_Z = jnp.maximum(moe.tokens, 1).astype(jnp.float32)
    router_z = jnp.mean(moe.z / tokens_Z)  # ST-MoE 2202.08906 eq. 5
    importance = jnp.mean(cv_squared_plus_one(moe.importance_E))
    load = jnp.mean(cv_squared_plus_one(moe.load_E))
  weighted = (
    loss.load_balance * balance + loss.router_z * router_z + loss.z * z
    + loss.importance * importance + loss.load * load
  )  # fmt: skip
  return Losses(cross_entropy + weighted, cross_entropy, balance, router_z, z, importance, load)
