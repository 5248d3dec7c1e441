"""Exchanges: move rows to the devices that hold their experts, and bring the outputs back.

Only this file, kernels/gathered.py, which gathers weights, and kernels/cross_entropy.py, which sums
over the parts of a vocabulary, name collectives. The `expert` axis has X devices; each holds J =
E/X of the E experts and its own T tokens with N assignments. The drawings show X = 2 devices, E = 4
experts, so J = 2: device 0 holds experts a and b, device 1 holds c and d. `a0` is a row for expert
a from device 0. Sizes are those of one device. shard_map's replication check stays on, so every
statistic must be summed over the mesh.

Letters: T, N, E, X, J as above; W tokens of all X devices, V their assignments; S rows that a
device sends; R rows that it has room to receive; C slots of an expert in all routing groups.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.config import Exchange
from moe_jax.kernels import platform
from moe_jax.kernels.layout import stored
from moe_jax.moe import dispatch
from moe_jax.moe.dispatch import ExpertRows, Layout
from moe_jax.moe.routing import Assignments


class Packing(NamedTuple):
  """What a device packs, and for which tokens it will sum."""

  x_TD: jax.Array
  assignments: Assignments
  layout: Layout


class Order(NamedTuple):
  """How a device sorted the rows that it received by their expert."""

  arrived: Assignments  # one for each row, in the order of arrival
  layout: Layout


class Sent(NamedTuple):
  """The rows of one device before and after they were sent, and the way back."""

  rows: ExpertRows  # as packed; an assignment that did not fit the buffer has lost its slot
  received: ExpertRows  # for the J experts of this device
  order: Order | None = None  # None where rows arrive in their order
  plan: "RaggedPlan | None" = None  # of the ragged exchange


# (x_TD, assignments, layout) of a device -> what the device packs
Prepare = Callable[[jax.Array, Assignments, Layout], Packing]
# (packed rows, and the assignments and layout that Prepare took) -> rows at their experts
Send = Callable[[ExpertRows, Assignments, Layout], Sent]
# (outputs, shaped as received.x) -> outputs, shaped as rows.x
BringBack = Callable[[jax.Array, Sent], jax.Array]
# (gated sums for the tokens of Packing, assignments) -> y_TD and bool kept_N of the device's tokens
Finish = Callable[[jax.Array, Assignments, Sent], tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExchangeSpec:
  """The four steps of one exchange. By default tokens and rows stay on their device.

  `send` and `bring_back` move rows. `prepare` and `finish` are for an exchange that moves tokens
  instead, or that needs rows in another layout than by expert.
  """

  prepare: Prepare = Packing
  send: Send = lambda rows, assigned, layout: Sent(rows, rows)
  bring_back: BringBack = lambda y, sent: y
  finish: Finish = lambda y_TD, assigned, sent: (y_TD, sent.rows.slots.kept_N)


def steps_in_force(exchange: Exchange, *, slots: bool) -> ExchangeSpec:
  """Returns the exchange for the mesh in force.

  Args:
    exchange: the config's choice, which applies to sorted rows.
    slots: whether rows are slots, for which there is one exchange.
  """
  if _expert_devices() == 1:
    return STAY
  if slots:
    return SLOTS
  if exchange is Exchange.AUTO:
    exchange = platform.default_exchange()
  return EXCHANGES[exchange]


def one_device() -> bool:
  """Returns whether the mesh in force has one device, which has nothing to exchange or to sum."""
  return jax.sharding.get_abstract_mesh().size == 1


def sum_over(axes: str | tuple[str, ...], x: Any) -> Any:
  """Returns the tree `x` with every array summed over the devices of these mesh axes."""
  return x if one_device() else jax.lax.psum(x, axes)


def once_over(axis: str, x: jax.Array) -> jax.Array:
  """Returns x on the first device of a mesh axis, and zeros on the others: their sum is x."""
  return x if one_device() else jnp.where(jax.lax.axis_index(axis) == 0, x, 0)


def _expert_devices() -> int:
  return jax.sharding.get_abstract_mesh().shape["expert"]


def _send_slots(rows: ExpertRows, assigned: Assignments, layout: Layout) -> Sent:
  """Sends every device equally many slots, in one all_to_all of fixed size.

      device 0  [a0 b0 c0 d0]            [a0 a1 b0 b1]
                               all_to_all
      device 1  [a1 b1 c1 d1]            [c0 c1 d0 d1]

  [E, C, D] -> [J, X, C, D], or [1, X*C, D]; each of a0, ... stands for C slots. Devices split and
  join dimension 0 in both directions, and rows stay in memory in the order in which they arrive,
  which the experts' matmul reads and writes as well: a TPU copies all slots to another one.
  """

  def sent(x: jax.Array) -> jax.Array:
    x = jax.lax.all_to_all(x, "expert", 0, 0, tiled=True)  # by source, then by expert
    parted = x.reshape(_expert_devices(), -1, *x.shape[1:])
    if parted.shape[1] == 1:  # a matmul of fewer dimensions takes 4% fewer cycles
      return parted.reshape(1, -1, *x.shape[2:])
    return stored(parted.swapaxes(0, 1), 1, 0, *range(2, parted.ndim))

  gate = None if rows.gate is None else sent(rows.gate)
  return Sent(rows, rows._replace(x=sent(rows.x), gate=gate))


def _bring_back_slots(y: jax.Array, sent: Sent) -> jax.Array:
  if y.ndim == 4:
    y = stored(y, 1, 0, 2, 3).swapaxes(0, 1)
  return jax.lax.all_to_all(y.reshape(sent.rows.x.shape), "expert", 0, 0, tiled=True)


def _all_tokens(x_TD: jax.Array, assigned: Assignments, layout: Layout) -> Packing:
  """Gathers all tokens on every device, which packs only the assignments to its own experts.

      device 0  tokens 0             tokens 0 1 -> [a0 a1 b0 b1] -> sums 0 1                 sums 0
                         all_gather                                          reduce-scatter
      device 1  tokens 1             tokens 0 1 -> [c0 c1 d0 d1] -> sums 0 1                 sums 1

  [T, D] and [N] -> [X*T, D] and [X*N]; X*N rows are packed, empty for other devices' experts.
  `_own_sums` is the reduce-scatter.
  """
  X, here = _expert_devices(), jax.lax.axis_index("expert")
  own_experts = layout.experts // X
  with jax.named_scope("exchange"):
    renumbered = assigned._replace(token_N=assigned.token_N + here * layout.tokens)
    x_WD, gathered = jax.lax.all_gather((x_TD, renumbered), "expert", tiled=True)
  expert_V = gathered.expert_N - here * own_experts
  own_V = gathered.real_N & (expert_V >= 0) & (expert_V < own_experts)
  own_layout = layout._replace(tokens=X * layout.tokens, experts=own_experts)
  return Packing(x_WD, gathered._replace(expert_N=expert_V, real_N=own_V), own_layout)


def _own_sums(y_WD: jax.Array, assigned: Assignments, sent: Sent) -> tuple[jax.Array, jax.Array]:
  with jax.named_scope("exchange"):
    y_TD = jax.lax.psum_scatter(y_WD, "expert", scatter_dimension=0, tiled=True)
  return y_TD, assigned.real_N


def _by_device(x_TD: jax.Array, assigned: Assignments, layout: Layout) -> Packing:
  """Prepares assignments so that they are packed by destination device, not by expert.

  Each device gets a buffer of equally many slots.
  """
  X, N = _expert_devices(), assigned.token_N.shape[0]
  device_N = assigned.expert_N // (layout.experts // X)
  slots = _buffer_rows(layout.exchange_factor, N / X, N)
  buffers = layout._replace(slots=True, experts=X, groups=1, capacity=slots)
  return Packing(x_TD, assigned._replace(expert_N=device_N), buffers)


def _send_buffers(rows: ExpertRows, assigned: Assignments, layout: Layout) -> Sent:
  """Sends every device a buffer of fixed size; rows that do not fit it are lost and counted.

      device 0  [a0 b0 a0 .][d0 . . .]            [a0 b0 a0 .][b1 . . .]
                                       all_to_all
      device 1  [b1 . . .][c1 d1 c1 d1]           [d0 . . .][c1 d1 c1 d1]

  [X, S/X, D] -> [X, S/X, D]; then sorted by expert. A buffer has S/X = exchange_factor * N/X rows,
  or N where the factor is 0. Each row's expert is sent with the row.
  """
  own_experts = layout.experts // _expert_devices()
  expert_N = assigned.expert_N % own_experts
  expert_S = expert_N.at[rows.slots.assignment_S].get(mode="fill", fill_value=-1)
  x_SD = rows.x.reshape(-1, rows.x.shape[-1])
  x_RD, expert_R = jax.lax.all_to_all((x_SD, expert_S), "expert", 0, 0, tiled=True)
  received, order = _sort_received(x_RD, expert_R, own_experts)
  return Sent(rows, received, order)


def _bring_back_buffers(y_RD: jax.Array, sent: Sent) -> jax.Array:
  return jax.lax.all_to_all(_unsort(y_RD, sent), "expert", 0, 0, tiled=True)


def _sort_received(
  x_RD: jax.Array, expert_R: jax.Array, own_experts: int
) -> tuple[ExpertRows, Order]:
  """Sorts received rows by this device's experts; an expert of -1 marks an empty row.

  Returns:
    The sorted rows, and how they were sorted.
  """
  R = x_RD.shape[0]
  arrived = Assignments(
    token_N=jnp.arange(R, dtype=jnp.int32),
    expert_N=expert_R,
    gate_N=jnp.ones((R,), jnp.float32),
    real_N=expert_R >= 0,
  )
  layout = Layout(
    tokens=R,
    groups=1,
    experts=own_experts,
    capacity=0,
    slots=False,
    choices=1,
    in_token_order=True,
    exchange_factor=0.0,
  )
  return dispatch.gather_pack(x_RD, arrived, layout), Order(arrived, layout)


def _unsort(y_RD: jax.Array, sent: Sent) -> jax.Array:
  """Returns outputs in the order in which their rows arrived."""
  assert sent.order is not None
  arrived, layout = sent.order
  return dispatch.gather_combine(y_RD, arrived, sent.received.slots, layout)


def _buffer_rows(factor: float, fair: float, most: int) -> int:
  """Returns `factor` times the fair share, at least 1 and at most `most`; factor 0 means `most`."""
  return max(1, math.ceil(min(factor * fair, most) - 1e-6)) if factor else most


class RaggedPlan(NamedTuple):
  """One device's part in the exchange of rows sorted by expert."""

  send_start_X: jax.Array  # int32, first row for each device, in this device's rows
  send_X: jax.Array  # int32, number of rows sent to each device: those that fit its buffer
  at_receiver_X: jax.Array  # int32, first place of these rows in each receiver's buffer
  receive_start_X: jax.Array  # int32, first place of each sender's rows in this device's buffer
  receive_X: jax.Array  # int32, number of rows received from each device
  at_sender_X: jax.Array  # int32, first of these rows among each sender's rows
  expert_R: jax.Array  # int32, the local expert of each row received; -1 past the last


