"""The cost of a config, computed from shapes: parameters, FLOPs per token, memory per device."""

import collections
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax import sharding
from moe_jax.config import Config, GroupedMatmul, Mesh, Model, Remat, override
from moe_jax.config.fields import flatten
from moe_jax.errors import UserError, si
from moe_jax.kernels import platform
from moe_jax.kernels.chips import CHIPS
from moe_jax.model.pattern import bias_shape, layer_kinds, moe_layers
from moe_jax.model.transformer import abstract_params, forward
from moe_jax.moe import validation
from moe_jax.moe.routing import Tokens


class Counts(NamedTuple):
  """The size of a model, and the work of training it."""

  total: int  # parameters
  active: int  # parameters that one token uses, embedding and output head included
  flops_per_token: float  # of training: forward and backward
  embedding: int  # parameters of the embedding and the output head alone


def parameters(model: Model) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
  """Returns {path in the Transformer: shape} of every parameter; nothing is allocated."""
  leaves = jax.tree_util.tree_leaves_with_path(abstract_params(model))
  return {sharding.path_of(path): shape for path, shape in leaves}


def count(config: Config) -> Counts:
  """Counts the parameters of a config's model, and the FLOPs of a token of a full sequence."""
  model, moe = config.model, config.model.moe
  total = active = embedding = matmul = 0
  for path, shape in parameters(model).items():
    name, size = path[-1], math.prod(shape.shape)
    letters = name.rsplit("_", 1)[-1]
    active_size = size * moe.top_k // moe.num_experts if letters.startswith("E") else size
    total += size
    active += active_size
    embedding += size if name in ("embed_VD", "head_DV") else 0
    # Looking up an embedding multiplies nothing, but a tied embedding is the output head too.
    if sharding.is_matrix(name) and (name != "embed_VD" or model.tied_head):
      matmul += active_size
  # Two products, of each query with the keys that it sees.
  kinds, delta = layer_kinds(model), model.delta
  keys = mean_keys(config) * sum(not kind.delta for kind in kinds)
  mixing = model.num_heads * (model.head_dim + model.value_dim) * keys
  # Three products with the state: what a key finds, what it writes, and what the query reads.
  state = delta.value_heads * delta.key_dim * delta.value_dim
  mixing += 3 * state * sum(kind.delta for kind in kinds)
  flops = 3 * (2 * matmul + 2 * mixing)
  return Counts(total, active, flops, embedding)


def mean_keys(config: Config) -> float:
  """Returns how many keys a query sees on average over the layers that have attention."""
  kinds = [kind for kind in layer_kinds(config.model) if not kind.delta]
  keys = [_mean_keys(config.data.seq_len, kind.mask.window) for kind in kinds]
  return sum(keys) / max(len(keys), 1)


def _mean_keys(length: int, window: int) -> float:
  """Returns how many keys a query of a row sees on average, itself included."""
  window = min(window or length, length)
  return window - window * (window - 1) / (2 * length)


def state_bytes(config: Config, optimizer_state: Any) -> int:
  """Returns the bytes per device of weights, gradients and the optimizer's state.

  `optimizer_state` is the state as shapes, because this folder does not import the optimizers.
  """
  params = abstract_params(config.model)
  return _bytes_per_device(config, (params, params, optimizer_state), params)


def _bytes_per_device(config: Config, state: Any, params: Any) -> int:
  shardings = sharding.param_shardings(state, _abstract_mesh(config.mesh), params)
  return sum(
    math.prod(placed.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf, placed in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True)
  )


def check_training_memory(config: Config, optimizer_state: Any) -> None:
  """Refuses a run that cannot fit the memory of a device; nothing is allocated.

  What is counted is the least that any compiler needs, so that no run is refused that would fit:
  weights, the optimizer's state, and the gradients or the activations, because the memory of an
  activation can be used again for a gradient.

  Args:
    config: of the run; its mesh is resolved.
    optimizer_state: as shapes.

  Raises:
    UserError: names the fields to change.
  """
  optimizer, data = config.optimizer.name.value, config.data
  params = abstract_params(config.model)
  weights = _bytes_per_device(config, params, params)
  state = _bytes_per_device(config, (params, optimizer_state), params)
  refuse_over_memory(
    weights + state, f"weights, gradients and the state of {optimizer}", _smaller_model(config)
  )
  refuse_over_memory(
    state + activation_bytes(config) / config.mesh.tensor,
    f"weights, the state of {optimizer} and activations (config.model.remat="
    f"{config.model.remat.value})",
    f"lower config.data.batch_size={data.batch_size}, config.data.seq_len={data.seq_len} or "
    f"config.model.num_layers={config.model.num_layers}, or raise config.train.accumulation="
    f"{config.train.accumulation}",
  )
  check_evaluation_memory(config, state)


