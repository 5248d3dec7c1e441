"""Dispatch: lays out tokens in rows for the experts, and adds up the outputs of each token.

Rows are either C slots for each expert and routing group, where an assignment that finds no free
slot is dropped, or all assignments sorted by expert, where nothing is dropped. Every dispatcher
gives the same result for the assignments that it keeps. All sizes are those of one device.

  T   tokens, of all M routing groups        N   their assignments
  U   tokens of one group, T = M * U         I   assignments of one group, N = M * I
  K   assignments of a token                 C   slots of an expert in one group
  E   experts that the rows are for: all of the layer, or one device's after an exchange
  Q   pairs of an expert and a group, E * M  S   rows, filled or empty; R rows of one expert
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.config import Dispatch, MoE, Priority
from moe_jax.kernels.layout import stored
from moe_jax.moe import routers
from moe_jax.moe.routing import Assignments

# For tokens that do not stay in the run's layout.
DEFAULT_EXCHANGE: dict[str, Any] = {
  field.name: field.default
  for field in dataclasses.fields(MoE)
  if field.name.startswith("exchange")
}


class Layout(NamedTuple):
  """The static sizes of a dispatch."""

  tokens: int  # T
  groups: int  # M
  experts: int  # E
  capacity: int  # C, slots of an expert in each group
  slots: bool  # rows are slots; otherwise they are sorted by expert
  choices: int  # K, or 0 if tokens differ in their number of assignments
  in_token_order: bool  # all assignments of token 0 come first, then those of token 1, ...
  exchange_factor: float  # size of the buffers of an exchange, times the balanced load; 0: any load

  @property
  def units(self) -> int:
    """How many parts of the tokens have assignments of their own: else groups, which fill slots."""
    apart = self.choices and self.in_token_order and not self.slots
    return self.tokens if apart else self.groups


class Slots(NamedTuple):
  """Maps assignments to rows, and rows to assignments."""

  slot_N: jax.Array  # int32 row; S, one past the last row, if the assignment is dropped or padding
  assignment_S: jax.Array  # int32 assignment; N, one past the last, in an empty row
  kept_N: jax.Array  # bool, the assignment has a row


class ExpertRows(NamedTuple):
  """Tokens laid out for the experts."""

  # [E, R, D], R slots of each expert, or [J, X, C, D] after an exchange, in which device they come
  # from; or [S, D], sorted by expert, empty rows last.
  x: jax.Array
  gate: jax.Array | None  # float32, what experts multiply rows by; None if `combine` does
  sizes_E: jax.Array | None  # int32, number of sorted rows of each expert; None if rows are slots
  slots: Slots


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dispatcher:
  """One way to lay out rows; `DISPATCHERS` holds each under its name in the config."""

  pack: Callable[[jax.Array, Assignments, Layout], ExpertRows]  # (x_TD, ...) -> rows
  # (outputs in the shape of ExpertRows.x, ...) -> y_TD; gates count here if the rows have none
  combine: Callable[[jax.Array, Assignments, Slots, Layout], jax.Array]
  slots: bool  # rows are slots, equally many for every expert; otherwise sorted by expert
  drops: bool  # an assignment beyond the capacity of its expert is dropped


def capacity(factor: float, tokens: int, top_k: int, num_experts: int) -> int:
  """C = ceil(factor * tokens * K / E), at most tokens. Factor inf gives a slot for every token.

  `tokens` is the size of a routing group, never of a device's shard: what drops does not depend on
  the mesh.
  """
  if factor == math.inf:
    return tokens
  # The small term keeps 1.1 * 10 = 11.000000000000002 from becoming 12.
  return max(1, math.ceil(min(factor * tokens * top_k / num_experts, tokens) - 1e-6))


def group_rows(moe: MoE, length: int) -> int:
  """Returns how many sequences of `length` share a routing group; 1 if each has groups of its own.

  A batch splits over devices, and into microbatches, between groups only.
  """
  return max(moe.group_size // length, 1) if moe.num_experts else 1


def has_capacity(moe: MoE) -> bool:
  """Whether the capacity factors have a meaning: something drops, or experts choose."""
  return DISPATCHERS[moe.dispatch].drops or routers.ROUTERS[moe.router].takes_capacity


def capacity_factor(moe: MoE, *, train: bool) -> float:
  """The factor in force; inf where nothing can be dropped."""
  if not has_capacity(moe):
    return math.inf
  return moe.capacity_factor if train else moe.eval_capacity_factor


def with_slots(moe: MoE) -> MoE:
  """Returns a config of the same values: a dispatch without slots gives way to `gather`."""
  if moe.dispatch not in (Dispatch.GROUPED, Dispatch.DENSE):
    return moe
  return dataclasses.replace(
    moe,
    dispatch=Dispatch.GATHER,
    **DEFAULT_EXCHANGE,
    capacity_factor=capacity_factor(moe, train=True),
    eval_capacity_factor=capacity_factor(moe, train=False),
  )


def layout_of(moe: MoE, shape: tuple[int, ...], *, train: bool) -> Layout:
  """Returns the layout of one device's tokens, of shape (B, L, ...)."""
  B, L = shape[:2]
  size = moe.group_size or L
  factor = capacity_factor(moe, train=train)
  return Layout(
    tokens=B * L,
    groups=B * L // size,
    experts=moe.num_experts,
    capacity=capacity(factor, size, moe.top_k, moe.num_experts),
    slots=DISPATCHERS[moe.dispatch].slots,
    choices=routers.choices_per_token(moe),
    in_token_order=moe.priority is Priority.TOKEN,
    exchange_factor=moe.exchange_factor,
  )


