"""The MoE feed-forward on a mesh: route locally, exchange tokens over `expert`, experts, and back.

The one file that names collective axes. On one device the same code runs and exchanges nothing, so
there is no second path to drift from this one. On a mesh shard_map's replication check stays on:
every statistic is reduced over the mesh explicitly.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from moe_jax import config as config_lib
from moe_jax import sharding
from moe_jax.config import Dispatch, Exchange
from moe_jax.kernels.experts import Experts
from moe_jax.kernels.experts import experts as run_experts
from moe_jax.moe import counts, dispatch, routers
from moe_jax.moe.counts import Choices, MoeStats
from moe_jax.moe.routers import RouterInputs, Routing


def moe_ffn(
  x_BLD: jax.Array,
  inputs: RouterInputs,
  experts: Experts,
  moe: config_lib.MoE,
  *,
  train: bool,
  trace: bool = False,
) -> tuple[jax.Array, MoeStats, Choices | None]:
  """Routes tokens to experts and combines their outputs, on the mesh in force.

  Args:
    x_BLD: tokens, compute dtype.
    inputs: the router's, with leading B, L in place of T; padding is routed and counted nowhere.
    experts: weights, sharded over `expert` and `tensor` (an fsdp shard is gathered on entry).
    moe: router, dispatcher, capacity, group size and exchange.
    train: picks the capacity factor, and the router's training behaviour.
    trace: also say where each token went.

  Returns:
    y_BLD, zero at padding and at tokens that lost all their assignments; global statistics; and
    the choices of each token, or None.
  """
  batch, tensor = PartitionSpec(sharding.BATCH_AXES), "tensor"
  per_token = jax.tree.map(lambda _: batch, inputs)._replace(bias_E=PartitionSpec())
  up, down = PartitionSpec("expert", None, tensor), PartitionSpec("expert", tensor, None)
  local_moe = functools.partial(_local_moe, moe=moe, train=train, trace=trace)
  if _one_device():
    return local_moe(x_BLD, inputs, experts)
  return jax.shard_map(
    local_moe,
    in_specs=(batch, per_token, Experts(up, up, down)),
    out_specs=(batch, PartitionSpec(), batch),
  )(x_BLD, inputs, experts)


def _one_device() -> bool:
  """Then there is nothing to sum, and XLA:CPU would copy every gradient in an all-reduce of one."""
  return jax.sharding.get_abstract_mesh().size == 1


def _sum_over(axes, x):
  return x if _one_device() else jax.lax.psum(x, axes)


def _expert_devices() -> int:
  return jax.sharding.get_abstract_mesh().shape["expert"]


def _local_moe(x_BLD, inputs, experts, *, moe, train, trace):
  B, L, D = x_BLD.shape
  E, T = moe.num_experts, moe.group_size or L
  M = B * L // T
  x_TD = x_BLD.reshape(-1, D)
  factor = moe.capacity_factor if train else moe.eval_capacity_factor
  capacity = dispatch.capacity(factor, T, moe.top_k, E)
  layout = dispatch.Layout(
    tokens=B * L, groups=M, num_experts=E, choices=routers.choices(moe),
    in_token_order=moe.priority is config_lib.Priority.TOKEN,
  )  # fmt: skip

  with jax.named_scope("route"):
    routing = route(inputs, moe, M, capacity=capacity, train=train)
  lost = jnp.zeros((), jnp.int32)
  if moe.dispatch is Dispatch.GROUPED:
    y_TD, kept_N = _dropless(x_TD, routing, experts, layout, moe)
    lost = jnp.sum(routing.real_N & ~kept_N, dtype=jnp.int32)
  else:
    y_TD, kept_N = _with_capacity(x_TD, routing, experts, layout, capacity, moe.dispatch)
  with jax.named_scope("statistics"):
    stats = counts.local_sums(inputs, routing, kept_N, lost, layout)
    stats = _sum_over(sharding.BATCH_AXES, stats)
  choices = counts.choices(routing, kept_N, B, L) if trace else None
  return y_TD.reshape(B, L, D), stats, choices


def route(inputs, moe, groups, *, capacity, train) -> Routing:
  """One routing of all this device's tokens; groups do not see each other."""
  router = functools.partial(routers.ROUTERS[moe.router], moe=moe, capacity=capacity, train=train)
  bias_E = inputs.bias_E

  def grouped(x_BL):
    return x_BL.reshape(groups, -1, *x_BL.shape[2:])

  per_group = jax.tree.map(grouped, inputs._replace(bias_E=None))
  return dispatch.flatten(jax.vmap(lambda group: router(group._replace(bias_E=bias_E)))(per_group))


