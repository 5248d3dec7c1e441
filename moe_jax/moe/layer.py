"""The Mixture-of-Experts layer: the algorithm, its entry on a mesh, and the parameters.

Letters: T tokens of one device, all its routing groups together; N their assignments; W tokens
whose rows a device sums; E all experts of the layer, except in the expert weights on a device,
where E counts the experts that the device holds. sharding.py lists the others.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import sharding
from moe_jax.config import Model, MoE
from moe_jax.kernels import activation, context, gathered
from moe_jax.kernels import experts as expert_kernels
from moe_jax.kernels.autodiff import vary
from moe_jax.kernels.experts import Experts, ExpertWeights
from moe_jax.moe import chunks, counts, dispatch, exchange, routers, routing
from moe_jax.moe.counts import Choices, MoeStats
from moe_jax.moe.dispatch import ExpertRows, Layout
from moe_jax.moe.routing import Assignments, LayerInputs, Mode, Tokens


def moe_on_device(
  x_BLD: jax.Array, inputs: LayerInputs, experts: ExpertWeights, model: Model, mode: Mode
) -> "MoEOutput":
  """Runs the algorithm on the tokens and the experts of one device.

  The arguments are those of `on_mesh`, in the sizes of one device.
  """
  moe = model.moe
  dispatcher = dispatch.DISPATCHERS[moe.dispatch]
  steps = exchange.steps_in_force(moe.exchange, slots=dispatcher.slots)
  layout = dispatch.layout_of(moe, x_BLD.shape, train=mode.train)
  with jax.named_scope("route"):  # 1. Who goes where, in order of priority.
    chosen = routers.route(inputs, moe, layout.groups, capacity=layout.capacity, train=mode.train)

  def way(
    x_TD: jax.Array, assigned: Assignments, experts: ExpertWeights, layout: Layout
  ) -> tuple[jax.Array, jax.Array]:
    with jax.named_scope("dispatch"):  # 2. Tokens to rows.
      packing = steps.prepare(x_TD, assigned, layout)
      rows = dispatcher.pack(*packing)
    with jax.named_scope("exchange"):  # 3. Rows to the devices that hold their experts.
      sent = steps.send(rows, assigned, layout)
    with jax.named_scope("experts"):  # 4. The experts.
      outputs = _experts(sent.received, experts, model)
    with jax.named_scope("exchange"):  # 5. Rows back to the devices of their tokens.
      returned = steps.bring_back(outputs, sent)
    with jax.named_scope("combine"):  # 6. Rows to tokens: the sum of a token's gated outputs.
      y_WD = dispatcher.combine(returned, packing.assignments, sent.rows.slots, packing.layout)
      return steps.finish(y_WD, assigned, sent)

  x_TD = x_BLD.reshape(layout.tokens, -1)
  y_TD, kept_N = chunks.run(way, moe, x_TD, chosen.assignments, experts, layout)
  with jax.named_scope("combine"):
    # Each device of `tensor` holds a part of F, so its y_TD is a partial sum. It is summed here and
    # not before combining, because there are fewer tokens than rows.
    y_TD = exchange.sum_over("tensor", y_TD)
  with jax.named_scope("statistics"):
    stats = counts.local_sums(inputs, chosen, kept_N, layout, drops=dispatcher.drops)
    stats = exchange.sum_over(sharding.BATCH_AXES, stats)
  choices = counts.trace_choices(chosen, kept_N, inputs.real_BL.shape) if mode.trace else None
  return MoEOutput(y_TD.reshape(x_BLD.shape), stats, choices)


def _experts(received: ExpertRows, experts: ExpertWeights, model: Model) -> jax.Array:
  """Returns the experts' outputs of rows, in the shape of the rows."""
  if isinstance(experts, Experts) and experts.down_bias_ED is not None:
    # The devices of `tensor` add up their outputs in step 6, but the bias counts once.
    experts = experts._replace(down_bias_ED=exchange.once_over("tensor", experts.down_bias_ED))
  kernel, function = model.moe.grouped_matmul, activation.nonlinearity(model)
  return expert_kernels.experts(
    received.x, received.sizes_E, experts, kernel, function, received.gate
  )


