"""The MoE layer: owns the router and the experts, and returns its statistics as a value."""

from typing import NamedTuple

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


class MoEWeights(NamedTuple):
  router: dict[str, jax.Array]
  bias_E: jax.Array
  experts: Experts


class MoEOutput(NamedTuple):
  y_BLD: jax.Array
  stats: MoeStats
  choices: Choices | None


class MoELayer(nnx.Module):
  """A router and E experts, some of which each token uses."""

  def __init__(self, model: config_lib.Model, rngs: nnx.Rngs):
    moe = model.moe
    D, E, F = model.dim, moe.num_experts, moe.expert_dim
    self.moe = moe
    residual = (2 * model.num_layers) ** -0.5  # keeps the residual stream's variance near 1
    init = jax.random.normal
    self.router_DE = nnx.Param(0.02 * init(rngs.params(), (D, E)))
    self.gate_EDF = nnx.Param(D**-0.5 * init(rngs.params(), (E, D, F)))
    self.up_EDF = nnx.Param(D**-0.5 * init(rngs.params(), (E, D, F)))
    self.down_EFD = nnx.Param(residual * F**-0.5 * init(rngs.params(), (E, F, D)))
    if moe.router is Router.NOISY_TOPK:  # zero, as in Shazeer et al. appendix A: noise of 0.69
      self.noise_DE = nnx.Param(jnp.zeros((D, E)))

  def weights(self, dtype: jnp.dtype, bias_E: jax.Array) -> MoEWeights:
    stacked = (w[...].astype(dtype) for w in (self.gate_EDF, self.up_EDF, self.down_EFD))
    router = {"router_DE": self.router_DE[...]}
    if self.moe.router is Router.NOISY_TOPK:
      router["noise_DE"] = self.noise_DE[...]
    return MoEWeights(router, bias_E, Experts(*stacked))


def moe_layer(
  x_BLD: jax.Array,
  real_BL: jax.Array,
  ids_BL: jax.Array,
  weights: MoEWeights,
  moe: config_lib.MoE,
  key: jax.Array | None,
  *,
  train: bool,
  trace: bool = False,
) -> MoEOutput:
  with jax.named_scope("router"):
    inputs = router_inputs(x_BLD, real_BL, ids_BL, weights, moe, key, train=train)
  return MoEOutput(*exchange.moe_ffn(x_BLD, inputs, weights.experts, moe, train=train, trace=trace))


def router_inputs(x_BLD, real_BL, ids_BL, weights, moe, key, *, train: bool) -> RouterInputs:
  x_BLD = x_BLD.astype(jnp.float32)
  if key is not None:
    jitter_key, noise_key = jax.random.split(key)
  if train and moe.jitter:
    low, high = 1 - moe.jitter, 1 + moe.jitter
    jitter_BLD = jax.random.uniform(jitter_key, x_BLD.shape, jnp.float32, low, high)
    x_BLD = x_BLD * sharding.constrain(jitter_BLD, "BLD")

  logits_BLE = router_logits(x_BLD, weights.router["router_DE"], moe)
  noise_BLE = scale_BLE = None
  if moe.router is Router.RANDOM:
    noise_BLE = _by_batch(jax.random.uniform(noise_key, logits_BLE.shape))
  elif moe.router is Router.NOISY_TOPK and train:
    noise_BLE = _by_batch(jax.random.normal(noise_key, logits_BLE.shape))
    scale_BLE = jax.nn.softplus(router_logits(x_BLD, weights.router["noise_DE"], moe)) + 1e-2
  return RouterInputs(logits_BLE, real_BL, ids_BL, weights.bias_E, noise_BLE, scale_BLE)


def router_logits(x_BLD: jax.Array, w_DE: jax.Array, moe: config_lib.MoE) -> jax.Array:
  """float32 [B, L, E], computed in router_dtype."""
  # "highest": an accelerator's default rounds float32 operands, and near ties change experts.
  x, w = (a.astype(moe.router_dtype.value) for a in (x_BLD, w_DE))
  logits_BLE = jnp.einsum("BLD,DE->BLE", x, w, precision="highest")
  return _by_batch(logits_BLE.astype(jnp.float32))


def _by_batch(x_BLE: jax.Array) -> jax.Array:
  # E is whole on every device here, unlike the experts' own E.
  return jax.lax.with_sharding_constraint(x_BLE, jax.sharding.PartitionSpec(sharding.BATCH_AXES))
