"""What a Config must satisfy: types, ranges, and fields that have to agree."""

import dataclasses
import math
from typing import Any

from moe_jax.config import Config, Exchange, Model, MoE, Priority, Schedule, UserError, flatten
from moe_jax.options import LARGEST_INT, walk


def validate(config: Config) -> None:
  """Raises a UserError for a wrong type, a value out of range, or two fields that disagree."""
  check_fields(config)
  if config.model.moe.num_experts:  # from here on with the records, which import jax
    _check_router(config)
    _check_dispatch(config)


def check_fields(config: Config) -> None:
  """The part of `validate` that no record of a router or dispatcher is needed for; no jax."""
  _check_each_field(config)
  if config.optimizer.warmup_steps > config.train.steps:
    _refuse(config, "optimizer.warmup_steps", "train.steps", "warm up in fewer steps than the run")
  falls = round(config.optimizer.decay_fraction * config.train.steps)
  late = config.optimizer.warmup_steps + falls > config.train.steps
  if config.optimizer.schedule is Schedule.WSD and late:
    _refuse(config, "optimizer.warmup_steps", "optimizer.decay_fraction",
            f"warm up before the last {falls} of {config.train.steps} steps, in which wsd falls")  # fmt: skip  # noqa: E501
  _check_data(config)
  check_model(config.model)
  _check_moe(config)
  _check_mesh(config)


def _check_each_field(config: Config) -> None:
  for name, field, value in walk(config):
    kind = field.type
    assert isinstance(kind, type)
    if type(value) is not kind:
      raise UserError(
        f"config.{name}={value!r} is of type {type(value).__name__}, not {kind.__name__}"
      )
    wrong = kind in (int, float) and field.metadata["bounds"].wrong(value)
    if wrong:
      raise UserError(f"config.{name}={value} {wrong}")


def without_effect(config: Config) -> set[str]:
  """Returns the names of fields that have no effect, because other fields make them so."""
  from moe_jax.moe import dispatch  # here, so that `import validation` imports no jax

  moe = config.model.moe
  ignored = set()
  if moe.top_k == 1:
    ignored.add("model.moe.renormalize")
  if not dispatch.has_capacity(moe):
    ignored |= {"model.moe.capacity_factor", "model.moe.eval_capacity_factor"}
  return ignored


def without_consequence(old: Config, new: Config) -> set[str]:
  """Returns the names of fields that may differ, since both configs compute the same values."""
  from moe_jax.moe import dispatch

  same = without_effect(old) & without_effect(new)
  if not new.model.moe.exchange_factor:  # with a factor, each exchange drops other assignments
    same.add("model.moe.exchange")
  in_force = [
    [dispatch.capacity_factor(config.model.moe, train=train) for train in (True, False)]
    for config in (old, new)
  ]
  if in_force[0] == in_force[1]:  # then every dispatcher drops the same assignments
    same |= {"model.moe.dispatch", "model.moe.capacity_factor", "model.moe.eval_capacity_factor"}
  return same


def resolve_mesh(config: Config, num_devices: int) -> Config:
  """A validated copy with mesh.data filled in, or a UserError if the mesh does not fit."""
  mesh = config.mesh
  others = mesh.fsdp * mesh.expert * mesh.tensor
  data = mesh.data if mesh.data > 0 else num_devices // others
  if data * others != num_devices:
    raise UserError(
      f"config.mesh: data={mesh.data} x fsdp={mesh.fsdp} x expert={mesh.expert} x "
      f"tensor={mesh.tensor} does not make the {num_devices} device(s) here; change the mesh, or "
      "simulate devices on a CPU with XLA_FLAGS=--xla_force_host_platform_device_count=N"
    )
  config = dataclasses.replace(config, mesh=dataclasses.replace(mesh, data=data))
  validate(config)
  return config


def _get(config: Config, name: str) -> Any:
  return flatten(config)[name]


def _microbatch(config: Config) -> int:
  return config.data.batch_size // config.train.accumulation


def _refuse(config: Config, first: str, second: str, why: str) -> None:
  raise UserError(
    f"config.{first}={_get(config, first)} with config.{second}={_get(config, second)}: {why}"
  )


