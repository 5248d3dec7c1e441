"""Routers: pure functions from the logits of one routing group to a flat list of assignments.

A router knows nothing of devices or state: noise, balancing bias and token ids are arguments. Each
router is declared by one record of `ROUTERS`; validation, the layer, the optimizer, the sharding,
the metrics and docs/routing.md read that record.

Letters: T tokens of one routing group; N assignments.
"""

import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from moe_jax import sharding
from moe_jax.config import GroupScore, MoE, Priority, Router, Score
from moe_jax.moe.routing import (
  ROUTER_BIAS_E,
  ROUTER_DE,
  LayerInputs,
  Project,
  RouterInputs,
  RouterSpec,
  Routing,
  Rule,
  router_matrix,
)


def route(inputs: LayerInputs, moe: MoE, groups: int, *, capacity: int, train: bool) -> Routing:
  """Routes all tokens of this device, each of its `groups` routing groups by itself.

  `capacity` is that of an expert in one group; only expert choice reads it. The result holds the
  assignments group after group; token_N counts the tokens of the whole device.
  """
  spec = ROUTERS[moe.router]
  function = spec.function if train or spec.evaluation is None else spec.evaluation
  if spec.takes_capacity:
    function = functools.partial(function, capacity=capacity)

  def split(array: jax.Array) -> jax.Array:
    return array.reshape(groups, -1, *array.shape[2:])  # [B, L, ...] -> [M, T, ...]

  def route_group(
    first_token: jax.Array,
    logits_TE: jax.Array,
    real_T: jax.Array,
    ids_T: jax.Array,
    noise_TE: jax.Array | None,
    extra: dict[str, jax.Array],
  ) -> Routing:
    group = RouterInputs(logits_TE, real_T, ids_T, inputs.bias_E, noise_TE, extra)
    routing = function(group, moe)
    return routing._replace(token_N=routing.token_N + first_token)

  per_token = (inputs.logits_BLE, inputs.real_BL, inputs.ids_BL, inputs.noise_BLE, inputs.extra)
  first_token = inputs.real_BL.size // groups * jnp.arange(groups, dtype=jnp.int32)
  by_group = jax.vmap(route_group)(first_token, *jax.tree.map(split, per_token))
  return jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:]), by_group)


def topk(inputs: RouterInputs, moe: MoE) -> Routing:
  """Chooses the k experts of the highest score (GShard 2006.16668, Mixtral 2401.04088).

  Renormalised softmax gates equal Mixtral's softmax over the k chosen logits. The loss-free bias
  (2408.15664) and the limit to `top_groups` (DeepSeek-V3 2412.19437 section 2.1.2) change which
  experts are selected and never a gate. Causal.
  """
  log_score_TE = _log_scores(inputs.logits_TE, moe)
  log_TE = jax.lax.stop_gradient(log_score_TE)
  # The last term orders experts whose scores are too small for float32, and rounds away otherwise.
  choice_TE = jnp.exp(log_TE) + inputs.bias_E[None] + 1e-30 * log_TE
  expert_TK = jax.lax.top_k(_limit_groups(choice_TE, moe), moe.top_k)[1]
  return token_choice(inputs, log_score_TE, expert_TK, moe)


def switch(inputs: RouterInputs, moe: MoE) -> Routing:
  """Chooses the most probable expert; its probability is the gate (Switch 2101.03961 eq. 2)."""
  assert moe.top_k == 1
  return topk(inputs, moe)


@jax.custom_jvp
def _normal_cdf(x: jax.Array) -> jax.Array:
  return 0.5 * (1 + jax.lax.erf(x / math.sqrt(2)))


