"""A layer of the gated delta rule (Gated DeltaNet, 2412.06464), as Qwen3-Next has it.

    q, k, v, z, b, a = projections of x;   q, k, v = silu(convolution of each channel)
    y = norm(delta_rule(q, k, v)) * silu(z),   b: how much is written,   a: how much is forgotten

J: heads of queries and keys, each of which serves several heads of values. I: their width. O: heads
of values. X: their width. Y: what one of J has of q, k, v and z together. R: of b and a. U: all
channels of q, k and v. C: width of the convolution.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import sharding
from moe_jax.config import Delta, Model
from moe_jax.kernels import delta_rule
from moe_jax.kernels.delta_rule import DeltaState
from moe_jax.kernels.linear import Weight, linear
from moe_jax.model.norm import RMSNorm, rms_norm

CONV_UC = sharding.Parameter(
  name="conv_UC",
  initial=lambda rngs, sizes: (
    sizes["C"] ** -0.5 * jax.random.normal(rngs.params(), (sizes["U"], sizes["C"]))
  ),
  replicated=True,
  decays=False,
  group="attention",
)
LOG_RATE_O = sharding.Parameter(
  name="log_rate_O",
  initial=lambda rngs, sizes: jnp.log(
    jax.random.uniform(rngs.params(), (sizes["O"],), minval=0.01, maxval=16.0)
  ),
  replicated=True,
  decays=False,
  group="attention",
)


def _sizes(delta: Delta) -> tuple[int, int, int, int, int]:
  """Returns J, I, O, X and U."""
  J, I, O, X = delta.key_heads, delta.key_dim, delta.value_heads, delta.value_dim  # noqa: E741
  return J, I, O, X, 2 * J * I + O * X


def slices(delta: Delta) -> dict[str, slice]:
  """Returns where q, k, v and z stand on Y, and b and a on R."""
  key, each = delta.key_dim, delta.value_heads // max(delta.key_heads, 1)
  value = each * delta.value_dim
  return {
    "q": slice(0, key),
    "k": slice(key, 2 * key),
    "v": slice(2 * key, 2 * key + value),
    "z": slice(2 * key + value, 2 * key + 2 * value),
    "b": slice(0, each),
    "a": slice(each, 2 * each),
  }


class DeltaWeights(NamedTuple):
  """The matrices in the compute dtype; the rest is float32.

  For inference the matrices may be packed (kernels/packing.py).
  """

  qkvz_DJY: Weight
  ba_DJR: Weight
  conv_UC: jax.Array
  log_rate_O: jax.Array  # of forgetting; A_log in the files of Qwen
  rate_bias_O: jax.Array  # dt_bias
  norm_X: jax.Array
  out_OXD: Weight

  def packed(self, pack: Callable[..., Weight]) -> "DeltaWeights":
    """Returns the weights with `pack` of each matrix; see packing.matrix."""
    return self._replace(
      qkvz_DJY=pack(self.qkvz_DJY), ba_DJR=pack(self.ba_DJR), out_OXD=pack(self.out_OXD, inner=2)
    )


class DeltaLayer(nnx.Module):
  """The parameters of one layer's delta rule."""

  def __init__(self, model: Model, rngs: nnx.Rngs):
    D = model.dim
    J, I, O, X, U = _sizes(model.delta)  # noqa: E741
    init, each = jax.random.normal, O // J
    self.qkvz_DJY = nnx.Param(D**-0.5 * init(rngs.params(), (D, J, 2 * I + 2 * each * X)))
    self.ba_DJR = nnx.Param(D**-0.5 * init(rngs.params(), (D, J, 2 * each)))
    sizes = {"U": U, "C": model.delta.conv_width, "O": O}
    self.conv_UC = nnx.Param(CONV_UC.initial(rngs, sizes))
    self.log_rate_O = nnx.Param(LOG_RATE_O.initial(rngs, sizes))
    self.rate_bias_O = nnx.Param(jnp.ones((O,)))
    self.norm = RMSNorm("X", X)
    out_OXD = model.residual_scale * (O * X) ** -0.5 * init(rngs.params(), (O, X, D))
    self.out_OXD = nnx.Param(out_OXD)

  def weights(self, dtype: jnp.dtype) -> DeltaWeights:
    """Returns the weights, with the matrices in `dtype`."""
    return DeltaWeights(
      qkvz_DJY=self.qkvz_DJY[...].astype(dtype),
      ba_DJR=self.ba_DJR[...].astype(dtype),
      conv_UC=self.conv_UC[...],
      log_rate_O=self.log_rate_O[...],
      rate_bias_O=self.rate_bias_O[...],
      norm_X=self.norm.weights(),
      out_OXD=self.out_OXD[...].astype(dtype),
    )


