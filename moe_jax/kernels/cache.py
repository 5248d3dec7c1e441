"""The keys and values of the tokens so far, and attention of one query over them.

On one CPU device batch and key/value heads are one dimension of a cache, because XLA:CPU would copy
a cache that it reshapes; elsewhere they are two dimensions, both split over the mesh.

S: slots of a row. Token t of a row is in slot t % S, so a layer that attends within a window needs
no more slots than the window has tokens: a new token takes the place of the one that left it.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax import sharding
from moe_jax.kernels import platform
from moe_jax.kernels.mask import Mask


class Stored(NamedTuple):
  """What a cache keeps of new tokens."""

  keys_BLGA: jax.Array
  values_BLGA: jax.Array | None  # None where the keys are the values


class KeysValues(NamedTuple):
  """The cache of one layer: [B, G, S, A], or [B * G, S, A] on one CPU device; compute dtype."""

  keys: jax.Array
  values: jax.Array | None  # None where the keys are the values


def empty(B: int, G: int, S: int, A: int, dtype: jnp.dtype, *, values: bool = True) -> KeysValues:
  """Returns a cache of zeros with S slots for each of B rows, with or without its own values."""
  rows = (B * G,) if platform.one_cpu() else (B, G)
  keys = _sharded(jnp.zeros((*rows, S, A), dtype))
  return KeysValues(keys, _sharded(jnp.zeros((*rows, S, A), dtype)) if values else None)


def insert(cache: KeysValues, tokens: Stored, first: jax.Array) -> KeysValues:
  """Returns the cache with L more tokens, of which `first` is the number of the first.

  For L > 1 the cache must be empty, or have room for all tokens (first + L <= S).
  """

  def put(stored: jax.Array, new_BLGA: jax.Array) -> jax.Array:
    L, S = new_BLGA.shape[1], stored.shape[-2]
    new_BGLA = new_BLGA.swapaxes(1, 2)
    new = new_BGLA.reshape(*stored.shape[:-2], *new_BGLA.shape[2:])
    if L > S:
      return _sharded(jnp.roll(new[..., L - S :, :], (first + L) % S, axis=-2))
    start: tuple[jax.Array | int, ...] = (*(0,) * (stored.ndim - 2), first % S, 0)
    return _sharded(jax.lax.dynamic_update_slice(stored, new, start))

  values = None
  if cache.values is not None and tokens.values_BLGA is not None:
    values = put(cache.values, tokens.values_BLGA)
  return KeysValues(put(cache.keys, tokens.keys_BLGA), values)


def attend_to_cache(
  q_BLHA: jax.Array, cache: KeysValues, start_B: jax.Array, last: jax.Array, mask: Mask
) -> jax.Array:
  """Returns y_BLHA of one query (L = 1) over the tokens start_B to `last`, which is its own.

  Softmax is float32. A row whose start is later than `last` is padding, and its result has no
  meaning.
  """
  B, L, H, A = q_BLHA.shape
  *rows, S, _ = cache.keys.shape
  heads = B * H // math.prod(rows)  # query heads for each key/value head
  q = q_BLHA.reshape(*rows, heads, A) * A**-0.5
  scores = jnp.einsum("...RA,...SA->...RS", q, cache.keys, preferred_element_type=jnp.float32)
  scores = mask.capped(scores)
  token_S = last - (last - jnp.arange(S)) % S  # the newest of each slot; negative if it is empty
  visible_BS = (token_S[None] >= start_B[:, None]) & mask.sees(last - token_S)[None]
  visible_BGS = jnp.broadcast_to(visible_BS[:, None], (B, H // heads, S))
  # Not -inf, because the softmax of a row of padding, which sees no key, must stay finite.
  least = jnp.finfo(jnp.float32).min
  scores = jnp.where(visible_BGS.reshape(*rows, 1, S), scores, least)
  if mask.sinks_H is not None:
    sinks_BGR = jnp.broadcast_to(mask.sinks(1, H // heads, heads), (B, H // heads, heads))
    scores = jnp.concatenate([scores, sinks_BGR.reshape(*rows, heads, 1)], axis=-1)
  weights = jax.nn.softmax(scores)[..., :S]
  values = cache.keys if cache.values is None else cache.values
  y = jnp.einsum(
    "...RS,...SA->...RA", weights.astype(values.dtype), values, preferred_element_type=jnp.float32
  )
  return y.astype(values.dtype).reshape(B, L, H, A)


def _sharded(stored: jax.Array) -> jax.Array:
  if stored.ndim == 3:
    return stored
  # A single head cannot be split over `tensor`.
  return sharding.constrain(stored, "BGSA" if stored.shape[1] > 1 else "BLSA")