class MoEOutput(NamedTuple):
  """What the layer returns: of one device from `moe_on_device`, of the whole mesh otherwise."""

  y_BLD: jax.Array  # compute dtype; 0 at padding and at tokens that lost all their assignments
  stats: MoeStats  # summed over the whole mesh
  choices: Choices | None  # the experts of each token; None unless `trace` is set


class MoEWeights(NamedTuple):
  """The weights of one layer, of the whole mesh."""

  router: dict[str, jax.Array]  # float32 by name: router_DE, and the parameters of the RouterSpec
  bias_E: jax.Array  # float32, added to the scores for the selection; zeros without balancing
  experts: ExpertWeights  # compute dtype


def moe_layer(
  x_BLD: jax.Array,
  tokens: Tokens,
  weights: MoEWeights,
  model: Model,
  key: jax.Array,
  mode: Mode,
) -> MoEOutput:
  """Routes tokens to experts and adds up the experts' outputs, on the mesh in force.

  Args:
    x_BLD: tokens of the whole mesh, compute dtype.
    tokens: ids for routers that read them; and what is padding, which is neither routed nor
      counted. What stands there, in any array, changes nothing, but must be finite: gradients
      multiply it by 0.
    weights: the weights of the router and the experts.
    model: the configuration.
    key: the random key of jitter and noise.
    mode: whether it is training, and whether to return the experts of each token.
  """
  with jax.named_scope("router"):
    inputs = router_inputs(x_BLD, tokens, weights, model.moe, key, train=mode.train)
  return on_mesh(x_BLD, inputs, weights.experts, model, mode)


def on_mesh(
  x_BLD: jax.Array, inputs: LayerInputs, experts: ExpertWeights, model: Model, mode: Mode
) -> MoEOutput:
  """Runs `moe_on_device` on every device of the mesh in force, on its part of the arguments.

  A single device has nothing to exchange or to sum, so it calls `moe_on_device` without shard_map.

  Args:
    x_BLD: tokens of the whole mesh, compute dtype; sequences are split over the batch axes.
    inputs: what the router reads, split over the batch axes too.
    experts: split over `expert`, `tensor`, and `fsdp`, over which each device gathers its own.
    model: the configuration.
    mode: whether it is training, and whether to return the experts of each token.
  """
  local = functools.partial(moe_on_device, model=model, mode=mode)
  if exchange.one_device():
    return local(x_BLD, inputs, experts)
  # Any, because the trees of specs have the types of the arrays that the specs are for.
  everywhere: Any = jax.sharding.PartitionSpec()
  batch: Any = jax.sharding.PartitionSpec(sharding.BATCH_AXES)
  per_token = jax.tree.map(lambda _: batch, inputs)._replace(bias_E=everywhere)
  assert isinstance(experts, Experts)
  mesh = jax.sharding.get_abstract_mesh()
  expert_specs: Any = {
    name: None if weight is None else sharding.param_spec(name, weight.shape, mesh)
    for name, weight in experts._asdict().items()
  }

  def gathered_first(x_BLD: jax.Array, inputs: LayerInputs, experts: Experts) -> MoEOutput:
    # Here, so that the gradient is summed over `tensor` for tokens and not for their rows.
    x_BLD = vary(x_BLD, frozenset(("tensor",)))
    return local(x_BLD, inputs, gathered.gathered_experts(experts, model.gradient_sums))

  return jax.shard_map(
    gathered_first,
    in_specs=(batch, per_token, Experts(**expert_specs)),
    out_specs=MoEOutput(y_BLD=batch, stats=everywhere, choices=batch),
  )(x_BLD, inputs, experts)


