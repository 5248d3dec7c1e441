"""Grouped-query attention (2305.13245) with rotary positions (2104.09864) over packed documents."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import config as config_lib
from moe_jax import sharding


class RMSNorm(nnx.Module):
  """Root mean square norm (1910.07467), in float32, over the last dimension."""

  def __init__(self, letter: str, size: int, eps: float):
    self.name = f"norm_{letter}"  # the parameter's name says what it scales
    self.eps = eps
    setattr(self, self.name, nnx.Param(jnp.ones((size,))))

  def __call__(self, x: jax.Array) -> jax.Array:
    return rms_norm(x, getattr(self, self.name)[...], self.eps)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
  square = jnp.square(x.astype(jnp.float32))
  inverse = jax.lax.rsqrt(jnp.mean(square, axis=-1, keepdims=True) + eps)
  scale = scale.reshape((1,) * (x.ndim - 1) + (-1,))
  return (x.astype(jnp.float32) * inverse * scale).astype(x.dtype)


def rope(x_BLHA: jax.Array, positions_BL: jax.Array, base: float) -> jax.Array:
  """Rotates the pairs (i, i + A/2) of each head by position * base^(-2i/A), in float32."""
  half = x_BLHA.shape[-1] // 2
  frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle = positions_BL[:, :, None, None].astype(jnp.float32) * frequency.reshape(1, 1, 1, -1)
  sin, cos = jnp.sin(angle), jnp.cos(angle)
  first, second = jnp.split(x_BLHA.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return rotated.astype(x_BLHA.dtype)


def causal_attention(
  q_BLHA: jax.Array, k_BLGA: jax.Array, v_BLGA: jax.Array, segments_BL: jax.Array
) -> jax.Array:
  """y_BLHA: query l sees keys of the same document, not later than itself; softmax in float32.

  Queries go in up to 8 blocks, each with the keys up to its own end: near half the work and memory
  of a full mask.
  """
  B, L, H, A = q_BLHA.shape
  G = k_BLGA.shape[2]
  q_BGRLA = q_BLHA.reshape(B, L, G, H // G, A).transpose(0, 2, 3, 1, 4) * A**-0.5
  k_BGSA, v_BGSA = k_BLGA.swapaxes(1, 2), v_BLGA.swapaxes(1, 2)
  blocks = max(n for n in range(1, 9) if L % n == 0 and (n == 1 or L // n >= 32))
  out = []
  for end in range(L // blocks, L + 1, L // blocks):
    rows, seen = slice(end - L // blocks, end), slice(0, end)
    scores = jnp.einsum(
      "BGRLA,BGSA->BGRLS", q_BGRLA[:, :, :, rows], k_BGSA[:, :, seen],
      preferred_element_type=jnp.float32,
    )  # fmt: skip
    scores = jnp.where(_visible(segments_BL, rows, seen), scores, -jnp.inf)
    highest = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - highest).astype(v_BGSA.dtype)
    # Normalised after the product with V, the sum as a product with ones: XLA:CPU is slow at
    # reductions over the last dimension, and this leaves none in the backward pass.
    ones_S = jnp.ones((end,), weights.dtype)
    total, y_BGRLA = (
      jnp.einsum(f"BGRLS,{v}", weights, values, preferred_element_type=jnp.float32)
      for v, values in (("S->BGRL", ones_S), ("BGSA->BGRLA", v_BGSA[:, :, seen]))
    )
    out.append((y_BGRLA / total[..., None]).astype(v_BGSA.dtype))
  return jnp.concatenate(out, axis=3).transpose(0, 3, 1, 2, 4).reshape(B, L, H, A)


def _visible(segments_BL, rows, seen):
  """bool [B, 1, 1, L, S]"""
  same_BLS = segments_BL[:, rows, None] == segments_BL[:, None, seen]
  index = jnp.arange(segments_BL.shape[1])
  return (same_BLS & (index[rows, None] >= index[None, seen])[None])[:, None, None]


def cached_attention(
  q_BLHA: jax.Array, k_BGSA: jax.Array, v_BGSA: jax.Array, start_B: jax.Array, last: jax.Array
) -> jax.Array:
  """y_BLHA of one query (L = 1), which sees the slots from start_B to `last`, its own; float32.

  In k_BGSA and v_BGSA, B and G may be one dimension.
  """
  B, L, H, A = q_BLHA.shape
  *rows, S, _ = k_BGSA.shape
  heads = B * H // math.prod(rows)
  q = q_BLHA.reshape(*rows, heads, A) * A**-0.5
  scores = jnp.einsum("...RA,...SA->...RS", q, k_BGSA, preferred_element_type=jnp.float32)
  slot_S = jnp.arange(S)
  visible_BS = (slot_S[None] >= start_B[:, None]) & (slot_S <= last)[None]
  visible_BGS = jnp.broadcast_to(visible_BS[:, None], (B, H // heads, S))
  # Not -inf: a row of padding sees nothing, and must stay finite.
  least = jnp.finfo(jnp.float32).min
  weights = jax.nn.softmax(jnp.where(visible_BGS.reshape(*rows, 1, S), scores, least))
  y = jnp.einsum(
    "...RS,...SA->...RA", weights.astype(v_BGSA.dtype), v_BGSA, preferred_element_type=jnp.float32
  )
  return y.astype(v_BGSA.dtype).reshape(B, L, H, A)


class Attention(nnx.Module):
  def __init__(self, model: config_lib.Model, rngs: nnx.Rngs):
    D, H, G, A = model.dim, model.num_heads, model.num_kv_heads, model.head_dim
    self.base = model.rope_base
    self.dtype = jnp.dtype(model.compute_dtype.value)
    residual = (2 * model.num_layers) ** -0.5
    init = jax.random.normal
    self.q_DHA = nnx.Param(D**-0.5 * init(rngs.params(), (D, H, A)))
    self.k_DGA = nnx.Param(D**-0.5 * init(rngs.params(), (D, G, A)))
    self.v_DGA = nnx.Param(D**-0.5 * init(rngs.params(), (D, G, A)))
    self.out_HAD = nnx.Param(residual * (H * A) ** -0.5 * init(rngs.params(), (H, A, D)))
    self.q_norm = RMSNorm("A", A, model.norm_eps) if model.qk_norm else None
    self.k_norm = RMSNorm("A", A, model.norm_eps) if model.qk_norm else None

  def __call__(
    self, x_BLD: jax.Array, positions_BL: jax.Array, segments_BL: jax.Array
  ) -> jax.Array:
    B, L, D = x_BLD.shape

    def project(w_DHA):
      w = w_DHA[...].astype(self.dtype).reshape(D, -1)
      return (x_BLD.reshape(-1, D) @ w).reshape(B, L, *w_DHA.shape[1:])

    q_BLHA, k_BLGA, v_BLGA = project(self.q_DHA), project(self.k_DGA), project(self.v_DGA)
    if self.q_norm is not None:
      q_BLHA, k_BLGA = self.q_norm(q_BLHA), self.k_norm(k_BLGA)
    q_BLHA = sharding.constrain(rope(q_BLHA, positions_BL, self.base), "BLHA")
    k_BLGA = sharding.constrain(rope(k_BLGA, positions_BL, self.base), "BLGA")
    y_BLHA = causal_attention(q_BLHA, k_BLGA, v_BLGA, segments_BL)
    out = self.out_HAD[...].astype(self.dtype).reshape(-1, D)
    return (y_BLHA.reshape(B * L, -1) @ out).reshape(B, L, D)
