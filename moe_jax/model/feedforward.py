"""The feed-forward of a block: dense, or experts with shared ones beside them."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import config as config_lib
from moe_jax import sharding
from moe_jax.moe.counts import Choices, MoeStats
from moe_jax.moe.layer import MoELayer


class DenseFFN(nnx.Module):
  """SwiGLU (2002.05202)."""

  def __init__(self, model: config_lib.Model, ffn_dim: int, rngs: nnx.Rngs):
    D, F = model.dim, ffn_dim
    self.dtype = jnp.dtype(model.compute_dtype.value)
    init = jax.random.normal
    self.gate_DF = nnx.Param(D**-0.5 * init(rngs.params(), (D, F)))
    self.up_DF = nnx.Param(D**-0.5 * init(rngs.params(), (D, F)))
    residual = (2 * model.num_layers) ** -0.5
    self.down_FD = nnx.Param(residual * F**-0.5 * init(rngs.params(), (F, D)))

  def __call__(self, x_BLD: jax.Array) -> jax.Array:
    weights = (self.gate_DF, self.up_DF, self.down_FD)
    gate_DF, up_DF, down_FD = (w[...].astype(self.dtype) for w in weights)
    # As one dimension of tokens: XLA:CPU takes half as long again over BLD's input gradient.
    x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])
    h_TF = jax.nn.silu(x_TD @ gate_DF) * (x_TD @ up_DF)
    h_BLF = sharding.constrain(h_TF.reshape(*x_BLD.shape[:2], -1), "BLF")
    return (h_BLF.reshape(h_TF.shape) @ down_FD).reshape(x_BLD.shape)


class MoEFFN(MoELayer):
  """An MoE layer and the shared experts that all tokens use, where the model has some.

  Shared experts and their size as in DeepSeekMoE (2401.06066): n of them are one n times as wide.
  """

  def __init__(self, model: config_lib.Model, rngs: nnx.Rngs):
    super().__init__(model, rngs)
    moe = model.moe
    width = moe.shared_experts * moe.expert_dim
    self.shared = DenseFFN(model, width, rngs) if moe.shared_experts else None

  def __call__(
    self, x_BLD: jax.Array, *args: jax.Array, train: bool, trace: bool = False
  ) -> tuple[jax.Array, MoeStats, Choices | None]:
    y_BLD, stats, choices = super().__call__(x_BLD, *args, train=train, trace=trace)
    if self.shared is not None:
      with jax.named_scope("shared"):
        y_BLD += self.shared(x_BLD)
    return y_BLD, stats, choices