def empty_state(model: Model, B: int) -> DeltaState:
  """Returns a layer's state before the first token of B rows."""
  _, I, O, X, U = _sizes(model.delta)  # noqa: E741
  recent_BWU = jnp.zeros((B, model.delta.conv_width - 1, U), model.compute_dtype.value)
  return DeltaState(jnp.zeros((B, O, I, X), jnp.float32), recent_BWU)


def delta_layer(
  x_BLD: jax.Array,
  weights: DeltaWeights,
  segments_BL: jax.Array,
  state: DeltaState | None,
  model: Model,
) -> tuple[jax.Array, DeltaState | None]:
  """Mixes the tokens of each document by the delta rule.

  Args:
    x_BLD: normed tokens, compute dtype.
    weights: of this layer.
    segments_BL: int32, the document of each token.
    state: before the first token, which goes on with it; None in training.
    model: the configuration.

  Returns:
    y_BLD in the compute dtype, and the state after the last token; None where there was none.
  """
  B, L = segments_BL.shape
  J, I, O, X, _ = _sizes(model.delta)  # noqa: E741
  each, old = O // J, state or empty_state(model, B)
  qkvz_BLJY = linear(x_BLD, weights.qkvz_DJY)
  ba_BLJR = linear(x_BLD, weights.ba_DJR).astype(jnp.float32)
  at = slices(model.delta)
  b_BLO, a_BLO = (ba_BLJR[..., at[name]].reshape(B, L, O) for name in "ba")
  beta_BLO = jax.nn.sigmoid(b_BLO)
  rate_BLO = jax.nn.softplus(a_BLO + weights.rate_bias_O[None, None])
  decay_BLO = -jnp.exp(weights.log_rate_O)[None, None] * rate_BLO
  q, k, v, z = (qkvz_BLJY[..., at[name]].reshape(B, L, -1) for name in "qkvz")
  mixed = jnp.concatenate([q, k, v], axis=-1)
  mixed, recent_BWU = delta_rule.convolve(
    mixed, weights.conv_UC.astype(mixed.dtype), segments_BL, old.recent_BWU
  )
  q, k, v = jnp.split(jax.nn.silu(mixed.astype(jnp.float32)), (J * I, 2 * J * I), axis=-1)
  q_BLOI, k_BLOI = (jnp.repeat(_unit(x.reshape(B, L, J, I)), each, axis=2) for x in (q, k))
  v_BLOX = v.reshape(B, L, O, X)
  tokens = delta_rule.DeltaInputs(q_BLOI * I**-0.5, k_BLOI, v_BLOX, decay_BLO, beta_BLO)
  if L == 1:
    y_BLOX, memory_BOIX = delta_rule.step(tokens, old.memory_BOIX)
  else:
    y_BLOX, memory_BOIX = delta_rule.chunked(tokens, segments_BL, old.memory_BOIX)
  gate_BLOX = jax.nn.silu(z.reshape(B, L, O, X).astype(jnp.float32))
  y_BLOX = (rms_norm(y_BLOX, weights.norm_X, model.norm_eps) * gate_BLOX).astype(x_BLD.dtype)
  new = DeltaState(memory_BOIX, recent_BWU) if state is not None else None
  return linear(y_BLOX, weights.out_OXD, inner=2), new


def _unit(x: jax.Array) -> jax.Array:
  """Returns vectors of length 1."""
  return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-6)