def _with_capacity(x_TD, routing, experts, layout, capacity, how):
  """C slots per expert and group, as many to and from every device: fixed-size all-to-alls."""
  dispatcher = dispatch.DISPATCHERS[how]
  E = layout.num_experts
  with jax.named_scope("dispatch"):
    slots = None
    if how is not Dispatch.DENSE:
      slots = dispatch.capacity_slots(routing, E, layout.groups, capacity)
    x_SD = dispatcher.pack(x_TD, routing, slots, layout)
    x_ERD = _to_experts(x_SD.reshape(E, -1, x_SD.shape[-1]))
  with jax.named_scope("experts"):
    y_ERD = run_experts(x_ERD, None, experts, config_lib.GroupedMatmul.AUTO)
  with jax.named_scope("combine"):
    y_SD = _from_experts(y_ERD).reshape(x_SD.shape)
    # Each `tensor` device holds a part of F, so a partial sum; y is smaller than the slots.
    y_TD = _sum_over("tensor", dispatcher.combine(y_SD, routing, slots, layout))
  return y_TD, routing.real_N if slots is None else slots.kept_N


def _to_experts(x_ERD):
  """[E, rows of this device, D] -> [E of this device, rows of all devices of the axis, D]."""
  if _expert_devices() == 1:
    return x_ERD
  return jax.lax.all_to_all(x_ERD, "expert", split_axis=0, concat_axis=1, tiled=True)


def _from_experts(y_ERD):
  if _expert_devices() == 1:
    return y_ERD
  return jax.lax.all_to_all(y_ERD, "expert", split_axis=1, concat_axis=0, tiled=True)


def _dropless(x_TD, routing, experts, layout, moe):
  """Every assignment computed, in rows sorted by expert: (y_TD, kept_N)."""
  exchange = moe.exchange
  if exchange is Exchange.AUTO:
    on_tpu = jax.default_backend() == "tpu"
    exchange = Exchange.RAGGED if on_tpu else Exchange.ALL_GATHER
  if _expert_devices() == 1:
    y_TD, kept_N = _grouped(x_TD, routing, experts, layout, moe.grouped_matmul), routing.real_N
  else:
    y_TD, kept_N = _EXCHANGES[exchange](x_TD, routing, experts, layout, moe)
  return _sum_over("tensor", y_TD), kept_N


def _grouped(x_TD, routing, experts, layout, backend):
  """The experts of this device on the real assignments of `routing`, whose ids are local."""
  with jax.named_scope("dispatch"):
    slots, sizes_E = dispatch.sorted_slots(routing, layout.num_experts)
    x_ND = dispatch.gather_pack(x_TD, routing, slots, layout)
  with jax.named_scope("experts"):
    y_ND = run_experts(x_ND, sizes_E, experts, backend)
  with jax.named_scope("combine"):
    return dispatch.gather_combine(y_ND, routing, slots, layout)


def _grouped_rows(x_RD, expert_R, experts, backend):
  """The experts of this device on received rows; an expert of -1 marks an empty row."""
  R, num_experts = x_RD.shape[0], experts.gate_EDF.shape[0]
  ones_R = jnp.ones((R,), jnp.float32)
  rows = Routing(jnp.arange(R, dtype=jnp.int32), expert_R, ones_R, expert_R >= 0, None, None)
  layout = dispatch.Layout(R, 1, num_experts, choices=1, in_token_order=True)
  return _grouped(x_RD, rows, experts, layout, backend)


def _buffer_rows(factor, fair, most):
  return min(most, max(1, math.ceil(factor * fair - 1e-6))) if factor else most


def _dropless_all_gather(x_TD, routing, experts, layout, moe):
  """Every device of the axis sees all their tokens, and does what its own experts are asked for."""
  X, here = _expert_devices(), jax.lax.axis_index("expert")
  local_experts = layout.num_experts // X
  with jax.named_scope("exchange"):
    sent = routing._replace(probs_TE=None, load_TE=None)
    sent = sent._replace(token_N=routing.token_N + here * layout.tokens)
    x_TD, sent = jax.lax.all_gather((x_TD, sent), "expert", tiled=True)
  expert_N = sent.expert_N - here * local_experts
  mine_N = (expert_N >= 0) & (expert_N < local_experts)
  mine = sent._replace(expert_N=expert_N, real_N=sent.real_N & mine_N)
  local = layout._replace(tokens=X * layout.tokens, num_experts=local_experts)
  y_TD = _grouped(x_TD, mine, experts, local, moe.grouped_matmul)
  with jax.named_scope("exchange"):
    y_TD = jax.lax.psum_scatter(y_TD, "expert", scatter_dimension=0, tiled=True)
  return y_TD, routing.real_N


