"""Grouped-query attention (2305.13245) with rotary positions (2104.09864) over packed documents."""

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
    scale = getattr(self, self.name)[...]
    square = jnp.square(x.astype(jnp.float32))
    inverse = jax.lax.rsqrt(jnp.mean(square, axis=-1, keepdims=True) + self.eps)
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


def causal_mask(segments_BL: jax.Array) -> jax.Array:
  """bool [B, 1, L, S]: query l sees key s of the same document, not later than itself."""
  L = segments_BL.shape[1]
  same_BLS = segments_BL[:, :, None] == segments_BL[:, None, :]
  return (same_BLS & jnp.tril(jnp.ones((1, L, L), bool)))[:, None]


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

  def __call__(self, x_BLD: jax.Array, positions_BL: jax.Array, mask_B1LS: jax.Array) -> jax.Array:
    def project(w):
      return jnp.einsum("BLD,DHA->BLHA", x_BLD, w[...].astype(self.dtype))

    q_BLHA, k_BLGA, v_BLGA = project(self.q_DHA), project(self.k_DGA), project(self.v_DGA)
    if self.q_norm is not None:
      q_BLHA, k_BLGA = self.q_norm(q_BLHA), self.k_norm(k_BLGA)
    q_BLHA = sharding.constrain(rope(q_BLHA, positions_BL, self.base), "BLHA")
    k_BLGA = sharding.constrain(rope(k_BLGA, positions_BL, self.base), "BLGA")
    y_BLHA = jax.nn.dot_product_attention(q_BLHA, k_BLGA, v_BLGA, mask=mask_B1LS)
    return jnp.einsum("BLHA,HAD->BLD", y_BLHA, self.out_HAD[...].astype(self.dtype))
