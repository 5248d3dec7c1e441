"""Draws the next token from its logits: temperature, top-k, top-p, greedy."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Sampling(NamedTuple):
  """Scalars that are arguments of the compiled program, so that new values need no compilation."""

  temperature: Any  # float32
  top_k: Any  # int32; the size of the vocabulary keeps all tokens
  top_p: Any  # float32


# Less would make logits inf. A power of two, so that dividing by it rounds nothing.
_LEAST_TEMPERATURE = 2.0**-100


class Kind(NamedTuple):
  """The options that a program is compiled for."""

  greedy: bool
  filtered: bool  # top-k or top-p, which need a sort


def options(temperature: float, top_k: int, top_p: float, vocab_size: int) -> tuple[Sampling, Kind]:
  """Converts the options of generate.TextGenerator.stream."""
  sampling = Sampling(
    temperature=np.float32(np.clip(temperature, _LEAST_TEMPERATURE, 1 / _LEAST_TEMPERATURE)),
    top_k=np.int32(min(top_k or vocab_size, vocab_size)),
    top_p=np.float32(top_p),
  )
  return sampling, Kind(greedy=temperature == 0, filtered=bool(top_k) or top_p < 1)


def sample(
  logits_BV: jax.Array, seed: Any, number: Any, sampling: Sampling, kind: Kind, num_ids: int
) -> jax.Array:
  """Draws a token id for each row: int32 [B], below `num_ids`.

  Top-k is applied first, then top-p (1904.09751) to the tokens that are left. Tokens tied with the
  last one kept are kept too.

  Args:
    logits_BV: float32 logits.
    seed: of all draws.
    number: of this draw in its row. Row b's random numbers depend on seed, number and b alone.
    sampling: temperature, top-k and top-p.
    kind: the options that the program is compiled for.
    num_ids: ids from here on, which the tokenizer does not have, are never drawn.
  """
  B, V = logits_BV.shape
  logits_BV = jnp.where(jnp.arange(V)[None] < num_ids, logits_BV, -jnp.inf)
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
  key = jax.random.fold_in(jax.random.key(seed), number)
  keys_B = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(B))
  return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)