def router_inputs(
  x_BLD: jax.Array,
  tokens: Tokens,
  weights: MoEWeights,
  moe: MoE,
  key: jax.Array,
  *,
  train: bool,
) -> LayerInputs:
  """Computes what the router reads: logits in router_dtype (Switch 2101.03961 section 2.4), noise.

  The arguments are those of `moe_layer`. Jitter and noise are drawn for all tokens of the mesh at
  once, so they do not depend on how many devices the mesh has.
  """
  spec = routers.ROUTERS[moe.router]
  jitter_key, noise_key = jax.random.split(key)
  x_BLD = x_BLD.astype(jnp.float32)
  if train and moe.jitter:
    low, high = 1 - moe.jitter, 1 + moe.jitter
    uniform = functools.partial(jax.random.uniform, jitter_key, minval=low, maxval=high)
    jitter_BLD = context.drawn(uniform, x_BLD.shape)
    x_BLD = x_BLD * sharding.constrain(jitter_BLD, "BLD")

  def project(x_BLD: jax.Array, w_DE: jax.Array) -> jax.Array:
    return router_logits(x_BLD, w_DE, moe)

  logits_BLE = project(x_BLD, weights.router[routing.ROUTER_DE.name])
  if moe.router_bias:
    logits_BLE += weights.router[routing.ROUTER_BIAS_E.name].reshape(1, 1, -1)
  noise_BLE, extra = None, {}
  if spec.noise is not None and (train or spec.noise_in_evaluation):
    noise = functools.partial(spec.noise, noise_key)
    noise_BLE = _by_batch(context.drawn(noise, logits_BLE.shape))
  if spec.extra is not None and spec.runs_own(train=train):
    extra = spec.extra(x_BLD, weights.router, project)
  return LayerInputs(
    logits_BLE=logits_BLE,
    real_BL=tokens.real_BL,
    ids_BL=tokens.ids_BL,
    bias_E=weights.bias_E,
    noise_BLE=noise_BLE,
    extra=extra,
  )


def router_logits(x_BLD: jax.Array, w_DE: jax.Array, moe: MoE) -> jax.Array:
  """Returns the product of x_BLD and w_DE, computed in router_dtype, as float32 [B, L, E]."""
  # precision="highest", because an accelerator rounds float32 operands by default, and rounding
  # changes which expert wins a near tie.
  x_BLD, w_DE = (a.astype(moe.router_dtype.value) for a in (x_BLD, w_DE))
  logits_BLE = jnp.einsum("BLD,DE->BLE", x_BLD, w_DE, precision="highest")
  return _by_batch(logits_BLE.astype(jnp.float32))


def _by_batch(x_BLE: jax.Array) -> jax.Array:
  # Every device needs the logits of all E experts for its own tokens, so E is not split here.
  return jax.lax.with_sharding_constraint(x_BLE, jax.sharding.PartitionSpec(sharding.BATCH_AXES))


class MoELayer(nnx.Module):
  """The parameters of a router and of E experts."""

  def __init__(self, model: Model, rngs: nnx.Rngs):
    moe = model.moe
    D, E, F = model.dim, moe.num_experts, moe.expert_dim
    self.moe = moe
    init = jax.random.normal
    self.router_DE = nnx.Param(routing.ROUTER_DE.initial(rngs, {"D": D, "E": E}))
    if model.gated:
      self.gate_EDF = nnx.Param(D**-0.5 * init(rngs.params(), (E, D, F)))
    self.up_EDF = nnx.Param(D**-0.5 * init(rngs.params(), (E, D, F)))
    down_EFD = model.residual_scale * F**-0.5 * init(rngs.params(), (E, F, D))
    self.down_EFD = nnx.Param(down_EFD)
    if moe.expert_bias:
      if model.gated:
        self.gate_bias_EF = nnx.Param(jnp.zeros((E, F)))
      self.up_bias_EF = nnx.Param(jnp.zeros((E, F)))
      self.down_bias_ED = nnx.Param(jnp.zeros((E, D)))
    for parameter in routers.router_parameters(moe):
      if parameter is not routing.ROUTER_DE:
        setattr(self, parameter.name, nnx.Param(parameter.initial(rngs, {"D": D, "E": E})))

  def weights(self, dtype: jnp.dtype, bias_E: jax.Array) -> MoEWeights:
    """Returns the weights for `moe_layer`: experts in `dtype`, the router in float32.

    Args:
      dtype: the compute dtype.
      bias_E: float32 balancing bias, which the train state holds beside the parameters.
    """

    def weight(name: str) -> Any:
      return getattr(self, name)[...].astype(dtype) if hasattr(self, name) else None

    experts = Experts(*map(weight, Experts._fields))
    return MoEWeights(self.router(), bias_E, experts)

  def router(self) -> dict[str, jax.Array]:
    """Returns the float32 parameters of the router by name."""
    return {p.name: getattr(self, p.name)[...] for p in routers.router_parameters(self.moe)}