def _check_data(config: Config) -> None:
  data, experts = config.data, config.model.moe.num_experts
  if data.path and data.name != "text":
    _refuse(config, "data.path", "data.name", "only name=text reads a path; set data.name=text, or "
            "leave data.path empty")  # fmt: skip
  choices = config.model.moe.top_k if experts else 1
  for rows in ("data.batch_size", "eval.batch_size"):
    if _get(config, rows) * data.seq_len * choices > LARGEST_INT:
      _refuse(config, rows, "data.seq_len", f"a batch has more than {LARGEST_INT} tokens (times "
              "model.moe.top_k), so that int32 cannot count them; make one smaller")  # fmt: skip


def check_model(model: Model) -> None:
  """Raises a UserError for fields that disagree."""
  if model.num_heads % model.num_kv_heads:
    raise UserError(
      f"config.model.num_heads={model.num_heads} is not divisible by config.model.num_kv_heads="
      f"{model.num_kv_heads}: each key/value head serves the same number of query heads"
    )
  if model.head_dim % 2 and not model.latent.kv_dim:
    raise UserError(f"config.model.head_dim={model.head_dim} must be even: RoPE rotates pairs")
  if model.latent.kv_dim:
    _check_latent(model)
  width = model.rotated_width
  if width % 2 or not width:
    raise UserError(
      f"config.model.rotary_fraction={model.rotary_fraction} of config.model.head_dim="
      f"{model.head_dim} is {width} dimensions; RoPE rotates pairs, so make it even"
    )
  if model.global_every and not model.window and not model.delta.value_heads:
    raise UserError(
      f"config.model.global_every={model.global_every} with config.model.window=0: all layers "
      "attend to everything; set a window, or global_every=0"
    )
  if model.delta.value_heads:
    _check_delta(model)
  scaling = model.rope_scaling
  if scaling.beta_slow > scaling.beta_fast:  # equal ones are a step; Kimi-K2 has them
    raise UserError(
      f"config.model.rope_scaling.beta_slow={scaling.beta_slow} is over beta_fast="
      f"{scaling.beta_fast}: the ramp lies between them"
    )
  if scaling.low_freq_factor >= scaling.high_freq_factor:
    raise UserError(
      f"config.model.rope_scaling.low_freq_factor={scaling.low_freq_factor} must be below "
      f"high_freq_factor={scaling.high_freq_factor}: the ramp lies between them"
    )


def _check_delta(model: Model) -> None:
  delta = model.delta
  if delta.value_heads % delta.key_heads:
    raise UserError(
      f"config.model.delta.value_heads={delta.value_heads} is not divisible by config.model.delta."
      f"key_heads={delta.key_heads}: each head of keys serves the same number of heads of values"
    )
  if model.window:
    raise UserError(
      f"config.model.window={model.window} with config.model.delta.value_heads="
      f"{delta.value_heads}: a layer has a window or the delta rule; set window=0"
    )


def _check_latent(model: Model) -> None:
  latent, plain = model.latent, Model()
  for name in ("qk_norm", "qkv_bias", "out_bias", "rotary_fraction", "attention_gate"):
    if getattr(model, name) != getattr(plain, name):
      raise UserError(
        f"config.model.{name}={flatten(model)[name]} with config.model.latent.kv_dim="
        f"{latent.kv_dim}: latent attention has none; set it to {flatten(plain)[name]}"
      )
  if model.num_kv_heads != model.num_heads:
    raise UserError(
      f"config.model.num_kv_heads={model.num_kv_heads} with config.model.latent.kv_dim="
      f"{latent.kv_dim}: each head has keys and values of its own; set it to {model.num_heads}"
    )
  if latent.rotary_dim % 2:
    raise UserError(
      f"config.model.latent.rotary_dim={latent.rotary_dim} must be even: RoPE rotates pairs"
    )
  if latent.rotary_dim >= model.head_dim or latent.value_dim > model.head_dim:
    raise UserError(
      f"config.model.head_dim={model.head_dim} must be above config.model.latent.rotary_dim="
      f"{latent.rotary_dim}, and at least value_dim={latent.value_dim}"
    )