def ragged_plan(counts_XXJ: jax.Array, here: jax.Array | int, rows: int) -> RaggedPlan:
  """Computes which rows each device sends to each other one, and where they arrive.

  Args:
    counts_XXJ: int32, number of rows from each source device to each expert of each destination.
    here: this device's index on the axis.
    rows: R, size of every device's buffer; rows that do not fit are not sent.
  """
  sizes_XX = jnp.sum(counts_XXJ, axis=2)
  source_start_XX = jnp.cumsum(sizes_XX, axis=1) - sizes_XX
  arrive_XX = jnp.cumsum(sizes_XX, axis=0) - sizes_XX
  fits_XX = jnp.clip(rows - arrive_XX, 0, sizes_XX)
  arrive_XX = jnp.minimum(arrive_XX, rows)
  # Rows arrive ordered by source, and those of one source by expert.
  row_R = jnp.arange(rows)
  ends = jnp.cumsum(counts_XXJ[:, here].reshape(-1))
  expert_R = jnp.searchsorted(ends, row_R, side="right") % counts_XXJ.shape[2]
  return RaggedPlan(
    send_start_X=source_start_XX[here],
    send_X=fits_XX[here],
    at_receiver_X=arrive_XX[here],
    receive_start_X=arrive_XX[:, here],
    receive_X=fits_XX[:, here],
    at_sender_X=source_start_XX[:, here],
    expert_R=jnp.where(row_R < ends[-1], expert_R, -1).astype(jnp.int32),
  )