def _dropless_all_to_all(x_TD, routing, experts, layout, moe):
  """A buffer of fixed size to each device of the axis; an assignment that does not fit is lost."""
  X = _expert_devices()
  local_experts = layout.num_experts // X
  N = routing.token_N.shape[0]
  with jax.named_scope("dispatch"):
    to_device = routing._replace(expert_N=routing.expert_N // local_experts)
    rows = _buffer_rows(moe.exchange_factor, N / X, N)
    slots = dispatch.capacity_slots(to_device, X, 1, rows)
    x_SD = dispatch.gather_pack(x_TD, routing, slots, layout)
    expert_N = routing.expert_N % local_experts
    expert_S = expert_N.at[slots.assignment_S].get(mode="fill", fill_value=-1)
  with jax.named_scope("exchange"):
    x_RD, expert_R = jax.lax.all_to_all((x_SD, expert_S), "expert", 0, 0, tiled=True)
  y_RD = _grouped_rows(x_RD, expert_R, experts, moe.grouped_matmul)
  with jax.named_scope("exchange"):
    y_SD = jax.lax.all_to_all(y_RD, "expert", 0, 0, tiled=True)
  with jax.named_scope("combine"):
    return dispatch.gather_combine(y_SD, routing, slots, layout), slots.kept_N


class RaggedPlan(NamedTuple):
  """One device's part in the exchange of rows sorted by expert; X devices, R rows received."""

  send_start_X: jax.Array  # int32, where the rows for each device begin here
  send_X: jax.Array  # int32, how many of them fit there
  at_receiver_X: jax.Array  # int32, where they arrive there
  receive_start_X: jax.Array  # int32, where the rows of each device arrive here
  receive_X: jax.Array  # int32
  at_sender_X: jax.Array  # int32, where they had begun there
  expert_R: jax.Array  # int32, the local expert of each row received; -1 past the last


def ragged_plan(counts_XXE: jax.Array, here: jax.Array, rows: int) -> RaggedPlan:
  """Who sends what where.

  Args:
    counts_XXE: int32 rows from each source to each destination's local experts.
    here: this device's index.
    rows: size of every device's buffer; what does not fit is not sent.
  """
  sizes_XX = jnp.sum(counts_XXE, axis=2)
  source_start_XX = jnp.cumsum(sizes_XX, axis=1) - sizes_XX
  arrive_XX = jnp.cumsum(sizes_XX, axis=0) - sizes_XX
  fits_XX = jnp.clip(rows - arrive_XX, 0, sizes_XX)
  arrive_XX = jnp.minimum(arrive_XX, rows)
  # Rows arrive by source, and from each source by expert.
  row_R = jnp.arange(rows)
  ends = jnp.cumsum(counts_XXE[:, here].reshape(-1))
  expert_R = jnp.searchsorted(ends, row_R, side="right") % counts_XXE.shape[2]
  return RaggedPlan(
    send_start_X=source_start_XX[here],
    send_X=fits_XX[here],
    at_receiver_X=arrive_XX[here],
    receive_start_X=arrive_XX[:, here],
    receive_X=fits_XX[:, here],
    at_sender_X=source_start_XX[:, here],
    expert_R=jnp.where(row_R < ends[-1], expert_R, -1).astype(jnp.int32),
  )


def _dropless_ragged(x_TD, routing, experts, layout, moe):
  """Only routed rows travel; a device's buffer holds exchange_factor times its fair share."""
  X = _expert_devices()
  local_experts = layout.num_experts // X
  N = routing.token_N.shape[0]
  with jax.named_scope("dispatch"):
    slots, sizes_E = dispatch.sorted_slots(routing, layout.num_experts)
    x_ND = dispatch.gather_pack(x_TD, routing, slots, layout)
  with jax.named_scope("exchange"):
    counts_XXE = jax.lax.all_gather(sizes_E.reshape(X, local_experts), "expert")
    rows = _buffer_rows(moe.exchange_factor, N, N * X)
    plan = ragged_plan(counts_XXE, jax.lax.axis_index("expert"), rows)
    x_RD = jax.lax.ragged_all_to_all(
      x_ND, jnp.zeros_like(x_ND, shape=(rows, x_ND.shape[1])), plan.send_start_X, plan.send_X,
      plan.at_receiver_X, plan.receive_X, axis_name="expert",
    )  # fmt: skip
  y_RD = _grouped_rows(x_RD, plan.expert_R, experts, moe.grouped_matmul)
  with jax.named_scope("exchange"):
    y_ND = jax.lax.ragged_all_to_all(
      y_RD, jnp.zeros_like(y_RD, shape=x_ND.shape), plan.receive_start_X, plan.receive_X,
      plan.at_sender_X, plan.send_X, axis_name="expert",
    )  # fmt: skip
  with jax.named_scope("combine"):
    device_N = routing.expert_N // local_experts
    sent_N = slots.slot_N - plan.send_start_X[device_N] < plan.send_X[device_N]
    kept_N = routing.real_N & sent_N
    slots = slots._replace(slot_N=jnp.where(kept_N, slots.slot_N, N))
    return dispatch.gather_combine(y_ND, routing, slots, layout), kept_N


_EXCHANGES = {
  Exchange.ALL_GATHER: _dropless_all_gather,
  Exchange.ALL_TO_ALL: _dropless_all_to_all,
  Exchange.RAGGED: _dropless_ragged,
}
