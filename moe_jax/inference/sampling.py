"""How the next token is drawn from its logits: temperature, top-k, top-p, greedy."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import UserError


class Sampling(NamedTuple):
  """Scalars on the device, so that another value does not compile anew."""

  temperature: Any  # float32
  top_k: Any  # int32, the vocabulary's size to keep all
  top_p: Any  # float32


class Kind(NamedTuple):
  """What a program is compiled for."""

  greedy: bool
  filtered: bool  # top-k or top-p, which need a sort


def options(temperature: float, top_k: int, top_p: float, vocab_size: int) -> tuple[Sampling, Kind]:
  """See generate.Model.stream for the values; raises UserError for others."""
  check_least("temperature", temperature, 0)
  check_least("top_k", top_k, 0)
  if not 0 < top_p <= 1:
    raise UserError(f"top_p={top_p}: a probability above 0 and at most 1")
  scalars = (np.float32(temperature or 1), np.int32(top_k or vocab_size), np.float32(top_p))
  return Sampling(*scalars), Kind(temperature == 0, bool(top_k) or top_p < 1)


def check_least(name: str, value: float, least: int) -> None:
  if not value >= least or math.isinf(value):
    raise UserError(f"{name}={value}: it must be a number of at least {least}")


def sample(
  logits_BV: jax.Array, seed: Any, drawn: Any, sampling: Sampling, kind: Kind, known: int
) -> jax.Array:
  """int32 [B], below `known`; row b's draw number `drawn` depends on seed, b and `drawn` alone.

  Top-k first, then top-p (1904.09751) of what it leaves; ties with the last one kept stay.
  """
  B, V = logits_BV.shape
  logits_BV = jnp.where(jnp.arange(V)[None] < known, logits_BV, -jnp.inf)
  if kind.greedy:
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
  logits_BV = logits_BV / sampling.temperature
  if kind.filtered:
    best_BV = -jnp.sort(-logits_BV, axis=-1)
    best_BV = jnp.where(jnp.arange(V)[None] < sampling.top_k, best_BV, -jnp.inf)
    probs_BV = jax.nn.softmax(best_BV, axis=-1)
    before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
    kept_BV = (before_BV < sampling.top_p) & (probs_BV > 0)
    last_B1 = jnp.maximum(jnp.sum(kept_BV, axis=-1, keepdims=True) - 1, 0)
    logits_BV = jnp.where(
      logits_BV >= jnp.take_along_axis(best_BV, last_B1, axis=-1), logits_BV, -jnp.inf
    )
  key = jax.random.fold_in(jax.random.key(seed), drawn)
  keys_B = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(B))
  return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)
