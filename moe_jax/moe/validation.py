"""What the records of routers and dispatchers ask of a config, and what they make of its fields."""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterator

from moe_jax.config import Config, Exchange, ExchangeFallback, Mesh, MoE, Priority, checks, override
from moe_jax.config.checks import Conflict
from moe_jax.config.fields import LARGEST_INT, flatten
from moe_jax.errors import UserError
from moe_jax.moe import dispatch
from moe_jax.moe.routers import ROUTERS
from moe_jax.moe.routing import RouterSpec

# Fields that a resumed run may change, since they change no value of the training: where and how
# long it runs, what is logged and watched, and by which kernels the same values are computed.
_MAY_CHANGE = (
  "mesh.", "eval.", "health.", "train.steps", "train.log_every", "train.eval_every",
  "train.checkpoint_every", "train.keep_", "train.step_timeout", "data.threads", "model.remat",
  "model.attention", "model.moe.grouped_matmul",
)  # fmt: skip


def validate(config: Config) -> None:
  """Raises a UserError for a wrong type, a value out of range, or two fields that disagree."""
  checks.check(config)
  if config.model.moe.num_experts:
    checks.refuse(config, _of_router(config))
    checks.refuse(config, _of_dispatch(config))


def ignored_fields(config: Config) -> set[str]:
  """Returns the names of fields that have no effect, because other fields make them so."""
  moe = config.model.moe
  ignored = set()
  if moe.top_k == 1:
    ignored.add("model.moe.renormalize")
  if not dispatch.has_capacity(moe):
    ignored |= {"model.moe.capacity_factor", "model.moe.eval_capacity_factor"}
  return ignored


def fields_with_equal_values(old: Config, new: Config) -> set[str]:
  """Returns the names of fields that may differ, since both configs compute the same values."""
  same = ignored_fields(old) & ignored_fields(new)
  if not any(
    c.model.moe.exchange_factor and c.model.moe.exchange_fallback is ExchangeFallback.NONE
    for c in (old, new)
  ):  # otherwise each exchange drops other assignments
    same |= {n for n in flatten(new) if n.startswith("model.moe.exchange")}
  in_force = [
    [dispatch.capacity_factor(config.model.moe, train=train) for train in (True, False)]
    for config in (old, new)
  ]
  if in_force[0] == in_force[1]:  # then every dispatcher drops the same assignments
    same |= {"model.moe.dispatch", "model.moe.capacity_factor", "model.moe.eval_capacity_factor"}
  return same


def check_same_config(workdir: pathlib.Path, before: Config | None, config: Config) -> None:
  """Raises a UserError if a config would change values of the run that the workdir holds."""
  if before is None:
    return
  old, new = flatten(before), flatten(config)
  same = fields_with_equal_values(before, config)
  changed = [n for n in new if new[n] != old[n] and not n.startswith(_MAY_CHANGE) and n not in same]
  if changed:
    what = ", ".join(f"config.{n}={new[n]} (was {old[n]})" for n in changed)
    raise UserError(
      f"--workdir={workdir} holds a run with another config: {what}; drop the change to go on with "
      f"that run, or name a new workdir, which --init_from={workdir} gives that run's parameters"
    )


def resolve_mesh(config: Config, num_devices: int) -> Config:
  """A validated copy with mesh.data filled in, or a UserError if the mesh does not fit."""
  mesh = config.mesh
  others = mesh.fsdp * mesh.expert * mesh.context * mesh.tensor
  data = mesh.data if mesh.data > 0 else num_devices // others
  if data * others != num_devices:
    raise UserError(
      f"config.mesh: data={mesh.data} x fsdp={mesh.fsdp} x expert={mesh.expert} x "
      f"context={mesh.context} x tensor={mesh.tensor} does not make the {num_devices} device(s) "
      "here; change the mesh, or simulate devices on a CPU with "
      "XLA_FLAGS=--xla_force_host_platform_device_count=N"
    )
  config = dataclasses.replace(config, mesh=dataclasses.replace(mesh, data=data))
  validate(config)
  return config


def _of_router(config: Config) -> Iterator[Conflict]:
  moe, loss, spec = config.model.moe, config.loss, ROUTERS[config.model.moe.router]
  router = "model.moe.router"

  def others(has: Callable[[RouterSpec], bool]) -> str:
    return "use router=" + " or ".join(r.value for r, record in ROUTERS.items() if has(record))

  for rule in spec.rules:
    if not rule.holds(moe):
      yield Conflict(router, f"model.moe.{rule.field}", rule.why)
  if moe.score not in spec.scores:
    able = others(lambda record: moe.score in record.scores)
    why = f"this router is not defined for that score; {able}"
    yield Conflict(router, "model.moe.score", why)
  if moe.bias_update_rate and not spec.takes_bias:
    able = others(lambda record: record.takes_bias)
    why = f"a bias balances a choice by score: {able}, or set bias_update_rate=0"
    yield Conflict(router, "model.moe.bias_update_rate", why)
  for groups in ("expert_groups", "top_groups"):
    if getattr(moe, groups) > 1 and not spec.takes_groups:
      able = others(lambda record: record.takes_groups)
      why = f"this router has no groups; set expert_groups=1 and top_groups=1, or {able}"
      yield Conflict(router, f"model.moe.{groups}", why)
  if loss.load_balance and not spec.load_is_learned:
    why = (
      "the load is not the router's to change, so the loss would only distort the gates; set "
      "load_balance=0"
    )
    yield Conflict(router, "loss.load_balance", why)
  if loss.load and not spec.has_load:
    able = others(lambda record: record.has_load)
    why = (
      "this router has no chances to be chosen, which the load loss needs; set loss.load=0, or "
      f"{able}"
    )
    yield Conflict(router, "loss.load", why)


