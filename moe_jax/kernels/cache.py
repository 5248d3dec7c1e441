"""The keys and values of the tokens so far, and attention of one query over them.

On one CPU device batch and key/value heads are one dimension of a cache, because XLA:CPU would copy
a cache that it reshapes; elsewhere they are two dimensions, both split over the mesh.

S: slots of a row; those from the row's start to the newest token are filled.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax import sharding
from moe_jax.kernels import platform


class KeysValues(NamedTuple):
  """The cache of one layer: [B, G, S, A], or [B * G, S, A] on one CPU device; compute dtype."""

  keys: jax.Array
  values: jax.Array


def empty(B: int, G: int, S: int, A: int, dtype: jnp.dtype) -> KeysValues:
  """Returns a cache of zeros with S slots for each of B rows."""
  rows = (B * G,) if platform.one_cpu() else (B, G)
  keys = _sharded(jnp.zeros((*rows, S, A), dtype))
  values = _sharded(jnp.zeros((*rows, S, A), dtype))
  return KeysValues(keys, values)


def insert(cache: KeysValues, k_BLGA: jax.Array, v_BLGA: jax.Array, slot: jax.Array) -> KeysValues:
  """Returns the cache with L more tokens, written from `slot` on; slot + L must be at most S."""

  def put(stored: jax.Array, new_BLGA: jax.Array) -> jax.Array:
    new_BGLA = new_BLGA.swapaxes(1, 2)
    new = new_BGLA.reshape(*stored.shape[:-2], *new_BGLA.shape[2:])
    start: tuple[jax.Array | int, ...] = (*(0,) * (stored.ndim - 2), slot, 0)
    return _sharded(jax.lax.dynamic_update_slice(stored, new, start))

  return KeysValues(put(cache.keys, k_BLGA), put(cache.values, v_BLGA))


def attend_to_cache(
  q_BLHA: jax.Array, cache: KeysValues, start_B: jax.Array, last: jax.Array
) -> jax.Array:
  """Returns y_BLHA of one query (L = 1) over the slots start_B to `last`, which is its own slot.

  Softmax is float32. A row whose start is later than `last` is padding, and its result has no
  meaning.
  """
  B, L, H, A = q_BLHA.shape
  *rows, S, _ = cache.keys.shape
  heads = B * H // math.prod(rows)  # query heads for each key/value head
  q = q_BLHA.reshape(*rows, heads, A) * A**-0.5
  scores = jnp.einsum("...RA,...SA->...RS", q, cache.keys, preferred_element_type=jnp.float32)
  slot_S = jnp.arange(S)
  visible_BS = (slot_S[None] >= start_B[:, None]) & (slot_S <= last)[None]
  visible_BGS = jnp.broadcast_to(visible_BS[:, None], (B, H // heads, S))
  # Not -inf, because the softmax of a row of padding, which sees no key, must stay finite.
  least = jnp.finfo(jnp.float32).min
  weights = jax.nn.softmax(jnp.where(visible_BGS.reshape(*rows, 1, S), scores, least))
  y = jnp.einsum(
    "...RS,...SA->...RA",
    weights.astype(cache.values.dtype),
    cache.values,
    preferred_element_type=jnp.float32,
  )
  return y.astype(cache.values.dtype).reshape(B, L, H, A)


def _sharded(stored: jax.Array) -> jax.Array:
  return sharding.constrain(stored, "BGSA") if stored.ndim == 4 else stored
