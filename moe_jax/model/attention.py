"""Grouped-query attention (2305.13245): projections with norms and biases, around an `attend`."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import sharding
from moe_jax.config import Attention, Model, QKNorm
from moe_jax.kernels import context
from moe_jax.kernels.attention import segment_attention
from moe_jax.kernels.cache import KeysValues, Stored
from moe_jax.kernels.layout import stored
from moe_jax.kernels.linear import Weight, linear
from moe_jax.kernels.mask import Mask
from moe_jax.model.norm import RMSNorm, rms_norm
from moe_jax.model.rope import rope, score_factor


class Attend(Protocol):
  """Computes attention for a layer: over the segments of a batch, or over a cache."""

  def __call__(
    self,
    q_BLHA: jax.Array,
    k_BLGA: jax.Array,
    v_BLGX: jax.Array | None,
    mask: Mask,
    stored: Stored | None = None,
  ) -> tuple[jax.Array, KeysValues | None]:
    """Returns y_BLHX, and the cache with these tokens added; None over segments.

    Args:
      q_BLHA: queries.
      k_BLGA: keys.
      v_BLGX: values; None where the keys are the values.
      mask: what the scores are put through.
      stored: what a cache keeps in place of the keys and values.
    """


SINKS_H = sharding.Parameter(
  name="sinks_H",
  initial=lambda rngs, sizes: jnp.zeros((sizes["H"],)),
  replicated=False,
  decays=False,
  group="attention",
)


class AttentionWeights(NamedTuple):
  """The matrices and biases in the compute dtype, and the norms' scales in float32.

  For inference the matrices may be packed (kernels/packing.py).
  """

  q_DHA: Weight
  gate_DHA: Weight | None
  k_DGA: Weight
  v_DGA: Weight
  out_HAD: Weight
  q_norm: jax.Array | None  # float32 [A], or [H, A] with a scale for each head
  k_norm: jax.Array | None  # float32 [A] or [G, A]
  q_bias_HA: jax.Array | None
  k_bias_GA: jax.Array | None
  v_bias_GA: jax.Array | None
  out_bias_D: jax.Array | None
  sinks_H: jax.Array | None  # float32

  def packed(self, pack: Callable[..., Weight]) -> "AttentionWeights":
    """Returns the weights with `pack` of each matrix; see packing.matrix."""
    gate_DHA = pack(self.gate_DHA) if self.gate_DHA is not None else None
    return self._replace(
      q_DHA=pack(self.q_DHA),
      gate_DHA=gate_DHA,
      k_DGA=pack(self.k_DGA),
      v_DGA=pack(self.v_DGA),
      out_HAD=pack(self.out_HAD, inner=2),
    )


class AttentionLayer(nnx.Module):
  """The parameters of one layer's attention."""

  def __init__(self, model: Model, rngs: nnx.Rngs):
    D, H, G, A = model.dim, model.num_heads, model.num_kv_heads, model.head_dim
    init = jax.random.normal
    self.q_DHA = nnx.Param(D**-0.5 * init(rngs.params(), (D, H, A)))
    if model.attention_gate:
      self.gate_DHA = nnx.Param(D**-0.5 * init(rngs.params(), (D, H, A)))
    self.k_DGA = nnx.Param(D**-0.5 * init(rngs.params(), (D, G, A)))
    self.v_DGA = nnx.Param(D**-0.5 * init(rngs.params(), (D, G, A)))
    out_HAD = model.residual_scale * (H * A) ** -0.5 * init(rngs.params(), (H, A, D))
    self.out_HAD = nnx.Param(out_HAD)
    self.q_norm = _qk_norm(model, "H", H)
    self.k_norm = _qk_norm(model, "G", G)
    if model.qkv_bias:
      self.q_bias_HA = nnx.Param(jnp.zeros((H, A)))
      self.k_bias_GA = nnx.Param(jnp.zeros((G, A)))
      self.v_bias_GA = nnx.Param(jnp.zeros((G, A)))
    if model.out_bias:
      self.out_bias_D = nnx.Param(jnp.zeros((D,)))
    if model.sinks:
      self.sinks_H = nnx.Param(SINKS_H.initial(rngs, {"H": H}))

  def weights(self, dtype: jnp.dtype) -> AttentionWeights:
    """Returns the weights, with the matrices and biases in `dtype`."""

    def optional(name: str) -> jax.Array | None:
      return getattr(self, name)[...].astype(dtype) if hasattr(self, name) else None

    return AttentionWeights(
      q_DHA=self.q_DHA[...].astype(dtype),
      gate_DHA=optional("gate_DHA"),
      k_DGA=self.k_DGA[...].astype(dtype),
      v_DGA=self.v_DGA[...].astype(dtype),
      out_HAD=self.out_HAD[...].astype(dtype),
      q_norm=self.q_norm.weights() if self.q_norm is not None else None,
      k_norm=self.k_norm.weights() if self.k_norm is not None else None,
      q_bias_HA=optional("q_bias_HA"),
      k_bias_GA=optional("k_bias_GA"),
      v_bias_GA=optional("v_bias_GA"),
      out_bias_D=optional("out_bias_D"),
      sinks_H=self.sinks_H[...] if hasattr(self, "sinks_H") else None,
    )


