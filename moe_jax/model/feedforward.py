"""The feed-forward of a layer: a dense one, or an MoE layer with optional shared experts."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import sharding
from moe_jax.config import Model
from moe_jax.kernels import activation
from moe_jax.kernels.activation import Nonlinearity, gated
from moe_jax.kernels.linear import Weight, linear
from moe_jax.moe.layer import MoELayer, MoEOutput, MoEWeights, moe_layer
from moe_jax.moe.routing import Mode, Tokens

SHARED_GATE_D = sharding.Parameter(
  name="shared_gate_D",
  initial=lambda rngs, sizes: sizes["D"] ** -0.5 * jax.random.normal(rngs.params(), (sizes["D"],)),
  replicated=False,
  decays=False,
  group="router",
)


class FFNWeights(NamedTuple):
  """The matrices of a dense feed-forward, in the compute dtype.

  For inference they may be packed (kernels/packing.py).
  """

  gate_DF: Weight | None  # None where the activation has no gate
  up_DF: Weight
  down_FD: Weight


class MoEFFNWeights(NamedTuple):
  """The weights of an MoE layer, and of its shared experts if it has any."""

  moe: MoEWeights
  shared: FFNWeights | None
  shared_gate_D: jax.Array | None  # compute dtype


class DenseFFN(nnx.Module):
  """The parameters of a dense feed-forward of width ffn_dim."""

  def __init__(self, model: Model, ffn_dim: int, rngs: nnx.Rngs):
    D, F = model.dim, ffn_dim
    init = jax.random.normal
    if model.gated:
      self.gate_DF = nnx.Param(D**-0.5 * init(rngs.params(), (D, F)))
    self.up_DF = nnx.Param(D**-0.5 * init(rngs.params(), (D, F)))
    self.down_FD = nnx.Param(model.residual_scale * F**-0.5 * init(rngs.params(), (F, D)))

  def weights(self, dtype: jnp.dtype) -> FFNWeights:
    """Returns the matrices in `dtype`."""
    return FFNWeights(
      gate_DF=self.gate_DF[...].astype(dtype) if hasattr(self, "gate_DF") else None,
      up_DF=self.up_DF[...].astype(dtype),
      down_FD=self.down_FD[...].astype(dtype),
    )


class MoEFFN(MoELayer):
  """The parameters of a router, its experts, and the shared experts that every token uses.

  Shared experts have the size of the routed ones, as in DeepSeekMoE (2401.06066), or one of their
  own. n shared experts are computed as one feed-forward that is n times as wide.
  """

  def __init__(self, model: Model, rngs: nnx.Rngs):
    super().__init__(model, rngs)
    width = model.moe.shared_width
    self.shared = DenseFFN(model, width, rngs) if width else None
    if model.moe.shared_gate:
      self.shared_gate_D = nnx.Param(SHARED_GATE_D.initial(rngs, {"D": model.dim}))

  def ffn_weights(self, dtype: jnp.dtype, bias_E: jax.Array) -> MoEFFNWeights:
    """Returns the weights of router, experts and shared experts; experts are in `dtype`.

    `bias_E` is the float32 balancing bias, zeros without loss-free balancing.
    """
    shared = self.shared.weights(dtype) if self.shared is not None else None
    gate_D = self.shared_gate_D[...].astype(dtype) if self.moe.shared_gate else None
    return MoEFFNWeights(self.weights(dtype, bias_E), shared, gate_D)


def moe_feedforward(
  x_BLD: jax.Array,
  tokens: Tokens,
  weights: MoEFFNWeights,
  model: Model,
  key: jax.Array,
  mode: Mode,
) -> MoEOutput:
  """Adds the shared experts, if there are any, to moe.layer.moe_layer.

  The arguments are those of `moe_layer`.
  """
  with jax.named_scope("moe"):
    out = moe_layer(x_BLD, tokens, weights.moe, model, key, mode)
  if weights.shared is None:
    return out
  with jax.named_scope("shared"):
    y_BLD = feedforward(x_BLD, weights.shared, activation.nonlinearity(model))
    if weights.shared_gate_D is not None:
      gate_BL1 = jax.nn.sigmoid(linear(x_BLD, weights.shared_gate_D[:, None]))
      y_BLD = y_BLD * gate_BL1
    return out._replace(y_BLD=out.y_BLD + y_BLD)


def feedforward(x_BLD: jax.Array, weights: FFNWeights, function: Nonlinearity = gated) -> jax.Array:
  """Returns down(function(gate(x), up(x))) as y_BLD, in the dtype of x_BLD."""
  matrices = (weights.gate_DF, weights.up_DF)
  h_BLF = function(*(linear(x_BLD, w) for w in matrices if w is not None))
  return linear(sharding.constrain(h_BLF, "BLF"), weights.down_FD)
