"""What a config must satisfy: types, ranges, and fields that have to agree. Imports no jax."""

import operator
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from moe_jax.config import mixture
from moe_jax.config.choices import Schedule
from moe_jax.config.fields import LARGEST_INT, flatten, walk
from moe_jax.config.model import Model
from moe_jax.config.run import Config
from moe_jax.errors import UserError


class Conflict(NamedTuple):
  """Two fields that disagree, and why, with the remedy."""

  first: str  # "model.moe.top_k"
  second: str
  why: str


def check(config: Config) -> None:
  """Raises a UserError for a wrong type, a value out of range, or two fields that disagree.

  What the records of routers and dispatchers ask of a config is moe.validation.validate's.
  """
  for name, field, value in walk(config):
    kind = field.type
    assert isinstance(kind, type)
    if type(value) is not kind:
      raise UserError(
        f"config.{name}={value!r} is of type {type(value).__name__}, not {kind.__name__}"
      )
    if kind in (int, float) and (wrong := field.metadata["bounds"].wrong(value)):
      raise UserError(f"config.{name}={value} {wrong}")
  refuse(config, _of_run(config))
  check_model(config.model)
  refuse(config, _of_moe(config))
  refuse(config, _of_mesh(config))
  _check_shares(config)


def refuse(config: Config, conflicts: Iterable[Conflict]) -> None:
  """Raises a UserError about the first of the conflicts, if there is one."""
  for first, second, why in conflicts:
    values = flatten(config)
    raise UserError(f"config.{first}={values[first]} with config.{second}={values[second]}: {why}")


def microbatch(config: Config) -> int:
  """Returns the rows of one accumulation step, over all devices."""
  return config.data.batch_size // config.train.accumulation


def _of_run(config: Config) -> Iterator[Conflict]:
  optimizer, data, steps = config.optimizer, config.data, config.train.steps
  if optimizer.warmup_steps > steps:
    yield Conflict("optimizer.warmup_steps", "train.steps", "warm up in fewer steps than the run")
  falls = round(optimizer.decay_fraction * steps)
  if optimizer.schedule is Schedule.WSD and optimizer.warmup_steps + falls > steps:
    why = f"warm up before the last {falls} of {steps} steps, in which wsd falls"
    yield Conflict("optimizer.warmup_steps", "optimizer.decay_fraction", why)
  if data.mixture:
    mixture.sources(data)
    if data.path:
      why = "each source of a mixture has its own path; leave data.path empty"
      yield Conflict("data.path", "data.mixture", why)
  elif data.path and data.name != "text":
    why = "only name=text reads a path; set data.name=text, or leave data.path empty"
    yield Conflict("data.path", "data.name", why)
  choices = config.model.moe.top_k if config.model.moe.num_experts else 1
  for name, rows in (("data", data.batch_size), ("eval", config.eval.batch_size)):
    if rows * data.seq_len * choices > LARGEST_INT:
      why = (
        f"a batch has more than {LARGEST_INT} tokens (times model.moe.top_k), so that int32 cannot "
        "count them; make one smaller"
      )
      yield Conflict(f"{name}.batch_size", "data.seq_len", why)


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