def place_assignments(assigned: Assignments, layout: Layout) -> tuple[Slots, jax.Array | None]:
  """Gives each assignment a row.

  Returns:
    The rows of the assignments, and int32 sizes_E, the number of rows of each expert, which is None
    if rows are slots.
  """
  if layout.slots:
    return capacity_slots(assigned, layout.experts, layout.groups, layout.capacity), None
  return sorted_slots(assigned, layout.experts)


def capacity_slots(assigned: Assignments, experts: int, groups: int, capacity: int) -> Slots:
  """Gives assignments the slots [E, M, C], C of each expert and group, in order of priority.

  Args:
    assigned: assignments of one device, group after group.
    experts: E.
    groups: M.
    capacity: C. Assignments beyond it are dropped.
  """
  N = assigned.token_N.shape[0]
  group_N = jnp.arange(N, dtype=jnp.int32) // (N // groups)
  pair_N = assigned.expert_N * groups + group_N
  order_N, place_N, start_Q, end_Q = _sort(pair_N, assigned.real_N, experts * groups)
  rank_N = place_N - start_Q[pair_N]
  kept_N = assigned.real_N & (rank_N < capacity)
  slot_N = jnp.where(kept_N, pair_N * capacity + rank_N, experts * groups * capacity)
  place_QC = start_Q[:, None] + jnp.arange(capacity)[None]
  filled_QC = place_QC < end_Q[:, None]
  assignment_QC = order_N.at[place_QC].get(mode="clip")
  return Slots(slot_N, jnp.where(filled_QC, assignment_QC, N).reshape(-1), kept_N)


def sorted_slots(assigned: Assignments, experts: int) -> tuple[Slots, jax.Array]:
  """Gives each real assignment a row, sorted by expert; empty rows, one for each padding, are last.

  Returns:
    The rows of the assignments, and int32 sizes_E, the number of rows of each expert.
  """
  N = assigned.token_N.shape[0]
  order_N, place_N, start_E, end_E = _sort(assigned.expert_N, assigned.real_N, experts)
  filled_S = jnp.arange(N) < end_E[-1]
  slots = Slots(
    slot_N=jnp.where(assigned.real_N, place_N, N),
    assignment_S=jnp.where(filled_S, order_N, N),
    kept_N=assigned.real_N,
  )
  return slots, end_E - start_E