def _check_moe(config: Config) -> None:
  moe, data = config.model.moe, config.data
  if not moe.num_experts:
    return
  if moe.top_k > moe.num_experts:
    _refuse(config, "model.moe.top_k", "model.moe.num_experts", "a token can choose each expert "
            "once, so top_k is at most num_experts")  # fmt: skip
  for field in ("shared_gate", "shared_dim"):
    if getattr(moe, field) and not moe.shared_experts:
      _refuse(config, f"model.moe.{field}", "model.moe.shared_experts", "there is no shared "
              "expert; set shared_experts=1")  # fmt: skip
  _check_groups(config)
  if not {"", *map(str, range(config.model.num_layers))}.issuperset(moe.dense_layers.split(",")):
    _refuse(config, "model.moe.dense_layers", "model.num_layers", "give the indices of layers, "
            "from 0 on, with commas between them")  # fmt: skip
  if (config.model.num_layers - moe.first_dense) % moe.every:
    _refuse(config, "model.num_layers", "model.moe.every", "the layers after first_dense="
            f"{moe.first_dense} must divide into periods of `every`")  # fmt: skip
  if not any(map(moe.in_layer, range(config.model.num_layers))):
    _refuse(config, "model.moe.first_dense", "model.moe.dense_layers", "no layer is left for the "
            "experts; for a dense model set num_experts=0")  # fmt: skip
  group, length = moe.group_size or data.seq_len, data.seq_len
  if length % group and group % length:
    _refuse(config, "model.moe.group_size", "data.seq_len", "a routing group is a whole part or a "
            "whole multiple of a sequence")  # fmt: skip


def _check_router(config: Config) -> None:
  from moe_jax.moe.routers import ROUTERS  # here, so that `import validation` imports no jax

  moe, loss, spec = config.model.moe, config.loss, ROUTERS[config.model.moe.router]
  router = "model.moe.router"

  def others(field: str) -> str:
    return "use router=" + " or ".join(r.value for r, s in ROUTERS.items() if getattr(s, field))

  for rule in spec.rules:
    if not rule.holds(moe):
      _refuse(config, router, f"model.moe.{rule.field}", rule.why)
  if moe.score not in spec.scores:
    able = " or ".join(r.value for r, s in ROUTERS.items() if moe.score in s.scores)
    _refuse(config, router, "model.moe.score", f"this router is not defined for that score; use "
            f"router={able}")  # fmt: skip
  if moe.bias_update_rate and not spec.takes_bias:
    _refuse(config, router, "model.moe.bias_update_rate", "a bias balances a choice by score: "
            f"{others('takes_bias')}, or set bias_update_rate=0")  # fmt: skip
  for groups in ("expert_groups", "top_groups"):
    if getattr(moe, groups) > 1 and not spec.takes_groups:
      _refuse(config, router, f"model.moe.{groups}", "this router has no groups; set "
              f"expert_groups=1 and top_groups=1, or {others('takes_groups')}")  # fmt: skip
  if loss.load_balance and not spec.load_is_learned:
    _refuse(config, router, "loss.load_balance", "the load is not the router's to change, so the "
            "loss would only distort the gates; set load_balance=0")  # fmt: skip
  if loss.load and not spec.has_load:
    _refuse(config, router, "loss.load", "this router has no chances to be chosen, which the load "
            f"loss needs; set loss.load=0, or {others('has_load')}")  # fmt: skip


def _check_groups(config: Config) -> None:
  moe = config.model.moe
  if moe.expert_groups > 1 and (
    moe.num_experts % moe.expert_groups or moe.num_experts < 2 * moe.expert_groups
  ):
    _refuse(config, "model.moe.num_experts", "model.moe.expert_groups", "groups are of equal size, "
            "two experts at least")  # fmt: skip
  if moe.top_groups > moe.expert_groups:
    _refuse(config, "model.moe.top_groups", "model.moe.expert_groups", "a token can use each group "
            "once")  # fmt: skip
  if moe.top_k > moe.top_groups * moe.num_experts // moe.expert_groups:
    _refuse(config, "model.moe.top_k", "model.moe.top_groups", "the allowed groups hold fewer "
            "experts than top_k; raise top_groups")  # fmt: skip


