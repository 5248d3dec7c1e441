"""What a config must satisfy: types, ranges, and fields that have to agree. Imports no jax."""

from typing import Any

from moe_jax.config.choices import Schedule
from moe_jax.config.fields import LARGEST_INT, flatten, walk
from moe_jax.config.model import Model
from moe_jax.config.run import Config
from moe_jax.errors import UserError


def check(config: Config) -> None:
  """Raises a UserError for a wrong type, a value out of range, or two fields that disagree.

  What the records of routers and dispatchers ask of a config is moe.validation.validate's.
  """
  _check_each_field(config)
  if config.optimizer.warmup_steps > config.train.steps:
    refuse(config, "optimizer.warmup_steps", "train.steps", "warm up in fewer steps than the run")
  falls = round(config.optimizer.decay_fraction * config.train.steps)
  late = config.optimizer.warmup_steps + falls > config.train.steps
  if config.optimizer.schedule is Schedule.WSD and late:
    refuse(config, "optimizer.warmup_steps", "optimizer.decay_fraction",
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
    if kind in (int, float) and (wrong := field.metadata["bounds"].wrong(value)):
      raise UserError(f"config.{name}={value} {wrong}")


def _get(config: Config, name: str) -> Any:
  return flatten(config)[name]


def microbatch(config: Config) -> int:
  return config.data.batch_size // config.train.accumulation


def refuse(config: Config, first: str, second: str, why: str) -> None:
  raise UserError(
    f"config.{first}={_get(config, first)} with config.{second}={_get(config, second)}: {why}"
  )


def _check_data(config: Config) -> None:
  data, experts = config.data, config.model.moe.num_experts
  if data.path and data.name != "text":
    refuse(config, "data.path", "data.name", "only name=text reads a path; set data.name=text, or "
            "leave data.path empty")  # fmt: skip
  choices = config.model.moe.top_k if experts else 1
  for rows in ("data.batch_size", "eval.batch_size"):
    if _get(config, rows) * data.seq_len * choices > LARGEST_INT:
      refuse(config, rows, "data.seq_len", f"a batch has more than {LARGEST_INT} tokens (times "
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
    refuse(config, "model.moe.top_k", "model.moe.num_experts", "a token can choose each expert "
            "once, so top_k is at most num_experts")  # fmt: skip
  for field in ("shared_gate", "shared_dim"):
    if getattr(moe, field) and not moe.shared_experts:
      refuse(config, f"model.moe.{field}", "model.moe.shared_experts", "there is no shared "
              "expert; set shared_experts=1")  # fmt: skip
  _check_groups(config)
  if not {"", *map(str, range(config.model.num_layers))}.issuperset(moe.dense_layers.split(",")):
    refuse(config, "model.moe.dense_layers", "model.num_layers", "give the indices of layers, "
            "from 0 on, with commas between them")  # fmt: skip
  if (config.model.num_layers - moe.first_dense) % moe.every:
    refuse(config, "model.num_layers", "model.moe.every", "the layers after first_dense="
            f"{moe.first_dense} must divide into periods of `every`")  # fmt: skip
  if not any(map(moe.in_layer, range(config.model.num_layers))):
    refuse(config, "model.moe.first_dense", "model.moe.dense_layers", "no layer is left for the "
            "experts; for a dense model set num_experts=0")  # fmt: skip
  group, length = moe.group_size or data.seq_len, data.seq_len
  if length % group and group % length:
    refuse(config, "model.moe.group_size", "data.seq_len", "a routing group is a whole part or a "
            "whole multiple of a sequence")  # fmt: skip


def _check_groups(config: Config) -> None:
  moe = config.model.moe
  if moe.expert_groups > 1 and (
    moe.num_experts % moe.expert_groups or moe.num_experts < 2 * moe.expert_groups
  ):
    refuse(config, "model.moe.num_experts", "model.moe.expert_groups", "groups are of equal size, "
            "two experts at least")  # fmt: skip
  if moe.top_groups > moe.expert_groups:
    refuse(config, "model.moe.top_groups", "model.moe.expert_groups", "a token can use each group "
            "once")  # fmt: skip
  if moe.top_k > moe.top_groups * moe.num_experts // moe.expert_groups:
    refuse(config, "model.moe.top_k", "model.moe.top_groups", "the allowed groups hold fewer "
            "experts than top_k; raise top_groups")  # fmt: skip


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
      refuse(config, size, axis, "the axis shards this size, so it must divide it")
  if data.batch_size % config.train.accumulation:
    refuse(config, "data.batch_size", "train.accumulation", "the batch must split into equal "
            "microbatches")  # fmt: skip
  shards = max(mesh.data, 1) * mesh.fsdp * mesh.expert
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