@_normal_cdf.defjvp
def _normal_cdf_jvp(
  primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
  # By hand, because shard_map's replication check rejects the derivative of erf in jax 0.12.
  (x,), (dx,) = primals, tangents
  return _normal_cdf(x), jnp.exp(-0.5 * x**2) / math.sqrt(2 * math.pi) * dx


def noisy_topk(inputs: RouterInputs, moe: MoE) -> Routing:
  """Chooses the top k of noisy logits in training (Shazeer et al. 1701.06538 eq. 3-5). Causal.

  The scale of the noise is learned. load_TE is the chance that an expert would be chosen if its own
  noise were drawn again (eq. 8-9).
  """
  assert inputs.noise_TE is not None
  scale_TE = inputs.extra["noise_scale"]
  noisy_TE = inputs.logits_TE + inputs.noise_TE * scale_TE
  best_TK, expert_TK = jax.lax.top_k(noisy_TE, moe.top_k + 1)
  # A chosen expert stays chosen while its logit exceeds the (k+1)-th; any other expert would be
  # chosen if its logit exceeded the k-th.
  last_T1, next_T1 = best_TK[:, -2:-1], best_TK[:, -1:]
  threshold_TE = jnp.where(noisy_TE >= last_T1, next_T1, last_T1)
  distance_TE = (inputs.logits_TE - threshold_TE) / scale_TE
  routing = token_choice(inputs, _log_scores(noisy_TE, moe), expert_TK[:, :-1], moe)
  return routing._replace(load_TE=_normal_cdf(distance_TE))


def expert_choice(inputs: RouterInputs, moe: MoE, *, capacity: int) -> Routing:
  """Gives each expert its `capacity` best tokens of the group (Zhou et al. 2202.09368).

  The load is balanced by construction. The router is not causal: a later token can push an earlier
  one out of an expert, so the loss of a language model looks better than it is.
  """
  log_score_TE = _log_scores(inputs.logits_TE, moe)
  probs_TE = jnp.exp(log_score_TE)
  candidate_TE = jnp.where(inputs.real_T[:, None], jax.lax.stop_gradient(log_score_TE), -jnp.inf)
  token_EC = jax.lax.top_k(candidate_TE.T, capacity)[1]
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


def sinkhorn(inputs: RouterInputs, moe: MoE) -> Routing:
  """Chooses the top k of a balanced transport plan (S-BASE, Clark et al. 2202.01169; 2103.16716).

  The plan, token by expert, sums to 1 for each token and to T/E for each expert. It depends on all
  tokens of the group, so training is not causal; evaluation uses `topk`. Gates are the softmax of
  the logits.
  """
  real_T1 = inputs.real_T[:, None]
  share = jnp.maximum(jnp.sum(inputs.real_T), 1) / moe.num_experts
  log_share = jnp.log(share.astype(jnp.float32))

  def balance(_: int, plan_TE: jax.Array) -> jax.Array:
    column_1E = jax.nn.logsumexp(plan_TE, axis=0, where=real_T1, keepdims=True)
    plan_TE = plan_TE - jnp.where(jnp.isfinite(column_1E), column_1E, 0) + log_share
    return plan_TE - jax.nn.logsumexp(plan_TE, axis=1, keepdims=True)

  # After 16 rounds the experts' sums of a trained router's plan differ by some per cent.
  plan_TE = jax.lax.fori_loop(0, 16, balance, jax.lax.stop_gradient(inputs.logits_TE))
  expert_TK = jax.lax.top_k(plan_TE, moe.top_k)[1]
  return token_choice(inputs, _log_scores(inputs.logits_TE, moe), expert_TK, moe)


def hash_ids(inputs: RouterInputs, moe: MoE) -> Routing:
  """Hashes each token's id to one expert (Hash Layers, Roller et al. 2106.04426).

  The paper has no gate; here the gate is the learned probability of that expert, so that the router
  has a gradient. Causal. The load is as balanced as the frequencies of the ids.
  """
  mixed_T = inputs.ids_T.astype(jnp.uint32) * jnp.uint32(0x9E3779B1)  # Knuth's multiplicative hash
  mixed_T = (mixed_T ^ (mixed_T >> 15)) * jnp.uint32(0x85EBCA77)
  expert_T = (mixed_T ^ (mixed_T >> 13)) % jnp.uint32(moe.num_experts)
  expert_TK = expert_T.astype(jnp.int32)[:, None]
  return token_choice(inputs, _log_scores(inputs.logits_TE, moe), expert_TK, moe)


def uniform_random(inputs: RouterInputs, moe: MoE) -> Routing:
  """Draws k experts uniformly: the baseline that any learned router has to beat. Causal.

  Gates are the learned probabilities of the drawn experts. Every evaluation draws the same experts.
  """
  assert inputs.noise_TE is not None
  expert_TK = jax.lax.top_k(inputs.noise_TE, moe.top_k)[1]
  return token_choice(inputs, _log_scores(inputs.logits_TE, moe), expert_TK, moe)


def _log_scores(logits_TE: jax.Array, moe: MoE) -> jax.Array:
  """Returns the logarithms of the scores, float32; they are finite where a score rounds to 0."""
  log_score = {Score.SOFTMAX: jax.nn.log_softmax, Score.SIGMOID: jax.nn.log_sigmoid}[moe.score]
  return log_score(logits_TE.astype(moe.router_dtype.value)).astype(jnp.float32)


def _limit_groups(choice_TE: jax.Array, moe: MoE) -> jax.Array:
  """Sets scores to -inf outside the `top_groups` groups of the highest group_score."""
  if moe.top_groups == moe.expert_groups:
    return choice_TE
  T, E = choice_TE.shape
  by_group = choice_TE.reshape(T, moe.expert_groups, -1)
  counted = 2 if moe.group_score is GroupScore.TWO_BEST else 1
  group_score = jnp.sum(jax.lax.top_k(by_group, counted)[0], axis=-1)
  best = jax.lax.top_k(group_score, moe.top_groups)[1]
  allowed = jnp.any(best[..., None] == jnp.arange(moe.expert_groups)[None, None], axis=1)
  return jnp.where(allowed[..., None], by_group, -jnp.inf).reshape(T, E)


def token_choice(
  inputs: RouterInputs, log_score_TE: jax.Array, expert_TK: jax.Array, moe: MoE
) -> Routing:
  """Builds the Routing of tokens that chose expert_TK: gates from scores, order from priority.

  Scores come as logarithms, because two of them can be too small for float32 and their ratio, of
  which a normalised gate is made, is not.
  """
  T, K = expert_TK.shape
  log_gate_TK = jnp.take_along_axis(log_score_TE, expert_TK, axis=1)
  rank_T = jnp.arange(T)
  if moe.priority is Priority.SCORE:  # Batch Prioritized Routing, V-MoE 2106.05974 section 3.3
    rank_T = jnp.argsort(-jnp.max(log_gate_TK, axis=1), stable=True)
  gate_TK = jax.nn.softmax(log_gate_TK) if moe.renormalizes else jnp.exp(log_gate_TK)

  def flat(x_TK: jax.Array) -> jax.Array:
    if moe.priority is Priority.TOKEN:
      return x_TK.reshape(-1)
    return x_TK[rank_T].T.reshape(-1)

  return Routing(
    token_N=flat(jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[:, None], (T, K))),
    expert_N=flat(expert_TK.astype(jnp.int32)),
    gate_N=flat(moe.gate_scale * gate_TK),
    real_N=flat(jnp.broadcast_to(inputs.real_T[:, None], (T, K))),
    probs_TE=jax.nn.softmax(log_score_TE),
    load_TE=jnp.zeros_like(log_score_TE),
  )


