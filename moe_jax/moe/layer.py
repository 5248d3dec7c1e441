"""The MoE layer: owns the router and the experts, and returns its statistics as a value."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import config as config_lib
from moe_jax import sharding
from moe_jax.config import Router
from moe_jax.kernels.experts import Experts
from moe_jax.moe import exchange
from moe_jax.moe.counts import Choices, MoeStats
from moe_jax.moe.routers import RouterInputs


class MoELayer(nnx.Module):
  """A router and E experts, some of which each token uses."""

  def __init__(self, model: config_lib.Model, rngs: nnx.Rngs):
    moe = model.moe
    D, E, F = model.dim, moe.num_experts, moe.expert_dim
    self.moe = moe
    self.dtype = jnp.dtype(model.compute_dtype.value)
    residual = (2 * model.num_layers) ** -0.5  # keeps the residual stream's variance near 1
    init = jax.random.normal
    self.router_DE = nnx.Param(0.02 * init(rngs.params(), (D, E)))
    self.gate_EDF = nnx.Param(D**-0.5 * init(rngs.params(), (E, D, F)))
    self.up_EDF = nnx.Param(D**-0.5 * init(rngs.params(), (E, D, F)))
    self.down_EFD = nnx.Param(residual * F**-0.5 * init(rngs.params(), (E, F, D)))
    if moe.router is Router.NOISY_TOPK:  # zero, as in Shazeer et al. appendix A: noise of 0.69
      self.noise_DE = nnx.Param(jnp.zeros((D, E)))

  def __call__(
    self,
    x_BLD: jax.Array,
    real_BL: jax.Array,
    ids_BL: jax.Array,
    bias_E: jax.Array,
    key: jax.Array,
    *,
    train: bool,
    trace: bool = False,
  ) -> tuple[jax.Array, MoeStats, Choices | None]:
    """y_BLD, the statistics of its real tokens, and with `trace` what became of each token.

    Args:
      x_BLD: compute dtype.
      real_BL: False at padding.
      ids_BL: int32 token ids, for hash routing.
      bias_E: float32 balancing bias of the selection, zeros without loss-free balancing.
      key: for jitter and the routers' noise.
      train: capacity factor, jitter and noise of training.
      trace: see the return value.
    """
    with jax.named_scope("router"):
      inputs = self.router_inputs(x_BLD, real_BL, ids_BL, bias_E, key, train=train)
    experts = Experts(
      *(w[...].astype(self.dtype) for w in (self.gate_EDF, self.up_EDF, self.down_EFD))
    )
    return exchange.moe_ffn(x_BLD, inputs, experts, self.moe, train=train, trace=trace)

  def router_inputs(self, x_BLD, real_BL, ids_BL, bias_E, key, *, train: bool) -> RouterInputs:
    """In router_dtype whatever the compute dtype (Switch 2101.03961 section 2.4), with noise.

    What is drawn is drawn for the global array, so it does not depend on the mesh.
    """
    moe = self.moe
    jitter_key, noise_key = jax.random.split(key)
    x_BLD = x_BLD.astype(jnp.float32)
    if train and moe.jitter:
      low, high = 1 - moe.jitter, 1 + moe.jitter
      jitter_BLD = jax.random.uniform(jitter_key, x_BLD.shape, jnp.float32, low, high)
      x_BLD = x_BLD * sharding.constrain(jitter_BLD, "BLD")

    logits_BLE = router_logits(x_BLD, self.router_DE[...], moe)
    noise_BLE = scale_BLE = None
    if moe.router is Router.RANDOM:
      noise_BLE = _by_batch(jax.random.uniform(noise_key, logits_BLE.shape))
    elif moe.router is Router.NOISY_TOPK and train:
      noise_BLE = _by_batch(jax.random.normal(noise_key, logits_BLE.shape))
      scale_BLE = jax.nn.softplus(router_logits(x_BLD, self.noise_DE[...], moe)) + 1e-2
    return RouterInputs(logits_BLE, real_BL, ids_BL, bias_E, noise_BLE, scale_BLE)


def router_logits(x_BLD: jax.Array, w_DE: jax.Array, moe: config_lib.MoE) -> jax.Array:
  """float32 [B, L, E], computed in router_dtype."""
  # "highest": an accelerator's default rounds float32 operands, and near ties change experts.
  x, w = (a.astype(moe.router_dtype.value) for a in (x_BLD, w_DE))
  logits_BLE = jnp.einsum("BLD,DE->BLE", x, w, precision="highest")
  return _by_batch(logits_BLE.astype(jnp.float32))


def _by_batch(x_BLE: jax.Array) -> jax.Array:
  # E is whole on every device here, unlike the experts' own E.
  return jax.lax.with_sharding_constraint(x_BLE, jax.sharding.PartitionSpec(sharding.BATCH_AXES))