def check_evaluation_memory(config: Config, state: int = 0) -> None:
  """Refuses an evaluation whose float32 logits cannot fit a device, beside its weights.

  Args:
    config: its mesh is resolved.
    state: bytes of weights and an optimizer's state; 0 where there are the weights alone.
  """
  data, mesh = config.data, config.mesh
  state = state or check_weights_memory(config)
  batch = config.eval.batch_size or data.batch_size // config.train.accumulation
  tokens = batch // mesh.sequences * data.seq_len // mesh.context
  refuse_over_memory(
    state + 4 * tokens * config.model.vocab_size / mesh.tensor,
    f"weights and the logits of an evaluation of {batch} sequences at a time",
    f"lower config.eval.batch_size={config.eval.batch_size} (0: the training microbatch) or "
    f"config.data.seq_len={data.seq_len}",
  )


def check_weights_memory(config: Config) -> int:
  """Returns the bytes of the weights on each device; refuses a model of which they do not fit."""
  params = abstract_params(config.model)
  weights = _bytes_per_device(config, params, params)
  refuse_over_memory(weights, "weights", _smaller_model(config))
  return weights


def refuse_over_memory(size: float, what: str, remedy: str) -> None:
  """Raises a UserError if `what`, of that many bytes, does not fit the memory of a device."""
  memory = platform.memory_bytes()
  if memory is not None and size > memory:
    raise UserError(
      f"{what}: at least {gib(size)} on each device, which has {gib(memory)}; {remedy}"
    )


# The field that says the size of a dimension, by its letter in a parameter's name.
_FIELDS = {
  "Z": "model.num_layers", "V": "model.vocab_size", "E": "model.moe.num_experts", "D": "model.dim",
  "H": "model.num_heads", "G": "model.num_kv_heads", "A": "model.head_dim",
  "Q": "model.latent.query_dim", "W": "model.latent.kv_dim", "J": "model.delta.key_heads",
  "O": "model.delta.value_heads",
}  # fmt: skip


def _smaller_model(config: Config) -> str:
  """Names the fields that make the largest parameter as large as it is."""
  path, _ = max(parameters(config.model).items(), key=lambda item: math.prod(item[1].shape))
  letters = "Z" * (path[0] == "scans") + path[-1].rsplit("_", 1)[-1]
  hidden = ["model.ffn_dim"]
  if "E" in letters:
    hidden = ["model.moe.expert_dim"]
  elif "shared" in path:
    width = "shared_dim" if config.model.moe.shared_dim else "expert_dim"
    hidden = ["model.moe.shared_experts", f"model.moe.{width}"]
  together = "model.delta.value_heads" if "J" in letters else "model.latent.value_dim"
  fields = {letter: [name] for letter, name in _FIELDS.items()} | {"F": hidden, "Y": [together]}
  names = [name for letter in letters for name in fields.get(letter, [])]
  values = flatten(config)
  lower = " or ".join(f"config.{name}={values[name]}" for name in names)
  return f"lower {lower}, or take more devices (config.mesh)"


def _abstract_mesh(mesh: Mesh) -> jax.sharding.AbstractMesh:
  """Returns the mesh without its devices; an axis that is not resolved (-1) counts as 1."""
  sizes = tuple(max(getattr(mesh, axis), 1) for axis in sharding.AXES)
  types = (jax.sharding.AxisType.Auto,) * len(sizes)
  return jax.sharding.AbstractMesh(sizes, sharding.AXES, axis_types=types)


