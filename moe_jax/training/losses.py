"""The losses, computed from sums over the whole batch: cross entropy, z-losses, load balance.

A forward pass returns sums and counts, never means. They can be added over devices, microbatches
and evaluation batches, so that the loss of accumulated microbatches is the loss of the full batch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.config import BalanceScope, Loss
from moe_jax.moe.balance import balance_loss, cv_squared_plus_one
from moe_jax.moe.counts import MoeStats


class Sums(NamedTuple):
  """Sums over the real targets of a batch, and the MoE statistics of its tokens."""

  nll: jax.Array  # float32 [], nats
  z: jax.Array  # float32 [], logsumexp(output logits)^2
  targets: jax.Array  # int32 []
  moe: MoeStats  # stacked on Z
  microbatches: jax.Array  # int32 []
  balance_Z: jax.Array  # float32, sum over the microbatches of their load balance losses


class Losses(NamedTuple):
  """The losses as float32 scalars; all but `total` are without their weights of the config."""

  total: jax.Array  # the loss that training minimises: cross entropy and the weighted others
  cross_entropy: jax.Array  # nats per token
  load_balance: jax.Array  # mean over the MoE layers; 1.0 is perfect balance
  router_z: jax.Array  # mean over the MoE layers
  z: jax.Array
  importance: jax.Array  # mean over the MoE layers; 1.0 is perfect balance of the gates
  load: jax.Array  # the same for the probabilities that noisy_topk chooses an expert; otherwise 0.0


@jax.named_scope("loss")
def sums(nll_BL: jax.Array, log_z_BL: jax.Array, real_BL: jax.Array, moe: MoeStats) -> Sums:
  """Returns the sums of a batch.

  Args:
    nll_BL: float32, the nats of each token's target.
    log_z_BL: float32, the logsumexp of each token's logits.
    real_BL: bool, False at padding, which counts in no sum.
    moe: the statistics of the MoE layers for the same batch.
  """
  return Sums(
    nll=jnp.sum(jnp.where(real_BL, nll_BL, 0)),
    z=jnp.sum(jnp.where(real_BL, log_z_BL**2, 0)),
    targets=jnp.sum(real_BL, dtype=jnp.int32),
    moe=moe,
    microbatches=jnp.ones((), jnp.int32),
    balance_Z=balance_loss(moe.routed_E, moe.prob_E, moe.tokens),
  )


def load_balance(sums: Sums, scope: BalanceScope) -> jax.Array:
  """Returns the load balance loss of each layer, float32 [Z]; 1.0 if the experts' loads are equal.

  The two means that it multiplies are over the tokens of `scope`. A smaller scope asks for more:
  the loads are to be equal in each sequence, or in each microbatch (2501.11873).
  """
  moe = sums.moe
  if scope is BalanceScope.SEQUENCE:
    return moe.sequence_balance / jnp.maximum(moe.sequences, 1)
  if scope is BalanceScope.MICROBATCH:
    return sums.balance_Z / sums.microbatches
  return balance_loss(moe.routed_E, moe.prob_E, moe.tokens)


def total(sums: Sums, loss: Loss, num_moe_layers: int) -> Losses:
  """Returns the losses of a batch.

  Raises:
    ValueError: statistics are not of `num_moe_layers` layers; a missing layer must not count as 0.
  """
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
  terms = (
    (loss.load_balance, balance),
    (loss.router_z, router_z),
    (loss.z, z),
    (loss.importance, importance),
    (loss.load, load),
  )
  # A term of weight 0 is logged only: added as 0 times a value, it would have a backward pass, and
  # make NaN of a value or a gradient that is not finite.
  minimised = cross_entropy + sum(weight * term for weight, term in terms if weight)
  return Losses(minimised, cross_entropy, balance, router_z, z, importance, load)