def _of_dispatch(config: Config) -> Iterator[Conflict]:
  moe, mesh, rows = config.model.moe, config.mesh, checks.microbatch(config)
  if moe.exchange is not Exchange.AUTO and dispatch.DISPATCHERS[moe.dispatch].slots:
    why = "dispatch with slots always exchanges them by all_to_all; set exchange=auto"
    yield Conflict("model.moe.exchange", "model.moe.dispatch", why)
  if moe.exchange_factor and moe.exchange not in (Exchange.ALL_TO_ALL, Exchange.RAGGED):
    why = "only the buffers of all_to_all and ragged have a size; set exchange_factor=0"
    yield Conflict("model.moe.exchange_factor", "model.moe.exchange", why)
  length, piece = config.data.seq_len, config.data.seq_len // (2 * mesh.context)
  groups_matter = ROUTERS[moe.router].looks_ahead or math.inf > min(
    dispatch.capacity_factor(moe, train=train) for train in (True, False)
  )
  if mesh.context > 1 and piece % (moe.group_size or (length if groups_matter else 1)):
    why = (
      f"a device holds two pieces of {piece} tokens of a sequence, and a routing group never spans "
      f"devices; set group_size to {piece} or a divisor of it"
    )
    yield Conflict("model.moe.group_size", "mesh.context", why)
  if moe.exchange_fallback is ExchangeFallback.EXACT and not moe.exchange_factor:
    why = "buffers for any load do not overflow; set exchange_fallback=none, or a factor, as 1.5"
    yield Conflict("model.moe.exchange_fallback", "model.moe.exchange_factor", why)
  if mesh.data < 0:
    return  # resolve_mesh will know how many tokens a device has
  for batch, train in ((rows, True), (config.eval.batch_size or rows, False)):
    here = (batch // mesh.sequences, length // mesh.context)
    layout = dispatch.layout_of(moe, here, train=train)
    if layout.units % moe.exchange_chunks:
      what = "tokens" if layout.units == layout.tokens else "routing groups"
      why = f"a device's {layout.units} {what} must divide into equal chunks"
      yield Conflict(
        "model.moe.exchange_chunks", "data.batch_size" if train else "eval.batch_size", why
      )
    slots = layout.experts * layout.groups * layout.capacity
    if slots > LARGEST_INT and (layout.slots or ROUTERS[moe.router].takes_capacity):
      why = (
        f"a device has {slots} slots, which int32 cannot number; lower one of them, or the "
        "capacity factors"
      )
      yield Conflict("model.moe.num_experts", "data.batch_size", why)


def future_leak(moe: MoE, *, train: bool) -> str:
  """Why a token's output depends on later tokens under this routing, or "" if it does not."""
  if not moe.num_experts:
    return ""
  spec = ROUTERS[moe.router]
  if spec.looks_ahead and spec.runs_own(train=train):
    return f"router={moe.router.value}: {spec.looks_ahead}"
  if moe.priority is not Priority.TOKEN and dispatch.capacity_factor(moe, train=train) < math.inf:
    return f"priority={moe.priority.value}: a later token can take an earlier one's slot"
  return ""


def validate_generation(moe: MoE) -> None:
  """Refuses a router that a generator, which drops nothing, cannot follow.

  Raises:
    UserError: a token's experts depend on later tokens, or on its place in a batch.
  """
  leak = future_leak(dataclasses.replace(moe, priority=Priority.TOKEN), train=False)
  if leak:
    raise UserError(
      f"config.model.moe.{leak}, but generated text has no later tokens yet, so the model would "
      "not be the one that was evaluated; train with a causal router to generate"
    )
  if moe.num_experts and ROUTERS[moe.router].noise_in_evaluation:
    raise UserError(
      f"config.model.moe.router={moe.router.value}: experts are drawn by a token's place in the "
      "batch, so a generated token would not get those of the evaluation; train with a learned "
      "router"
    )


def at_capacity(config: Config, factor: float) -> Config:
  """The same model with another capacity in evaluation; inf drops nothing.

  A dropless dispatch has no slots, so it gives way to `gather`: what a model trained without drops
  loses where it has to run with them. With expert_choice nothing is dropped, and the factor is how
  many tokens each expert takes.
  """
  moe = dispatch.with_slots(config.model.moe) if factor < math.inf else config.model.moe
  changed = override(config, {"model.moe": moe, "model.moe.eval_capacity_factor": factor})
  # Without the mesh: it is made for evaluation, and a batch of training need not split over it.
  validate(dataclasses.replace(changed, mesh=Mesh()))
  return changed
