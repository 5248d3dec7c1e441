"""Multi-head latent attention (DeepSeek-V2, 2405.04434): keys and values are made of one latent.

    latent_W = norm(down(x)),  key = [up_k(latent), rotated],  value = up_v(latent)

The rotated part of a key, R wide, is the same for all heads, so a cache holds W + R numbers of a
token, and no keys or values of heads. In decoding up_k is applied to the query instead of to every
key, and up_v to the result ("absorbed"): attention is then over the latents themselves.

Q: latent of queries. W: latent of keys and values. R: rotated width. U: W and R together. X: width
of a head of values. Y: a head's unrotated key and its value together.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import sharding
from moe_jax.config import Model
from moe_jax.kernels.cache import Stored
from moe_jax.kernels.linear import Weight, linear
from moe_jax.kernels.mask import Mask
from moe_jax.model.attention import SINKS_H, Attend, scaled
from moe_jax.model.norm import RMSNorm, rms_norm
from moe_jax.model.rope import rope


class LatentWeights(NamedTuple):
  """The matrices in the compute dtype; norms and sinks are float32.

  For inference the matrices that are a Weight may be packed (kernels/packing.py).
  """

  q_DHA: Weight | None  # where queries have no latent
  q_down_DQ: Weight | None
  q_norm_Q: jax.Array | None
  q_up_QHA: Weight | None
  kv_down_DU: Weight
  kv_norm_W: jax.Array
  kv_up_WHY: jax.Array
  out_HXD: Weight
  sinks_H: jax.Array | None

  def packed(self, pack: Callable[..., Weight]) -> "LatentWeights":
    """Returns the weights with `pack` of each matrix; see packing.matrix."""
    names = ("q_DHA", "q_down_DQ", "q_up_QHA", "kv_down_DU")
    matrices: dict[str, Any] = {name: getattr(self, name) for name in names}
    matrices = {name: pack(w) for name, w in matrices.items() if w is not None}
    return self._replace(**matrices, out_HXD=pack(self.out_HXD, inner=2))


class LatentAttentionLayer(nnx.Module):
  """The parameters of one layer's latent attention."""

  def __init__(self, model: Model, rngs: nnx.Rngs):
    D, H, A, latent = model.dim, model.num_heads, model.head_dim, model.latent
    W, R, X = latent.kv_dim, latent.rotary_dim, latent.value_dim

    def matrix(*sizes: int, inner: int) -> nnx.Param:
      return nnx.Param(inner**-0.5 * jax.random.normal(rngs.params(), sizes))

    if latent.query_dim:
      self.q_down_DQ = matrix(D, latent.query_dim, inner=D)
      self.q_latent_norm = RMSNorm("Q", latent.query_dim, offset=model.norm_offset)
      self.q_up_QHA = matrix(latent.query_dim, H, A, inner=latent.query_dim)
    else:
      self.q_DHA = matrix(D, H, A, inner=D)
    self.kv_down_DU = matrix(D, W + R, inner=D)
    self.kv_latent_norm = RMSNorm("W", W, offset=model.norm_offset)
    self.kv_up_WHY = matrix(W, H, A - R + X, inner=W)
    out_HXD = model.residual_scale * (H * X) ** -0.5 * jax.random.normal(rngs.params(), (H, X, D))
    self.out_HXD = nnx.Param(out_HXD)
    if model.sinks:
      self.sinks_H = nnx.Param(SINKS_H.initial(rngs, {"H": H}))

  def weights(self, dtype: jnp.dtype) -> LatentWeights:
    """Returns the weights, with the matrices in `dtype`."""

    def matrix(name: str) -> Any:
      return getattr(self, name)[...].astype(dtype) if hasattr(self, name) else None

    return LatentWeights(
      q_DHA=matrix("q_DHA"),
      q_down_DQ=matrix("q_down_DQ"),
      q_norm_Q=self.q_latent_norm.weights() if hasattr(self, "q_latent_norm") else None,
      q_up_QHA=matrix("q_up_QHA"),
      kv_down_DU=matrix("kv_down_DU"),
      kv_norm_W=self.kv_latent_norm.weights(),
      kv_up_WHY=matrix("kv_up_WHY"),
      out_HXD=matrix("out_HXD"),
      sinks_H=self.sinks_H[...] if hasattr(self, "sinks_H") else None,
    )


def latent_attention(
  x_BLD: jax.Array,
  weights: LatentWeights,
  positions_BL: jax.Array,
  attend: Attend,
  model: Model,
  mask: Mask,
) -> tuple[jax.Array, Any]:
  """Computes attention with latents; a single token is computed absorbed.

  The arguments are those of grouped_query_attention.
  """
  R, W = model.latent.rotary_dim, model.latent.kv_dim
  unrotated, mask = model.head_dim - R, mask._replace(sinks_H=weights.sinks_H)
  if weights.q_DHA is not None:
    q_BLHA = linear(x_BLD, weights.q_DHA)
  else:
    assert weights.q_down_DQ is not None and weights.q_norm_Q is not None
    assert weights.q_up_QHA is not None
    q_BLQ = rms_norm(linear(x_BLD, weights.q_down_DQ), weights.q_norm_Q, model.latent.norm_eps)
    q_BLHA = linear(q_BLQ, weights.q_up_QHA)
  q_BLHR = rope(q_BLHA[..., unrotated:], positions_BL, model)
  down_BLU = linear(x_BLD, weights.kv_down_DU)
  latent_BLW = rms_norm(down_BLU[..., :W], weights.kv_norm_W, model.latent.norm_eps)
  shared_BLGR = rope(down_BLU[:, :, None, W:], positions_BL, model)  # G = 1
  stored_BLGU = jnp.concatenate([latent_BLW[:, :, None], shared_BLGR], axis=-1)
  if x_BLD.shape[1] == 1:
    key_up, value_up = weights.kv_up_WHY[..., :unrotated], weights.kv_up_WHY[..., unrotated:]
    q_BLHW = jnp.einsum("BLHA,WHA->BLHW", q_BLHA[..., :unrotated], key_up)
    q_BLHU = scaled(jnp.concatenate([q_BLHW, q_BLHR], axis=-1), model)
    y_BLHU, state = attend(q_BLHU, stored_BLGU, None, mask)
    y_BLHX = jnp.einsum("BLHW,WHX->BLHX", y_BLHU[..., :W], value_up)
  else:
    kv_BLHY = linear(latent_BLW, weights.kv_up_WHY)
    rotated_BLHR = jnp.broadcast_to(shared_BLGR, q_BLHR.shape)
    k_BLHA = jnp.concatenate([kv_BLHY[..., :unrotated], rotated_BLHR], axis=-1)
    q_BLHA = scaled(jnp.concatenate([q_BLHA[..., :unrotated], q_BLHR], axis=-1), model)
    y_BLHX, state = attend(
      sharding.constrain(q_BLHA, "BLHA"),
      sharding.constrain(k_BLHA, "BLHA"),
      kv_BLHY[..., unrotated:],
      mask,
      Stored(stored_BLGU, None),
    )
  return linear(y_BLHX, weights.out_HXD, inner=2), state