def _sort(
  pair_N: jax.Array, real_N: jax.Array, pairs: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Sorts assignments by their pair of expert and group, stably, with padding last.

  Returns:
    int32 arrays: order_N, the assignment at each place; its inverse place_N; the first place of
    each pair; and the place after its last.
  """
  pair_N = jnp.where(real_N, pair_N, pairs)
  order_N = jnp.argsort(pair_N, stable=True).astype(jnp.int32)
  index_N = jnp.arange(order_N.shape[0], dtype=jnp.int32)
  place_N = jnp.zeros_like(order_N).at[order_N].set(index_N, unique_indices=True)
  bounds = jnp.searchsorted(pair_N[order_N], jnp.arange(pairs + 1), method="scan_unrolled")
  bounds = bounds.astype(jnp.int32)
  return order_N, place_N, bounds[:-1], bounds[1:]


def gather_pack(x_TD: jax.Array, assigned: Assignments, layout: Layout) -> ExpertRows:
  """Copies each assignment's token to its row by index."""
  slots, sizes_E = place_assignments(assigned, layout)
  x_SD = gather_rows(x_TD, assigned, slots, layout)
  x = x_SD.reshape(layout.experts, -1, x_SD.shape[-1]) if layout.slots else x_SD
  return ExpertRows(x, None, sizes_E, slots)


def _gated_pack(x_TD: jax.Array, assigned: Assignments, layout: Layout) -> ExpertRows:
  """Copies each assignment's token and gate to its slot by index."""
  rows = gather_pack(x_TD, assigned, layout)
  gate_N1, slot_N1 = assigned.gate_N[:, None], rows.slots.slot_N[:, None]
  gate_S = _take_rows(gate_N1, rows.slots.assignment_S, slot_N1)[:, 0]
  gate_S = jnp.where(rows.slots.assignment_S < gate_N1.shape[0], gate_S, 0)
  return rows._replace(gate=gate_S.reshape(layout.experts, -1))


def gather_rows(x_TD: jax.Array, assigned: Assignments, slots: Slots, layout: Layout) -> jax.Array:
  """Returns x_SD, the token of each row; an empty row is any token, or 0."""
  token_S = _token_of_row(assigned, slots, layout)
  if not layout.choices:
    return _rows_or_zero(x_TD, token_S)
  return _take_rows(x_TD, token_S, by_token(slots.slot_N, assigned, layout))


def _token_of_row(assigned: Assignments, slots: Slots, layout: Layout) -> jax.Array:
  return assigned.token_N.at[slots.assignment_S].get(mode="fill", fill_value=layout.tokens)


def gather_combine(y: jax.Array, assigned: Assignments, slots: Slots, layout: Layout) -> jax.Array:
  """Returns y_TD, the gated sum of each token's rows, in the dtype of y; 0 without a row.

  Args:
    y: outputs of the experts, in the shape of ExpertRows.x. Products and sums are float32.
    assigned: the assignments that were packed.
    slots: the rows of the assignments.
    layout: the layout that they were packed in.
  """
  y_SD = y.reshape(-1, y.shape[-1])
  if layout.choices:
    y_TKD = _rows_or_zero(y_SD, by_token(slots.slot_N, assigned, layout))
    gate_TK = by_token(assigned.gate_N, assigned, layout)
    y_TD = jnp.einsum("TKD,TK->TD", y_TKD, gate_TK, preferred_element_type=jnp.float32)
  else:
    y_ND = _rows_or_zero(y_SD, slots.slot_N).astype(jnp.float32) * assigned.gate_N[:, None]
    y_TD = jnp.zeros((layout.tokens, y_SD.shape[1]), jnp.float32).at[assigned.token_N].add(y_ND)
  return y_TD.astype(y.dtype)


def _add_rows(y: jax.Array, assigned: Assignments, slots: Slots, layout: Layout) -> jax.Array:
  """Returns y_TD, the sum of each token's rows, with gates in them: so no gradient reads y."""
  if not layout.choices:
    assigned = assigned._replace(gate_N=jnp.ones_like(assigned.gate_N))
    return gather_combine(y, assigned, slots, layout)
  slot_TK = by_token(slots.slot_N, assigned, layout)
  return _sum_rows(y.reshape(-1, y.shape[-1]), slot_TK, _token_of_row(assigned, slots, layout))


def _rows_or_zero(x_SD: jax.Array, index: jax.Array) -> jax.Array:
  # What has no row adds nothing.
  return x_SD.at[index].get(mode="fill", fill_value=0)


def by_token(x_N: jax.Array, assigned: Assignments, layout: Layout) -> jax.Array:
  """Returns x_TK: the values of each token's K assignments, in the order of its choices."""
  if not layout.in_token_order:
    x_N = x_N[jnp.argsort(assigned.token_N, stable=True)]
  return x_N.reshape(-1, layout.choices)


@jax.custom_vjp
def _take_rows(x_TD: jax.Array, token_S: jax.Array, slot_TK: jax.Array) -> jax.Array:
  """Returns x_TD[token_S], with a gather as its gradient: autodiff's scatter has no fixed order."""
  # Zeros in empty rows would be one more pass: their gates are 0, or no expert computes them.
  return x_TD.at[token_S].get(mode="clip")


@jax.custom_vjp
def _sum_rows(x_SD: jax.Array, slot_TK: jax.Array, token_S: jax.Array) -> jax.Array:
  """Returns the float32 sums over K of x_SD[slot_TK], in the dtype of x_SD; see _take_rows."""
  # K comes first, because a TPU keeps the last two dimensions in tiles of at least 8 x 128. XLA
  # expects K - 1 sums to take a seventh of the cycles of a sum over K, and joins to them what makes
  # a missing row zero.
  x_KTD = x_SD.at[slot_TK.T].get(mode="clip")
  has_KT1 = slot_TK.T[..., None] < x_SD.shape[0]
  pairs = zip(has_KT1, x_KTD, strict=True)
  rows = (jnp.where(has_T1, x_TD, 0).astype(jnp.float32) for has_T1, x_TD in pairs)
  y_TD = functools.reduce(jnp.add, rows).astype(x_SD.dtype)
  return stored(y_TD, 0, 1)  # rather than all K rows in the order of the layers' sums


# Each is the other's gradient.
_take_rows.defvjp(
  lambda x_TD, *maps: (_take_rows(x_TD, *maps), maps),
  lambda maps, dx_SD: (_sum_rows(dx_SD, *maps[::-1]), None, None),
)
_sum_rows.defvjp(
  lambda x_SD, *maps: (_sum_rows(x_SD, *maps), maps),
  lambda maps, dx_TD: (_take_rows(dx_TD, *maps[::-1]), None, None),
)


def _one_hots(assigned: Assignments, slots: Slots, layout: Layout) -> tuple[jax.Array, jax.Array]:
  """Returns float32 one-hots: [M, I, U], an assignment's token; [M, I, E, C], its expert, slot."""
  M, E, C = layout.groups, layout.experts, layout.capacity
  U = layout.tokens // M
  from_NU = jax.nn.one_hot(assigned.token_N % U, U, dtype=jnp.float32)
  to_NE = jax.nn.one_hot(assigned.expert_N, E, dtype=jnp.float32)
  to_NC = jax.nn.one_hot(slots.slot_N % C, C, dtype=jnp.float32) * slots.kept_N[:, None]
  to_NEC = to_NE[:, :, None] * to_NC[:, None]
  return from_NU.reshape(M, -1, U), to_NEC.reshape(M, -1, E, C)


def _einsum_pack(x_TD: jax.Array, assigned: Assignments, layout: Layout) -> ExpertRows:
  slots, sizes_E = place_assignments(assigned, layout)
  from_MIU, to_MIEC = _one_hots(assigned, slots, layout)
  mask_EMCU = jnp.einsum("MIEC,MIU->EMCU", to_MIEC, from_MIU).astype(x_TD.dtype)
  x_MUD = x_TD.reshape(layout.groups, -1, x_TD.shape[-1])
  x_EMCD = jnp.einsum("EMCU,MUD->EMCD", mask_EMCU, x_MUD)
  return ExpertRows(x_EMCD.reshape(layout.experts, -1, x_TD.shape[-1]), None, sizes_E, slots)


def _einsum_combine(
  y_ERD: jax.Array, assigned: Assignments, slots: Slots, layout: Layout
) -> jax.Array:
  from_MIU, to_MIEC = _one_hots(assigned, slots, layout)
  gate_MI = assigned.gate_N.reshape(layout.groups, -1)
  gate_MUEC = jnp.einsum("MIU,MIEC,MI->MUEC", from_MIU, to_MIEC, gate_MI)
  y_EMCD = y_ERD.reshape(layout.experts, layout.groups, -1, y_ERD.shape[-1])
  y_MUD = jnp.einsum("MUEC,EMCD->MUD", gate_MUEC, y_EMCD.astype(jnp.float32))
  return y_MUD.reshape(-1, y_ERD.shape[-1]).astype(y_ERD.dtype)


def _dense_pack(x_TD: jax.Array, assigned: Assignments, layout: Layout) -> ExpertRows:
  """Gives every expert every token."""
  x_ETD = jnp.tile(x_TD, (layout.experts, 1)).reshape(layout.experts, *x_TD.shape)
  T, N = layout.tokens, assigned.token_N.shape[0]
  S = layout.experts * T
  slot_N = jnp.where(assigned.real_N, assigned.expert_N * T + assigned.token_N, S)
  assignment_S = jnp.full_like(slot_N, N, shape=(S,)).at[slot_N].set(jnp.arange(N), mode="drop")
  return ExpertRows(x_ETD, None, None, Slots(slot_N, assignment_S, assigned.real_N))


def _dense_combine(
  y_ETD: jax.Array, assigned: Assignments, slots: Slots, layout: Layout
) -> jax.Array:
  gate_N = jnp.where(assigned.real_N, assigned.gate_N, 0)
  gate_TE = jnp.zeros((layout.tokens, layout.experts), jnp.float32)
  gate_TE = gate_TE.at[assigned.token_N, assigned.expert_N].add(gate_N)
  return jnp.einsum("TE,ETD->TD", gate_TE, y_ETD.astype(jnp.float32)).astype(y_ETD.dtype)


DISPATCHERS = {
  Dispatch.GATHER: Dispatcher(pack=_gated_pack, combine=_add_rows, slots=True, drops=True),
  Dispatch.EINSUM: Dispatcher(pack=_einsum_pack, combine=_einsum_combine, slots=True, drops=True),
  Dispatch.GROUPED: Dispatcher(pack=gather_pack, combine=gather_combine, slots=False, drops=False),
  Dispatch.DENSE: Dispatcher(pack=_dense_pack, combine=_dense_combine, slots=True, drops=False),
}
