"""Routers: pure functions from one group's logits to a flat list of assignments.

A router knows nothing of devices or state: noise, balancing bias and token ids are arguments. To
add one, write the function, give it a name in `config.Router` and an entry in ROUTERS; every
dispatcher and mesh then takes it. docs/routing.md compares them.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax import config as config_lib
from moe_jax.config import Priority, Score


class RouterInputs(NamedTuple):
  """What a routing group brings; a layer's arrays lead with B, L in place of T."""

  logits_TE: jax.Array  # float32
  real_T: jax.Array  # bool, False at padding
  ids_T: jax.Array  # int32 token ids
  bias_E: jax.Array  # float32 balancing bias: for selection, not for gates
  noise_TE: jax.Array | None = None  # float32: noisy_topk's normal in training, random's uniform
  noise_scale_TE: jax.Array | None = None  # float32, above 0: noisy_topk's


class Routing(NamedTuple):
  """Which token goes to which expert, in order of priority: earlier assignments are kept first."""

  token_N: jax.Array  # int32, index into the group's T tokens
  expert_N: jax.Array  # int32
  gate_N: jax.Array  # float32, weight of the expert's output; carries the router's gradient
  real_N: jax.Array  # bool, False for padding: takes no slot, counts nowhere
  probs_TE: jax.Array  # float32, each token's distribution over experts, for losses and entropy
  load_TE: jax.Array  # float32, differentiable chance to be chosen; 0 where a router has none


def topk(inputs: RouterInputs, moe: config_lib.MoE, *, capacity: int, train: bool) -> Routing:
  """The k experts of the highest score (GShard 2006.16668, Mixtral 2401.04088, DeepSeek-V3).

  Renormalised softmax gates equal Mixtral's softmax over the k chosen logits. The loss-free bias
  (2408.15664) and the limit to `top_groups` (DeepSeek-V3 2412.19437 section 2.1.2) change who is
  chosen and no gate. Causal.
  """
  score_TE = _scores(inputs.logits_TE, moe)
  choice_TE = jax.lax.stop_gradient(score_TE) + inputs.bias_E[None]
  expert_TK = jax.lax.top_k(_limit_groups(choice_TE, moe), moe.top_k)[1]
  return _token_choice(inputs, score_TE, expert_TK, moe)


def switch(inputs: RouterInputs, moe: config_lib.MoE, *, capacity: int, train: bool) -> Routing:
  """The most probable expert; the gate is its probability (Switch 2101.03961 eq. 2). Causal."""
  assert moe.top_k == 1 and not moe.renormalize
  return topk(inputs, moe, capacity=capacity, train=train)


@jax.custom_jvp
def _normal_cdf(x):
  return 0.5 * (1 + jax.lax.erf(x / math.sqrt(2)))


@_normal_cdf.defjvp
def _normal_cdf_jvp(primals, tangents):
  # By hand: jax 0.12's own derivative of erf does not pass shard_map's check of what varies.
  (x,), (dx,) = primals, tangents
  return _normal_cdf(x), jnp.exp(-0.5 * x**2) / math.sqrt(2 * math.pi) * dx


def noisy_topk(inputs: RouterInputs, moe: config_lib.MoE, *, capacity: int, train: bool) -> Routing:
  """Top-k of logits with learned noise in training (Shazeer et al. 1701.06538 eq. 3-5). Causal.

  load_TE is the chance that an expert would be chosen if its own noise were drawn again (eq. 8-9).
  """
  if not train:
    return topk(inputs, moe, capacity=capacity, train=train)
  noisy_TE = inputs.logits_TE + inputs.noise_TE * inputs.noise_scale_TE
  best_TK, expert_TK = jax.lax.top_k(noisy_TE, moe.top_k + 1)
  # Without its own entry, an expert of the k competes with the (k+1)-th, any other with the k-th.
  last_T1, next_T1 = best_TK[:, -2:-1], best_TK[:, -1:]
  threshold_TE = jnp.where(noisy_TE >= last_T1, next_T1, last_T1)
  distance_TE = (inputs.logits_TE - threshold_TE) / inputs.noise_scale_TE
  routing = _token_choice(inputs, _scores(noisy_TE, moe), expert_TK[:, :-1], moe)
  return routing._replace(load_TE=_normal_cdf(distance_TE))


def expert_choice(
  inputs: RouterInputs, moe: config_lib.MoE, *, capacity: int, train: bool
) -> Routing:
  """Each expert takes its `capacity` best tokens of the group (Zhou et al. 2202.09368).

  Balanced by construction. Not causal: a later token can push an earlier one out of an expert, so
  the loss of a language model looks better than it is.
  """
  probs_TE = _scores(inputs.logits_TE, moe)
  candidate_ET = jnp.where(inputs.real_T[:, None], jax.lax.stop_gradient(probs_TE), -1).T
  token_EC = jax.lax.top_k(candidate_ET, capacity)[1]
  expert_EC = jnp.broadcast_to(jnp.arange(moe.num_experts)[:, None], token_EC.shape)
  token_N, expert_N = token_EC.reshape(-1), expert_EC.reshape(-1)
  return Routing(
    token_N=token_N.astype(jnp.int32),
    expert_N=expert_N.astype(jnp.int32),
    gate_N=moe.gate_scale * probs_TE[token_N, expert_N],
    real_N=inputs.real_T[token_N],
    probs_TE=probs_TE,
    load_TE=jnp.zeros_like(probs_TE),
  )


