"""The dense feed-forward, alone in a dense block or as an MoE layer's shared experts."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import config as config_lib
from moe_jax import sharding


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
    gate_BLF = jnp.einsum("BLD,DF->BLF", x_BLD, self.gate_DF[...].astype(self.dtype))
    up_BLF = jnp.einsum("BLD,DF->BLF", x_BLD, self.up_DF[...].astype(self.dtype))
    h_BLF = sharding.constrain(jax.nn.silu(gate_BLF) * up_BLF, "BLF")
    return jnp.einsum("BLF,FD->BLD", h_BLF, self.down_FD[...].astype(self.dtype))
