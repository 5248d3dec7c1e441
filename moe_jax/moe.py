"""The MoE layer: owns the router and the experts, and returns its statistics as a value."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import config as config_lib
from moe_jax import expert_parallel, sharding


class MoELayer(nnx.Module):
  """A feed-forward layer of E SwiGLU experts, K of which each token uses."""

  def __init__(self, model: config_lib.Model, rngs: nnx.Rngs):
    D, E, F = model.dim, model.moe.num_experts, model.moe.expert_dim
    self.moe = model.moe
    self.dtype = jnp.dtype(model.compute_dtype.value)
    residual = (2 * model.num_layers) ** -0.5  # keeps the residual stream's variance near 1
    init = jax.random.normal
    self.router_DE = nnx.Param(0.02 * init(rngs.params(), (D, E)))
    self.gate_EDF = nnx.Param(D**-0.5 * init(rngs.params(), (E, D, F)))
    self.up_EDF = nnx.Param(D**-0.5 * init(rngs.params(), (E, D, F)))
    self.down_EFD = nnx.Param(residual * F**-0.5 * init(rngs.params(), (E, F, D)))

  def __call__(
    self, x_BLD: jax.Array, real_BL: jax.Array, key: jax.Array, *, train: bool
  ) -> tuple[jax.Array, expert_parallel.MoeStats]:
    with jax.named_scope("router"):
      logits_BLE = self.router_logits(x_BLD, key, train=train)
    experts = expert_parallel.Experts(
      *(w[...].astype(self.dtype) for w in (self.gate_EDF, self.up_EDF, self.down_EFD))
    )
    return expert_parallel.moe_ffn(x_BLD, logits_BLE, real_BL, experts, self.moe, train=train)

  def router_logits(self, x_BLD: jax.Array, key: jax.Array, *, train: bool) -> jax.Array:
    """float32 logits whatever the compute dtype (Switch 2101.03961 section 2.4), with its jitter.

    The noise is drawn for the global array, so it does not depend on the mesh.
    """
    x_BLD = x_BLD.astype(jnp.float32)
    if train and self.moe.jitter:
      low, high = 1 - self.moe.jitter, 1 + self.moe.jitter
      noise_BLD = jax.random.uniform(key, x_BLD.shape, jnp.float32, low, high)
      x_BLD = x_BLD * sharding.constrain(noise_BLD, "BLD")
    # "highest": an accelerator's default rounds float32 operands, and near ties change experts.
    logits_BLE = jnp.einsum("BLD,DE->BLE", x_BLD, self.router_DE[...], precision="highest")
    return jax.lax.with_sharding_constraint(
      logits_BLE, jax.sharding.PartitionSpec(sharding.BATCH_AXES)
    )
