"""Grouped-query attention (2305.13245) with rotary positions (2104.09864)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import config as config_lib
from moe_jax import sharding
from moe_jax.kernels.linear import Weight, linear
from moe_jax.model.norm import RMSNorm, rms_norm

# (q_BLHA, k_BLGA, v_BLGA) -> (y_BLHA, state for the next tokens). Over the segments of a batch the
# state is None; over a cache it is the cache with these tokens added.
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


class AttentionWeights(NamedTuple):
  """The matrices in the compute dtype, and the norms' scales in float32.

  For inference the matrices may be packed (kernels/packing.py).
  """

  q_DHA: Weight
  k_DGA: Weight
  v_DGA: Weight
  out_HAD: Weight
  q_norm_A: jax.Array | None
  k_norm_A: jax.Array | None


class AttentionLayer(nnx.Module):
  """The parameters of one layer's attention."""

  def __init__(self, model: config_lib.Model, rngs: nnx.Rngs):
    D, H, G, A = model.dim, model.num_heads, model.num_kv_heads, model.head_dim
    init = jax.random.normal
    self.q_DHA = nnx.Param(D**-0.5 * init(rngs.params(), (D, H, A)))
    self.k_DGA = nnx.Param(D**-0.5 * init(rngs.params(), (D, G, A)))
    self.v_DGA = nnx.Param(D**-0.5 * init(rngs.params(), (D, G, A)))
    out_HAD = model.residual_scale * (H * A) ** -0.5 * init(rngs.params(), (H, A, D))
    self.out_HAD = nnx.Param(out_HAD)
    self.q_norm = RMSNorm("A", A) if model.qk_norm else None
    self.k_norm = RMSNorm("A", A) if model.qk_norm else None

  def weights(self, dtype: jnp.dtype) -> AttentionWeights:
    """Returns the weights, with the matrices in `dtype`."""
    return AttentionWeights(
      q_DHA=self.q_DHA[...].astype(dtype),
      k_DGA=self.k_DGA[...].astype(dtype),
      v_DGA=self.v_DGA[...].astype(dtype),
      out_HAD=self.out_HAD[...].astype(dtype),
      q_norm_A=self.q_norm.weights() if self.q_norm is not None else None,
      k_norm_A=self.k_norm.weights() if self.k_norm is not None else None,
    )


def attention_layer(
  x_BLD: jax.Array,
  weights: AttentionWeights,
  positions_BL: jax.Array,
  attend: Attend,
  model: config_lib.Model,
) -> tuple[jax.Array, Any]:
  """Projects tokens to queries, keys and values, attends, and projects the result back.

  Args:
    x_BLD: normed tokens, compute dtype.
    weights: of this layer.
    positions_BL: int32, position within the document.
    attend: computes attention, over the batch or over a cache.
    model: has the rotary base and the norms' epsilon.

  Returns:
    y_BLD in the compute dtype, and the state that `attend` returns.
  """
  q_BLHA, k_BLGA, v_BLGA = (linear(x_BLD, w) for w in (weights.q_DHA, weights.k_DGA, weights.v_DGA))
  if weights.q_norm_A is not None and weights.k_norm_A is not None:
    q_BLHA = rms_norm(q_BLHA, weights.q_norm_A, model.norm_eps)
    k_BLGA = rms_norm(k_BLGA, weights.k_norm_A, model.norm_eps)
  q_BLHA = sharding.constrain(rope(q_BLHA, positions_BL, model.rope_base), "BLHA")
  k_BLGA = sharding.constrain(rope(k_BLGA, positions_BL, model.rope_base), "BLGA")
  y_BLHA, state = attend(q_BLHA, k_BLGA, v_BLGA)
  return linear(y_BLHA, weights.out_HAD, inner=2), state


def rope(x_BLHA: jax.Array, positions_BL: jax.Array, base: float) -> jax.Array:
  """Rotates the pairs (i, i + A/2) of each head by position * base^(-2i/A), in float32."""
  half = x_BLHA.shape[-1] // 2
  frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle = positions_BL[:, :, None, None].astype(jnp.float32) * frequency.reshape(1, 1, 1, -1)
  sin, cos = jnp.sin(angle), jnp.cos(angle)
  first, second = jnp.split(x_BLHA.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return rotated.astype(x_BLHA.dtype)
