"""Grouped-query attention (2305.13245): projections with norms and biases, around an `attend`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import config as config_lib
from moe_jax import sharding
from moe_jax.kernels.linear import Weight, linear
from moe_jax.model.norm import RMSNorm, rms_norm
from moe_jax.model.rope import rope

# (q_BLHA, k_BLGA, v_BLGA) -> (y_BLHA, state for the next tokens). Over the segments of a batch the
# state is None; over a cache it is the cache with these tokens added.
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


class AttentionWeights(NamedTuple):
  """The matrices and biases in the compute dtype, and the norms' scales in float32.

  For inference the matrices may be packed (kernels/packing.py).
  """

  q_DHA: Weight
  k_DGA: Weight
  v_DGA: Weight
  out_HAD: Weight
  q_norm: jax.Array | None  # float32 [A], or [H, A] with a scale for each head
  k_norm: jax.Array | None  # float32 [A] or [G, A]
  q_bias_HA: jax.Array | None
  k_bias_GA: jax.Array | None
  v_bias_GA: jax.Array | None
  out_bias_D: jax.Array | None


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
    self.q_norm = _qk_norm(model.qk_norm, "H", H, A)
    self.k_norm = _qk_norm(model.qk_norm, "G", G, A)
    if model.qkv_bias:
      self.q_bias_HA = nnx.Param(jnp.zeros((H, A)))
      self.k_bias_GA = nnx.Param(jnp.zeros((G, A)))
      self.v_bias_GA = nnx.Param(jnp.zeros((G, A)))
    if model.out_bias:
      self.out_bias_D = nnx.Param(jnp.zeros((D,)))

  def weights(self, dtype: jnp.dtype) -> AttentionWeights:
    """Returns the weights, with the matrices and biases in `dtype`."""

    def bias(name: str) -> jax.Array | None:
      return getattr(self, name)[...].astype(dtype) if hasattr(self, name) else None

    return AttentionWeights(
      q_DHA=self.q_DHA[...].astype(dtype),
      k_DGA=self.k_DGA[...].astype(dtype),
      v_DGA=self.v_DGA[...].astype(dtype),
      out_HAD=self.out_HAD[...].astype(dtype),
      q_norm=self.q_norm.weights() if self.q_norm is not None else None,
      k_norm=self.k_norm.weights() if self.k_norm is not None else None,
      q_bias_HA=bias("q_bias_HA"),
      k_bias_GA=bias("k_bias_GA"),
      v_bias_GA=bias("v_bias_GA"),
      out_bias_D=bias("out_bias_D"),
    )


def _qk_norm(kind: config_lib.QKNorm, letter: str, heads: int, A: int) -> RMSNorm | None:
  if kind is config_lib.QKNorm.NONE:
    return None
  return RMSNorm("A", A) if kind is config_lib.QKNorm.HEAD else RMSNorm(f"{letter}A", heads, A)


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
    model: the configuration.

  Returns:
    y_BLD in the compute dtype, and the state that `attend` returns.
  """
  q_BLHA = _plus(linear(x_BLD, weights.q_DHA), weights.q_bias_HA)
  k_BLGA = _plus(linear(x_BLD, weights.k_DGA), weights.k_bias_GA)
  v_BLGA = _plus(linear(x_BLD, weights.v_DGA), weights.v_bias_GA)
  if weights.q_norm is not None and weights.k_norm is not None:
    q_BLHA = rms_norm(q_BLHA, weights.q_norm, model.norm_eps)
    k_BLGA = rms_norm(k_BLGA, weights.k_norm, model.norm_eps)
  q_BLHA = sharding.constrain(rope(q_BLHA, positions_BL, model), "BLHA")
  k_BLGA = sharding.constrain(rope(k_BLGA, positions_BL, model), "BLGA")
  if model.attention_scale:  # every kernel multiplies by A^-0.5
    q_BLHA = q_BLHA * (model.attention_scale * model.head_dim**0.5)
  y_BLHA, state = attend(q_BLHA, k_BLGA, v_BLGA)
  return _plus(linear(y_BLHA, weights.out_HAD, inner=2), weights.out_bias_D), state


def _plus(x: jax.Array, bias: jax.Array | None) -> jax.Array:
  return x if bias is None else x + bias.reshape((1,) * (x.ndim - bias.ndim) + bias.shape)