def _send_ragged(rows: ExpertRows, assigned: Assignments, layout: Layout) -> Sent:
  """Sends only filled rows, into a buffer of fixed size; rows that do not fit are lost and counted.

      device 0  [a0 a0 b0 d0]                     [a0 a0 b0 b1 . . .]
                               ragged_all_to_all
      device 1  [b1 c1 c1 d1]                     [d0 c1 c1 d1 . . .]

  [N, D] -> [R, D]; then sorted by expert. R = exchange_factor * N, or X*N where the factor is 0.
  """
  assert rows.sizes_E is not None
  X, N = _expert_devices(), assigned.token_N.shape[0]
  own_experts = layout.experts // X
  counts_XXJ = jax.lax.all_gather(rows.sizes_E.reshape(X, own_experts), "expert")
  room = _buffer_rows(layout.exchange_factor, N, N * X)
  plan = ragged_plan(counts_XXJ, jax.lax.axis_index("expert"), room)
  x_RD = jax.lax.ragged_all_to_all(
    rows.x,
    jnp.zeros_like(rows.x, shape=(room, rows.x.shape[1])),
    plan.send_start_X,
    plan.send_X,
    plan.at_receiver_X,
    plan.receive_X,
    axis_name="expert",
  )
  received, order = _sort_received(x_RD, plan.expert_R, own_experts)
  device_N = assigned.expert_N // own_experts
  fits_N = rows.slots.slot_N - plan.send_start_X[device_N] < plan.send_X[device_N]
  kept_N = assigned.real_N & fits_N
  slots = rows.slots._replace(slot_N=jnp.where(kept_N, rows.slots.slot_N, N), kept_N=kept_N)
  return Sent(rows._replace(slots=slots), received, order, plan)


def _bring_back_ragged(y_RD: jax.Array, sent: Sent) -> jax.Array:
  plan, y_RD = sent.plan, _unsort(y_RD, sent)
  assert plan is not None
  return jax.lax.ragged_all_to_all(
    y_RD,
    jnp.zeros_like(y_RD, shape=sent.rows.x.shape),
    plan.receive_start_X,
    plan.receive_X,
    plan.at_sender_X,
    plan.send_X,
    axis_name="expert",
  )


STAY = ExchangeSpec()
SLOTS = ExchangeSpec(send=_send_slots, bring_back=_bring_back_slots)
EXCHANGES = {
  Exchange.ALL_GATHER: ExchangeSpec(prepare=_all_tokens, finish=_own_sums),
  Exchange.ALL_TO_ALL: ExchangeSpec(
    prepare=_by_device, send=_send_buffers, bring_back=_bring_back_buffers
  ),
  Exchange.RAGGED: ExchangeSpec(send=_send_ragged, bring_back=_bring_back_ragged),
}