def _check_dispatch(config: Config) -> None:
  from moe_jax.moe.dispatch import DISPATCHERS

  moe = config.model.moe
  if moe.exchange is not Exchange.AUTO and DISPATCHERS[moe.dispatch].slots:
    _refuse(config, "model.moe.exchange", "model.moe.dispatch", "dispatch with slots always "
            "exchanges them by all_to_all; set exchange=auto")  # fmt: skip
  if moe.exchange_factor and moe.exchange not in (Exchange.ALL_TO_ALL, Exchange.RAGGED):
    _refuse(config, "model.moe.exchange_factor", "model.moe.exchange", "only the buffers of "
            "all_to_all and ragged have a size; set exchange_factor=0")  # fmt: skip
  if config.mesh.data > 0:  # otherwise resolve_mesh will know how many tokens a device has
    _check_slots(config)


def _check_slots(config: Config) -> None:
  from moe_jax.moe.dispatch import layout_of
  from moe_jax.moe.routers import ROUTERS

  moe, mesh, microbatch = config.model.moe, config.mesh, _microbatch(config)
  shards = mesh.data * mesh.fsdp * mesh.expert
  for batch, train in ((microbatch, True), (config.eval.batch_size or microbatch, False)):
    layout = layout_of(moe, (batch // shards, config.data.seq_len), train=train)
    slots = layout.experts * layout.groups * layout.capacity
    if slots > LARGEST_INT and (layout.slots or ROUTERS[moe.router].takes_capacity):
      _refuse(config, "model.moe.num_experts", "data.batch_size", f"a device has {slots} slots, "
              "which int32 cannot number; lower one of them, or the capacity factors")  # fmt: skip


def future_leak(moe: MoE, *, train: bool) -> str:
  """Why a token's output depends on later tokens under this routing, or "" if it does not."""
  if not moe.num_experts:
    return ""
  from moe_jax.moe import dispatch
  from moe_jax.moe.routers import ROUTERS

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
  from moe_jax.moe.routers import ROUTERS

  if moe.num_experts and ROUTERS[moe.router].noise_in_evaluation:
    raise UserError(
      f"config.model.moe.router={moe.router.value}: experts are drawn by a token's place in the "
      "batch, so a generated token would not get those of the evaluation; train with a learned "
      "router"
    )


def _check_mesh(config: Config) -> None:
  moe, mesh, data = config.model.moe, config.mesh, config.data
  if not mesh.data:
    raise UserError("config.mesh.data=0 must be at least 1, or -1 for all devices that are left")
  divisions = [
    ("model.dim", "mesh.fsdp"),
    ("model.vocab_size", "mesh.tensor"),
    ("model.num_heads", "mesh.tensor"),
    ("model.num_kv_heads", "mesh.tensor"),
  ]
  if moe.num_experts:
    divisions += [("model.moe.num_experts", "mesh.expert"), ("model.moe.expert_dim", "mesh.tensor")]
    divisions += [("model.moe.shared_dim", "mesh.tensor")]
  if not all(map(moe.in_layer, range(config.model.num_layers))):
    divisions += [("model.ffn_dim", "mesh.tensor")]
  for size, axis in divisions:
    if _get(config, size) % _get(config, axis):
      _refuse(config, size, axis, "the axis shards this size, so it must divide it")
  if data.batch_size % config.train.accumulation:
    _refuse(config, "data.batch_size", "train.accumulation", "the batch must split into equal "
            "microbatches")  # fmt: skip
  shards = max(mesh.data, 1) * mesh.fsdp * mesh.expert
  microbatch = _microbatch(config)
  devices = (
    f"config.mesh.data={mesh.data} x config.mesh.fsdp={mesh.fsdp} x config.mesh.expert="
    f"{mesh.expert} devices"
  )
  if microbatch % shards:
    raise UserError(
      f"config.data.batch_size={data.batch_size} over config.train.accumulation="
      f"{config.train.accumulation} is a microbatch of {microbatch} sequences, which does not "
      f"divide over {devices}"
    )
  if config.eval.batch_size % shards:
    raise UserError(
      f"config.eval.batch_size={config.eval.batch_size} does not divide over {devices}"
    )
  for batch in (microbatch, config.eval.batch_size or microbatch):
    tokens = batch // shards * data.seq_len
    if moe.num_experts and tokens % (moe.group_size or data.seq_len):
      raise UserError(
        f"config.model.moe.group_size={moe.group_size}: a device holds {tokens} tokens of a "
        f"microbatch of {batch} sequences, not a whole number of groups; a group never spans "
        "devices, so make it smaller or the batch larger"
      )