def router_parameters(moe: MoE) -> tuple[sharding.Parameter, ...]:
  """Returns the parameters of the router of a layer, ROUTER_DE first."""
  bias = (ROUTER_BIAS_E,) if moe.router_bias else ()
  return (ROUTER_DE, *bias, *ROUTERS[moe.router].parameters)


def _noise_scale(
  x_BLD: jax.Array, parameters: Mapping[str, jax.Array], project: Project
) -> dict[str, jax.Array]:
  return {"noise_scale": jax.nn.softplus(project(x_BLD, parameters["noise_DE"])) + 1e-2}


# Reasons and remedies of the rules below.
_SWITCH = "Switch routing is top_k=1"
_ONE_ID = "a token id hashes to one expert; set top_k=1"
_ALL_CHOSEN = "every expert is chosen, so the noise cannot change the choice; lower top_k"
_NO_OTHER_GATES = "experts choose, so a token does not know its other gates; set renormalize=false"
_NO_LIMIT = "an expert takes capacity_factor*T*K/E tokens; set a finite number, such as 1"
_NO_DROPS = "an expert drops none of the tokens that it chose; leave priority=token"

ROUTERS = {
  Router.SWITCH: RouterSpec(
    function=switch,
    takes_bias=True,
    rules=(Rule("top_k", lambda moe: moe.top_k == 1, _SWITCH),),
    papers=("2101.03961",),
    doc="The most probable expert; its probability is the gate.",
  ),
  Router.TOPK: RouterSpec(
    function=topk,
    scores=tuple(Score),
    takes_bias=True,
    takes_groups=True,
    papers=("2006.16668", "2401.04088", "2412.19437"),
    doc="The K experts of the highest score: GShard, Mixtral; with `score=sigmoid`, a bias and "
    "groups DeepSeek-V3.",
  ),
  Router.NOISY_TOPK: RouterSpec(
    function=noisy_topk,
    evaluation=topk,
    noise=jax.random.normal,
    parameters=(router_matrix("noise_DE", 0.0),),  # initial zeros, as in the paper's appendix A
    extra=_noise_scale,
    has_load=True,
    rules=(Rule("top_k", lambda moe: moe.top_k < moe.num_experts, _ALL_CHOSEN),),
    papers=("1701.06538",),
    doc="Top-k of logits with learned noise; without noise in evaluation. Made for the importance "
    "and load losses.",
  ),
  Router.EXPERT_CHOICE: RouterSpec(
    function=expert_choice,
    takes_capacity=True,
    fixed_choices=False,
    looks_ahead="an expert compares all tokens of a group",
    load_is_learned=False,
    rules=(
      Rule("renormalize", lambda moe: not moe.renormalizes, _NO_OTHER_GATES),
      Rule("capacity_factor", lambda moe: moe.capacity_factor < math.inf, _NO_LIMIT),
      Rule("eval_capacity_factor", lambda moe: moe.eval_capacity_factor < math.inf, _NO_LIMIT),
      Rule("priority", lambda moe: moe.priority is Priority.TOKEN, _NO_DROPS),
    ),
    papers=("2202.09368",),
    doc="Each expert takes its C best tokens: balanced by construction. Some tokens get no expert.",
  ),
  Router.SINKHORN: RouterSpec(
    function=sinkhorn,
    evaluation=topk,
    looks_ahead="it balances over all tokens of a group in training",
    papers=("2202.01169", "2103.16716"),
    doc="Top-k of a transport plan that balances the load; the plain top-k in evaluation.",
  ),
  Router.HASH: RouterSpec(
    function=hash_ids,
    load_is_learned=False,
    rules=(Rule("top_k", lambda moe: moe.top_k == 1, _ONE_ID),),
    papers=("2106.04426",),
    doc="A fixed function of the token's id; as balanced as the ids are.",
  ),
  Router.RANDOM: RouterSpec(
    function=uniform_random,
    noise=jax.random.uniform,
    noise_in_evaluation=True,
    load_is_learned=False,
    papers=(),
    doc="K experts drawn uniformly: the baseline that a learned router has to beat.",
  ),
}


def choices_per_token(moe: MoE) -> int:
  """Returns the number of assignments of each token: K, or 0 if it varies from token to token."""
  return moe.top_k if ROUTERS[moe.router].fixed_choices else 0