def sinkhorn(inputs: RouterInputs, moe: config_lib.MoE, *, capacity: int, train: bool) -> Routing:
  """Top-k of a balanced transport plan (S-BASE, Clark et al. 2202.01169; BASE 2103.16716).

  The plan sums to 1 over each token and to T/E over each expert. It looks at the whole group, so
  training is not causal; evaluation takes the plain top-k. Gates are the softmax of the logits.
  """
  probs_TE = _scores(inputs.logits_TE, moe)
  if not train:
    return topk(inputs, moe, capacity=capacity, train=train)
  real_T1 = inputs.real_T[:, None]
  share = jnp.maximum(jnp.sum(inputs.real_T), 1) / moe.num_experts
  log_share = jnp.log(share.astype(jnp.float32))

  def balance(_, plan_TE):
    column_1E = jax.nn.logsumexp(plan_TE, axis=0, where=real_T1, keepdims=True)
    plan_TE = plan_TE - jnp.where(jnp.isfinite(column_1E), column_1E, 0) + log_share
    return plan_TE - jax.nn.logsumexp(plan_TE, axis=1, keepdims=True)

  # 16 rounds bring learned routing's column sums within some per cent of each other.
  plan_TE = jax.lax.fori_loop(0, 16, balance, jax.lax.stop_gradient(inputs.logits_TE))
  return _token_choice(inputs, probs_TE, jax.lax.top_k(plan_TE, moe.top_k)[1], moe)


def hash_ids(inputs: RouterInputs, moe: config_lib.MoE, *, capacity: int, train: bool) -> Routing:
  """The expert is a fixed function of the token's id (Hash Layers, Roller et al. 2106.04426).

  The paper has no gate; here it is the learned probability of that expert, so that the router has a
  gradient. Causal; balanced as the ids are.
  """
  mixed_T = inputs.ids_T.astype(jnp.uint32) * jnp.uint32(0x9E3779B1)  # Knuth's multiplicative hash
  mixed_T = (mixed_T ^ (mixed_T >> 15)) * jnp.uint32(0x85EBCA77)
  expert_T = (mixed_T ^ (mixed_T >> 13)) % jnp.uint32(moe.num_experts)
  expert_TK = expert_T.astype(jnp.int32)[:, None]
  return _token_choice(inputs, _scores(inputs.logits_TE, moe), expert_TK, moe)


def random(inputs: RouterInputs, moe: config_lib.MoE, *, capacity: int, train: bool) -> Routing:
  """k experts drawn uniformly: the baseline that any learned router has to beat. Causal.

  Gates are the learned probabilities of the drawn experts. Evaluation repeats its draw.
  """
  expert_TK = jax.lax.top_k(inputs.noise_TE, moe.top_k)[1]
  return _token_choice(inputs, _scores(inputs.logits_TE, moe), expert_TK, moe)


ROUTERS = {
  config_lib.Router.TOPK: topk,
  config_lib.Router.SWITCH: switch,
  config_lib.Router.NOISY_TOPK: noisy_topk,
  config_lib.Router.EXPERT_CHOICE: expert_choice,
  config_lib.Router.SINKHORN: sinkhorn,
  config_lib.Router.HASH: hash_ids,
  config_lib.Router.RANDOM: random,
}


def choices(moe: config_lib.MoE) -> int:
  """Assignments of each token: K, or 0 where it varies from token to token."""
  return 0 if moe.router is config_lib.Router.EXPERT_CHOICE else moe.top_k


def _scores(logits_TE: jax.Array, moe: config_lib.MoE) -> jax.Array:
  score = {Score.SOFTMAX: jax.nn.softmax, Score.SIGMOID: jax.nn.sigmoid}[moe.score]
  return score(logits_TE.astype(moe.router_dtype.value)).astype(jnp.float32)


def _limit_groups(choice_TE: jax.Array, moe: config_lib.MoE) -> jax.Array:
  """-inf outside the `top_groups` groups whose two best experts have the highest sum."""
  if moe.top_groups == moe.expert_groups:
    return choice_TE
  T, E = choice_TE.shape
  by_group = choice_TE.reshape(T, moe.expert_groups, -1)
  group_score = jnp.sum(jax.lax.top_k(by_group, 2)[0], axis=-1)
  best = jax.lax.top_k(group_score, moe.top_groups)[1]
  allowed = jnp.any(best[..., None] == jnp.arange(moe.expert_groups)[None, None], axis=1)
  return jnp.where(allowed[..., None], by_group, -jnp.inf).reshape(T, E)


def _token_choice(
  inputs: RouterInputs, score_TE: jax.Array, expert_TK: jax.Array, moe: config_lib.MoE
) -> Routing:
  """The Routing of tokens that have chosen: gates from the scores, and the order of priority."""
  T, K = expert_TK.shape
  gate_TK = jnp.take_along_axis(score_TE, expert_TK, axis=1)
  rank_T = jnp.arange(T)
  if moe.priority is Priority.SCORE:  # Batch Prioritized Routing, V-MoE 2106.05974 section 3.3
    rank_T = jnp.argsort(-jnp.max(gate_TK, axis=1), stable=True)
  if moe.renormalize:
    gate_TK = gate_TK / (jnp.sum(gate_TK, axis=1, keepdims=True) + 1e-20)

  def flat(x_TK):
    if moe.priority is Priority.TOKEN:
      return x_TK.reshape(-1)
    return x_TK[rank_T].T.reshape(-1)

  return Routing(
    token_N=flat(jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[:, None], (T, K))),
    expert_N=flat(expert_TK.astype(jnp.int32)),
    gate_N=flat(moe.gate_scale * gate_TK),
    real_N=flat(jnp.broadcast_to(inputs.real_T[:, None], (T, K))),
    probs_TE=score_TE / jnp.sum(score_TE, axis=1, keepdims=True),
    load_TE=jnp.zeros_like(score_TE),
  )