def _of_moe(config: Config) -> Iterator[Conflict]:
  moe, layers, length = config.model.moe, config.model.num_layers, config.data.seq_len
  if not moe.num_experts:
    return
  experts = "model.moe.num_experts"
  if moe.top_k > moe.num_experts:
    why = "a token can choose each expert once, so top_k is at most num_experts"
    yield Conflict("model.moe.top_k", experts, why)
  for field in ("shared_gate", "shared_dim"):
    if getattr(moe, field) and not moe.shared_experts:
      why = "there is no shared expert; set shared_experts=1"
      yield Conflict(f"model.moe.{field}", "model.moe.shared_experts", why)
  uneven = moe.num_experts % moe.expert_groups or moe.num_experts < 2 * moe.expert_groups
  if moe.expert_groups > 1 and uneven:
    why = "groups are of equal size, two experts at least"
    yield Conflict(experts, "model.moe.expert_groups", why)
  if moe.top_groups > moe.expert_groups:
    why = "a token can use each group once"
    yield Conflict("model.moe.top_groups", "model.moe.expert_groups", why)
  if moe.top_k > moe.top_groups * moe.num_experts // moe.expert_groups:
    why = "the allowed groups hold fewer experts than top_k; raise top_groups"
    yield Conflict("model.moe.top_k", "model.moe.top_groups", why)
  if not {"", *map(str, range(layers))}.issuperset(moe.dense_layers.split(",")):
    why = "give the indices of layers, from 0 on, with commas between them"
    yield Conflict("model.moe.dense_layers", "model.num_layers", why)
  if (layers - moe.first_dense) % moe.every:
    why = f"the layers after first_dense={moe.first_dense} must divide into periods of `every`"
    yield Conflict("model.num_layers", "model.moe.every", why)
  if not any(map(moe.in_layer, range(layers))):
    why = "no layer is left for the experts; for a dense model set num_experts=0"
    yield Conflict("model.moe.first_dense", "model.moe.dense_layers", why)
  group = moe.group_size or length
  if length % group and group % length:
    why = "a routing group is a whole part or a whole multiple of a sequence"
    yield Conflict("model.moe.group_size", "data.seq_len", why)


def _of_mesh(config: Config) -> Iterator[Conflict]:
  model, moe, mesh = config.model, config.model.moe, config.mesh
  if not mesh.data:
    raise UserError("config.mesh.data=0 must be at least 1, or -1 for all devices that are left")
  sizes = [
    ("dim", "fsdp"),
    ("vocab_size", "tensor"),
    ("num_heads", "tensor"),
    ("num_kv_heads", "tensor"),
  ]
  if moe.num_experts:
    sizes += [("moe.num_experts", "expert"), ("moe.expert_dim", "tensor")]
    sizes += [("moe.shared_dim", "tensor")]
  if not all(map(moe.in_layer, range(model.num_layers))):
    sizes += [("ffn_dim", "tensor")]
  for size, axis in sizes:
    if operator.attrgetter(size)(model) % getattr(mesh, axis):
      why = "the axis shards this size, so it must divide it"
      yield Conflict(f"model.{size}", f"mesh.{axis}", why)
  if mesh.context > 1 and config.data.seq_len % (2 * mesh.context):
    why = f"each device holds two pieces of a sequence; make it a multiple of {2 * mesh.context}"
    yield Conflict("data.seq_len", "mesh.context", why)
  if mesh.context > 1 and model.delta.value_heads:
    why = "the delta rule needs all of a sequence on one device; set context=1"
    yield Conflict("mesh.context", "model.delta.value_heads", why)
  if config.data.batch_size % config.train.accumulation:
    why = "the batch must split into equal microbatches"
    yield Conflict("data.batch_size", "train.accumulation", why)


def _check_shares(config: Config) -> None:
  """Raises a UserError where devices would not have equally many sequences, or parts of a group."""
  moe, mesh, data = config.model.moe, config.mesh, config.data
  shards = mesh.sequences
  rows = microbatch(config)
  devices = (
    f"config.mesh.data={mesh.data} x config.mesh.fsdp={mesh.fsdp} x config.mesh.expert="
    f"{mesh.expert} devices"
  )
  if rows % shards:
    raise UserError(
      f"config.data.batch_size={data.batch_size} over config.train.accumulation="
      f"{config.train.accumulation} is a microbatch of {rows} sequences, which does not "
      f"divide over {devices}"
    )
  if config.eval.batch_size % shards:
    raise UserError(
      f"config.eval.batch_size={config.eval.batch_size} does not divide over {devices}"
    )
  for batch in (rows, config.eval.batch_size or rows):
    tokens = batch // shards * data.seq_len
    if moe.num_experts and tokens % (moe.group_size or data.seq_len):
      raise UserError(
        f"config.model.moe.group_size={moe.group_size}: a device holds {tokens} tokens of a "
        f"microbatch of {batch} sequences, not a whole number of groups; a group never spans "
        "devices, so make it smaller or the batch larger"
      )
