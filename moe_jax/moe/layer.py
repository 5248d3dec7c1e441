"""The Mixture-of-Experts layer: the algorithm, its entry on a mesh, and the parameters.

Letters: T tokens of one device, all its routing groups together; N their assignments; E all experts
of the layer, except in their weights on a device, where it is those that the device holds. Others
as in sharding.py.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import config as config_lib
from moe_jax import sharding
from moe_jax.kernels import experts as expert_kernels
from moe_jax.kernels.experts import Experts, ExpertWeights
from moe_jax.moe import counts, dispatch, exchange, routers
from moe_jax.moe.counts import Choices, MoeStats
from moe_jax.moe.routing import LayerInputs


def moe_on_device(
  x_BLD: jax.Array,
  inputs: LayerInputs,
  experts: ExpertWeights,
  moe: config_lib.MoE,
  *,
  train: bool,
  trace: bool,
) -> "MoEOutput":
  """The algorithm, on the tokens and the experts of one device. Arguments as of `on_mesh`."""
  dispatcher = dispatch.DISPATCHERS[moe.dispatch]
  mover = exchange.choose(moe.exchange, slots=dispatcher.slots)
  layout = dispatch.layout_of(moe, x_BLD.shape, train=train)
  with jax.named_scope("route"):  # 1. Who goes where, in order of priority.
    routing = routers.route(inputs, moe, layout.groups, capacity=layout.capacity, train=train)
  with jax.named_scope("dispatch"):  # 2. Tokens to rows.
    load = mover.prepare(x_BLD.reshape(layout.tokens, -1), routing.assignments, layout)
    rows = dispatcher.pack(*load)
  with jax.named_scope("exchange"):  # 3. Rows to the devices that hold their experts.
    trip = mover.send(rows, routing.assignments, layout)
  with jax.named_scope("experts"):  # 4. The experts.
    received = trip.received
    outputs = expert_kernels.experts(received.x, received.sizes_E, experts, moe.grouped_matmul)
  with jax.named_scope("exchange"):  # 5. Rows back to the devices of their tokens.
    returned = mover.bring_back(outputs, trip)
  with jax.named_scope("combine"):  # 6. Rows to tokens: the sum of a token's gated outputs.
    y_TD = dispatcher.combine(returned, load.assignments, trip.sent.slots, load.layout)
    y_TD, kept_N = mover.finish(y_TD, routing.assignments, trip)
    # Each device of `tensor` holds a part of F, so a partial sum. Tokens are fewer than rows.
    y_TD = exchange.sum_over("tensor", y_TD)
  with jax.named_scope("statistics"):
    stats = counts.local_sums(inputs, routing, kept_N, layout, drops=dispatcher.drops)
    stats = exchange.sum_over(sharding.BATCH_AXES, stats)
  choices = counts.choices(routing, kept_N, inputs.real_BL.shape) if trace else None
  return MoEOutput(y_TD.reshape(x_BLD.shape), stats, choices)


class MoEOutput(NamedTuple):
  y_BLD: jax.Array  # compute dtype; 0 at padding and at tokens that lost all their assignments
  stats: MoeStats  # of the whole mesh
  choices: Choices | None  # of each token, where a trace is asked for


class MoEWeights(NamedTuple):
  router: dict[str, jax.Array]  # float32 by name: router_DE, and the parameters of the RouterSpec
  bias_E: jax.Array  # float32, added to the scores for the selection; zeros without balancing
  experts: ExpertWeights  # compute dtype


def moe_layer(
  x_BLD: jax.Array,
  real_BL: jax.Array,
  ids_BL: jax.Array,
  weights: MoEWeights,
  moe: config_lib.MoE,
  key: jax.Array,
  *,
  train: bool,
  trace: bool = False,
) -> MoEOutput:
  """Routes tokens to experts and adds up the experts' outputs, on the mesh in force.

  Args:
    x_BLD: compute dtype, of the whole mesh.
    real_BL: bool, False at padding, which is routed and counted nowhere.
    ids_BL: int32 token ids, for routers that read them.
    weights: of the router and the experts.
    moe: the configuration of the layer.
    key: for jitter and noise.
    train: selects the capacity factor, jitter, and what the router does in training.
    trace: also return the choices of each token.
  """
  with jax.named_scope("router"):
    inputs = router_inputs(x_BLD, real_BL, ids_BL, weights, moe, key, train=train)
  return on_mesh(x_BLD, inputs, weights.experts, moe, train=train, trace=trace)


def on_mesh(
  x_BLD: jax.Array,
  inputs: LayerInputs,
  experts: ExpertWeights,
  moe: config_lib.MoE,
  *,
  train: bool,
  trace: bool = False,
) -> MoEOutput:
  """Runs `moe_on_device` on every device of the mesh in force, on its part of the arguments.

  On one device there is nothing to exchange and nothing to sum, so it is called without shard_map.

  Args:
    x_BLD: tokens, compute dtype; sequences are split over the batch axes.
    inputs: of the router, split likewise.
    experts: split over `expert` and `tensor`. A part on `fsdp` is gathered on entry.
    moe: router, dispatcher, capacity, group size and exchange.
    train: selects the capacity factor, and what the router does in training.
    trace: also return the choices of each token.
  """
  local = functools.partial(moe_on_device, moe=moe, train=train, trace=trace)
  if exchange.one_device():
    return local(x_BLD, inputs, experts)
  everywhere, batch = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec(sharding.BATCH_AXES)
  per_token = jax.tree.map(lambda _: batch, inputs)._replace(bias_E=everywhere)
  # Trees of specs, shaped as the arguments and the results are.
  of_experts = Experts._make(map(sharding.spec, ("EDF", "EDF", "EFD")))
  return jax.shard_map(
    local,
    in_specs=(batch, per_token, of_experts),
    out_specs=MoEOutput._make((batch, everywhere, batch)),
  )(x_BLD, inputs, experts)


def router_inputs(
  x_BLD: jax.Array,
  real_BL: jax.Array,
  ids_BL: jax.Array,
  weights: MoEWeights,
  moe: config_lib.MoE,
  key: jax.Array,
  *,
  train: bool,
) -> LayerInputs:
  """What the router reads: logits in router_dtype (Switch 2101.03961 section 2.4), and noise.

  Jitter and noise are drawn for the tokens of the whole mesh, so they do not depend on the mesh.
  """
  spec = routers.ROUTERS[moe.router]
  jitter_key, noise_key = jax.random.split(key)
  x_BLD = x_BLD.astype(jnp.float32)
  if train and moe.jitter:
    low, high = 1 - moe.jitter, 1 + moe.jitter
    jitter_BLD = jax.random.uniform(jitter_key, x_BLD.shape, jnp.float32, low, high)
    x_BLD = x_BLD * sharding.constrain(jitter_BLD, "BLD")

  def project(x_BLD: jax.Array, w_DE: jax.Array) -> jax.Array:
    return router_logits(x_BLD, w_DE, moe)

  logits_BLE = project(x_BLD, weights.router[routers.ROUTER_DE.name])
  noise_BLE, extra = None, {}
  if spec.noise is not None and (train or spec.noise_in_evaluation):
    noise_BLE = _by_batch(spec.noise(noise_key, logits_BLE.shape))
  if spec.extra is not None and spec.runs_own(train=train):
    extra = spec.extra(x_BLD, weights.router, project)
  return LayerInputs(logits_BLE, real_BL, ids_BL, weights.bias_E, noise_BLE, extra)


def router_logits(x_BLD: jax.Array, w_DE: jax.Array, moe: config_lib.MoE) -> jax.Array:
  """float32 [B, L, E], computed in router_dtype."""
  # "highest": an accelerator's default rounds float32 operands, and near ties change experts.
  x_BLD, w_DE = (a.astype(moe.router_dtype.value) for a in (x_BLD, w_DE))
  logits_BLE = jnp.einsum("BLD,DE->BLE", x_BLD, w_DE, precision="highest")
  return _by_batch(logits_BLE.astype(jnp.float32))


def _by_batch(x_BLE: jax.Array) -> jax.Array:
  # Every device needs the logits of all E experts for its own tokens, so E is not split here.
  return jax.lax.with_sharding_constraint(x_BLE, jax.sharding.PartitionSpec(sharding.BATCH_AXES))


class MoELayer(nnx.Module):
  """The parameters of a router and of E experts, and the layer on them."""

  def __init__(self, model: config_lib.Model, rngs: nnx.Rngs):
    moe = model.moe
    D, E, F = model.dim, moe.num_experts, moe.expert_dim
    self.moe = moe
    self.dtype = jnp.dtype(model.compute_dtype.value)
    init = jax.random.normal
    self.router_DE = nnx.Param(routers.ROUTER_DE.initial(rngs, {"D": D, "E": E}))
    self.gate_EDF = nnx.Param(D**-0.5 * init(rngs.params(), (E, D, F)))
    self.up_EDF = nnx.Param(D**-0.5 * init(rngs.params(), (E, D, F)))
    down_EFD = model.residual_scale * F**-0.5 * init(rngs.params(), (E, F, D))
    self.down_EFD = nnx.Param(down_EFD)
    for parameter in routers.ROUTERS[moe.router].parameters:
      setattr(self, parameter.name, nnx.Param(parameter.initial(rngs, {"D": D, "E": E})))

  def weights(self, dtype: jnp.dtype, bias_E: jax.Array) -> MoEWeights:
    """The weights as `moe_layer` takes them: of the experts in `dtype`, of the router in float32.

    Args:
      dtype: the compute dtype.
      bias_E: float32 balancing bias, which training keeps beside the parameters.
    """
    experts = Experts(*(w[...].astype(dtype) for w in (self.gate_EDF, self.up_EDF, self.down_EFD)))
    return MoEWeights(self.router(), bias_E, experts)

  def router(self) -> dict[str, jax.Array]:
    """The parameters of the router by name, float32."""
    parameters = (routers.ROUTER_DE, *routers.ROUTERS[self.moe.router].parameters)
    return {p.name: getattr(self, p.name)[...] for p in parameters}

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
  ) -> MoEOutput:
    """`moe_layer` with these parameters."""
    weights = self.weights(self.dtype, bias_E)
    return moe_layer(x_BLD, real_BL, ids_BL, weights, self.moe, key, train=train, trace=trace)
