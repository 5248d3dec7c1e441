"""Routers: pure functions from one group's logits to a flat list of assignments.

A router knows nothing of capacity, devices or state. Noise and biases come in as arguments. To add
one, write the function, give it a name in `config.Router` and an entry in ROUTERS.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax import config as config_lib


class Routing(NamedTuple):
  """Which token goes to which expert, in order of priority: earlier assignments are kept first."""

  token_N: jax.Array  # int32, index into the group's T tokens
  expert_N: jax.Array  # int32
  gate_N: jax.Array  # float32, weight of the expert's output; carries the router's gradient
  real_N: jax.Array  # bool, False for padding: takes no slot, counts nowhere
  probs_TE: jax.Array  # float32, each token's distribution over experts, for losses and entropy


def topk(logits_TE: jax.Array, real_T: jax.Array, moe: config_lib.MoE) -> Routing:
  """Softmax, then the k most probable experts (GShard 2006.16668, Mixtral 2401.04088).

  Renormalised gates equal Mixtral's softmax over the k chosen logits. Priority is the token's
  position, then the rank of the choice, so no token's assignment depends on a later token.
  """
  T, K = logits_TE.shape[0], moe.top_k
  probs_TE = jax.nn.softmax(logits_TE.astype(jnp.float32))
  gate_TK, expert_TK = jax.lax.top_k(probs_TE, K)
  if moe.renormalize:
    gate_TK = gate_TK / jnp.sum(gate_TK, axis=-1, keepdims=True)
  return Routing(
    token_N=jnp.repeat(jnp.arange(T, dtype=jnp.int32), K),
    expert_N=expert_TK.reshape(-1).astype(jnp.int32),
    gate_N=gate_TK.reshape(-1),
    real_N=jnp.repeat(real_T, K),
    probs_TE=probs_TE,
  )


def switch(logits_TE: jax.Array, real_T: jax.Array, moe: config_lib.MoE) -> Routing:
  """The most probable expert; the gate is its probability (Switch Transformer 2101.03961 eq. 2)."""
  assert moe.top_k == 1 and not moe.renormalize
  return topk(logits_TE, real_T, moe)


ROUTERS = {config_lib.Router.TOPK: topk, config_lib.Router.SWITCH: switch}