def _qk_norm(model: Model, letter: str, heads: int) -> RMSNorm | None:
  kind, A, offset = model.qk_norm, model.head_dim, model.norm_offset
  if kind is QKNorm.NONE:
    return None
  if kind is QKNorm.HEAD:
    return RMSNorm("A", A, offset=offset)
  return RMSNorm(f"{letter}A", heads, A, offset=offset)


def over_segments(segments_BL: jax.Array, kernel: Attention) -> Attend:
  """Returns the Attend of training: over the documents of a batch, with that kernel."""

  def of_kernel(q: jax.Array, k: jax.Array, v: Any, segments: jax.Array, mask: Mask) -> jax.Array:
    return segment_attention(q, k, v, segments, kernel, mask)

  def attend(
    q_BLHA: jax.Array,
    k_BLGA: jax.Array,
    v_BLGX: jax.Array | None,
    mask: Mask,
    stored: Stored | None = None,
  ) -> tuple[jax.Array, None]:
    return context.over_sequences(of_kernel)(q_BLHA, k_BLGA, v_BLGX, segments_BL, mask), None

  return attend


def grouped_query_attention(
  x_BLD: jax.Array,
  weights: AttentionWeights,
  positions_BL: jax.Array,
  attend: Attend,
  model: Model,
  mask: Mask,
) -> tuple[jax.Array, Any]:
  """Projects tokens to queries, keys and values, attends, and projects the result back.

  Args:
    x_BLD: normed tokens, compute dtype.
    weights: of this layer.
    positions_BL: int32, position within the document.
    attend: computes attention, over the batch or over a cache.
    model: the configuration.
    mask: what the scores of this layer are put through; the sinks of the weights join it.

  Returns:
    y_BLD in the compute dtype, and the state that `attend` returns.
  """
  q_BLHA = _plus(linear(x_BLD, weights.q_DHA), weights.q_bias_HA)
  q_BLHA = stored(q_BLHA, 0, 2, 1, 3)  # as kernels take them; norm and rope are in float32
  k_BLGA = _plus(linear(x_BLD, weights.k_DGA), weights.k_bias_GA)
  v_BLGA = _plus(linear(x_BLD, weights.v_DGA), weights.v_bias_GA)
  if weights.q_norm is not None and weights.k_norm is not None:
    q_BLHA = rms_norm(q_BLHA, weights.q_norm, model.norm_eps)
    k_BLGA = rms_norm(k_BLGA, weights.k_norm, model.norm_eps)
  q_BLHA = sharding.constrain(rope(q_BLHA, positions_BL, model), "BLHA")
  k_BLGA = sharding.constrain(rope(k_BLGA, positions_BL, model), "BLGA")
  q_BLHA = scaled(q_BLHA, model)
  mask = mask._replace(sinks_H=weights.sinks_H)
  y_BLHA, state = attend(q_BLHA, k_BLGA, v_BLGA, mask)
  if weights.gate_DHA is not None:
    y_BLHA *= jax.nn.sigmoid(linear(x_BLD, weights.gate_DHA))
  return _plus(linear(y_BLHA, weights.out_HAD, inner=2), weights.out_bias_D), state


def scaled(q: jax.Array, model: Model) -> jax.Array:
  """Returns queries for a kernel that multiplies scores by q's own width^-0.5."""
  scale = (model.attention_scale or model.head_dim**-0.5) * score_factor(model.rope_scaling)
  usual = q.shape[-1] ** -0.5
  return q if scale == usual else q * (scale / usual)


def _plus(x: jax.Array, bias: jax.Array | None) -> jax.Array:
  return x if bias is None else x + bias.reshape((1,) * (x.ndim - bias.ndim) + bias.shape)