@functools.cache  # a start asks twice, and tracing takes a second
def activation_bytes(config: Config) -> float:
  """Returns the bytes per device that the forward pass saves for the backward pass.

  The remat policy of the config applies. `auto` experts count as `blocked`, because kernels are not
  measured here.
  """
  if config.model.moe.grouped_matmul is GroupedMatmul.AUTO:
    config = override(config, {"model.moe.grouped_matmul": GroupedMatmul.BLOCKED})
  model, mesh = config.model, config.mesh
  offloads = model.remat is Remat.OFFLOAD
  if offloads:  # what `full` keeps is the layers' inputs
    model = dataclasses.replace(model, remat=Remat.FULL)
  batch = config.data.batch_size // config.train.accumulation // mesh.sequences
  length = config.data.seq_len // mesh.context
  tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
  params = abstract_params(model)

  def residuals(params: Any, tokens: jax.Array) -> Any:
    def logits(params: Any) -> jax.Array:
      segments, key = jnp.ones_like(tokens), jax.random.key(0)
      bias_ZE = jnp.zeros(bias_shape(model))
      batch = Tokens(ids_BL=tokens, segments_BL=segments, positions_BL=tokens)
      return forward(model, params, bias_ZE, batch, key, train=True).logits_BLV

    return jax.vjp(logits, params)[1]

  with jax.sharding.use_abstract_mesh(_abstract_mesh(Mesh())):
    saved = jax.tree.leaves(jax.eval_shape(residuals, params, tokens))
  # The backward pass reads each weight too, also in the compute dtype; state_bytes counts them.
  dtypes = {jnp.dtype(jnp.float32), jnp.dtype(model.compute_dtype.value)}
  weights = collections.Counter(
    (p.shape, dtype) for p in jax.tree.leaves(params) for dtype in dtypes
  )
  kept = collections.Counter((s.shape, s.dtype) for s in saved if s.dtype != jax.dtypes.float0)
  kept.subtract(weights)
  inputs = (batch, length, model.dim)
  return sum(
    max(n, 0) * math.prod(shape) * dtype.itemsize
    for (shape, dtype), n in kept.items()
    if not (offloads and shape[1:] == inputs)
  )


def cost_report(config: Config, optimizer_state: Any, device: str = "") -> str:
  """Describes the size and the cost in some lines; `optimizer_state` is that of `state_bytes`.

  Of a `device` of chips.CHIPS, which need not be here, it says whether what is counted fits.
  """
  counts, model, mesh = count(config), config.model, config.mesh
  layers = moe_layers(model)
  kind = (
    f"{len(layers)} of {model.num_layers} layers with {model.moe.num_experts} experts, "
    f"top-{model.moe.top_k}"
    if layers
    else f"dense, {model.num_layers} layers"
  )
  state, activations = state_bytes(config, optimizer_state), activation_bytes(config)
  lines = [
    f"model              {kind}",
    f"parameters         {si(counts.total)} total, {si(counts.active)} active per token "
    f"({100 * counts.active / counts.total:.1f}%) with embedding and head, as Mixtral counts",
    f"                   {si(counts.total - counts.embedding)} total, "
    f"{si(counts.active - counts.embedding)} active without both, as Qwen counts (non-embedding)",
    f"                   {si(counts.active - model.vocab_size * model.dim)} active without the "
    "embedding alone, as gpt-oss counts",
    f"FLOPs per token    {si(counts.flops_per_token)} in training "
    f"(forward {si(counts.flops_per_token / 3)}), sequence {config.data.seq_len}",
    f"memory per device  {gib(state)} weights, gradients and "
    f"{config.optimizer.name.value} in float32, "
    f"+ {gib(activations)} activations kept (remat={model.remat.value}), "
    f"on {mesh.devices} device(s)",
  ]
  if device:
    needed, memory = state + activations, CHIPS[device].memory
    verdict = "fits" if needed <= memory else "does not fit"
    lines.append(f"{device:<19}{verdict}: {gib(needed)} and temporary arrays, of its {gib(memory)}")
  for phase in ("training", "evaluation"):
    leak = validation.future_leak(model.moe, train=phase == "training")
    if leak:
      lines.append(f"not causal         in {phase}, so its loss looks too good: {leak}")
  return "\n".join(lines)


def gib(number: float) -> str:
  """Formats a number of bytes in GiB, in MiB if it is less than one, or in TiB."""
  if number >= 2**40:
    return f"{number / 2**40:.2f} TiB"
  return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"
