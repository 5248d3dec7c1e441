"""What a training step should cost on a layout, from shapes alone: for ranking, before compiling.

A layout is a mesh, a remat policy, a number of microbatches and an exchange. What moves is what
kernels/gathered.py, kernels/context.py and moe/exchange.py move: weights are gathered along `fsdp`
(those of no expert along `expert` too) and their gradients scattered, rows go over `expert` and
back, keys and values are gathered along `context`, gradients are summed over `data` and `context`,
partial sums over `tensor`.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

from moe_jax import sharding
from moe_jax.compile import roofline
from moe_jax.compile.program import Collective
from moe_jax.compile.targets import Target, devices
from moe_jax.config import Config, Dispatch, Exchange, Remat, override
from moe_jax.errors import UserError
from moe_jax.model import cost
from moe_jax.model.pattern import moe_layers
from moe_jax.moe import dispatch, validation
from moe_jax.training import optimizers

_AGAIN = (Remat.FULL, Remat.OFFLOAD)  # compute all layers again for the backward pass
_BYTES = 2  # of a weight or an activation in bfloat16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Expected:
  """The expected cost of a training step with some layout."""

  config: Config
  memory: float  # bytes on each device
  times: roofline.Times
  mfu: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sizes:
  """Bytes of a model in bfloat16, and how its FLOPs divide."""

  expert: int  # all experts of a MoE layer
  other: int  # the rest of a layer, on average
  ends: int  # the embedding and the head
  expert_flops: float  # share of the model's FLOPs


def layouts(config: Config, target: Target) -> Iterator[Config]:
  """Yields the config with each layout that it can have on the devices."""
  moe, model = config.model.moe, config.model
  experts = _divisors(moe.num_experts or 1)
  tensors = [n for n in _divisors(model.num_kv_heads) if n <= 8]  # inside a host
  exchanges = [moe.exchange]
  if moe.num_experts and moe.dispatch is Dispatch.GROUPED:
    exchanges = [Exchange.ALL_GATHER, Exchange.ALL_TO_ALL, Exchange.RAGGED]
  # Of pieces of less than 2,048 tokens the gathers would take longer than the work between them.
  contexts = [n for n in _divisors(target.devices) if n <= max(1, config.data.seq_len // 2**12)]
  for expert, context, tensor in itertools.product(experts, contexts, tensors):
    rest, over = divmod(target.devices, expert * context * tensor)
    for fsdp in _divisors(rest) if not over else ():
      mesh = {"data": rest // fsdp, "fsdp": fsdp, "expert": expert}
      mesh |= {"context": context, "tensor": tensor}
      for remat in (Remat.NONE, Remat.DOTS, Remat.FULL):  # transfers to the host are not known
        for accumulation in (1, 2, 4, 8, 16):
          for exchange in exchanges if expert > 1 else exchanges[:1]:
            fields: dict[str, Any] = {f"mesh.{axis}": n for axis, n in mesh.items()}
            fields |= {"model.remat": remat, "train.accumulation": accumulation}
            fields |= {"model.moe.exchange": exchange}
            try:
              changed = override(config, fields)
              validation.validate(changed)
              _mesh(changed.mesh, target)
            except UserError:  # it splits something that does not split
              continue
            yield changed


def expect(config: Config, target: Target) -> Expected:
  """Returns the expected cost of a config's training step; its mesh is resolved."""
  mesh, sizes, accumulation = config.mesh, _sizes(config), config.train.accumulation
  tokens = config.data.batch_size * config.data.seq_len
  counts = cost.count(config)
  useful = counts.flops_per_token * tokens
  passes = _passes(config)
  slots = _slots_per_assignment(config)
  # Outputs of slots, whose gates are in them, are not computed again.
  spared = 1 / 3 if _in_slots(config) and config.model.remat in _AGAIN else 0.0
  experts = sizes.expert_flops * slots * (passes + 2 - spared)
  flops = useful / 3 * (experts + (1 - sizes.expert_flops) * (passes + 2)) / target.devices
  # XLA for GPU sums whole gradients in float32.
  wide = 1 if target.chip.tpu else 2
  moved = list(_collectives(config, sizes, tokens // target.devices * mesh.tensor, wide))
  groups = {one.axes: _group(mesh, one.axes, target) for one in moved}
  state = cost.state_bytes(config, _optimizer_state(config))
  local = tokens // accumulation / (target.devices / mesh.tensor)
  # Each pass reads the gathered weights, the optimizer its state, of which it writes most.
  layer = sizes.expert / mesh.expert / mesh.tensor + sizes.other / mesh.tensor
  weights = layer * config.model.num_layers + sizes.ends / mesh.tensor
  memory_bytes = weights * (passes + 2) * accumulation + 2 * state
  times = roofline.times(
    flops=flops,
    custom_flops=0.0,
    memory_bytes=memory_bytes,
    cycles=0,
    collectives=moved,
    groups=groups,
    target=target,
  )
  tokens_of_logits = min(local, config.model.loss_chunk or local)
  # float32, forward and backward
  logits = 2 * 4 * tokens_of_logits * config.model.vocab_size / mesh.tensor
  rows = 4 * local * config.model.moe.top_k * slots * config.model.dim * _BYTES
  held = state + _activations(config) / mesh.tensor + logits + rows
  held += 2 * layer + 2 * sizes.ends / mesh.tensor  # a layer's weights and the next one's
  mfu = roofline.ceiling(useful, times.step, target)
  return Expected(config=config, memory=held, times=times, mfu=mfu)


def fields(config: Config) -> str:
  """Returns the words of a layout, to be added to a command."""
  mesh = config.mesh
  words = {f"mesh.{axis}": str(getattr(mesh, axis)) for axis in sharding.AXES}
  words |= {"model.remat": config.model.remat.value}
  words |= {"train.accumulation": str(config.train.accumulation)}
  if config.model.moe.dispatch is Dispatch.GROUPED and mesh.expert > 1:
    words |= {"model.moe.exchange": config.model.moe.exchange.value}
  return " ".join(f"--config.{name}={value}" for name, value in words.items())


def _divisors(n: int) -> list[int]:
  return [d for d in range(1, n + 1) if not n % d]


def _passes(config: Config) -> float:
  """Returns how many forward passes a step computes, those again for the backward pass included."""
  again = config.model.remat in _AGAIN
  return 1 + again + (config.train.accumulation > 1)


def _in_slots(config: Config) -> bool:
  return config.model.moe.num_experts > 0 and config.model.moe.dispatch is Dispatch.GATHER


def _slots_per_assignment(config: Config) -> float:
  """Returns the rows that the experts compute, as a multiple of the assignments."""
  moe = config.model.moe
  if not moe.num_experts or moe.dispatch is Dispatch.GROUPED:
    return 1.0
  if moe.dispatch is Dispatch.DENSE:
    return moe.num_experts / moe.top_k
  return dispatch.capacity_factor(moe, train=True)


@functools.cache
def _model_sizes(model: Any) -> dict[str, int]:
  """Returns the parameters of all experts, of the ends, and of the rest."""
  found = {"expert": 0, "ends": 0, "other": 0}
  for path, shape in cost.parameters(model).items():
    letters = path[-1].rsplit("_", 1)[-1]
    kind = "expert" if letters.startswith("E") else "other"
    found["ends" if path[-1] in ("embed_VD", "head_DV") else kind] += math.prod(shape.shape)
  return found


def _sizes(config: Config) -> _Sizes:
  found, model, moe = _model_sizes(config.model), config.model, config.model.moe
  layers = len(moe_layers(model))
  active = found["expert"] * moe.top_k / max(moe.num_experts, 1)
  counts = cost.count(config)
  return _Sizes(
    expert=_BYTES * found["expert"] // max(layers, 1),
    other=_BYTES * found["other"] // model.num_layers,
    ends=_BYTES * found["ends"],
    expert_flops=6 * active / counts.flops_per_token,
  )


def _collectives(config: Config, sizes: _Sizes, tokens: int, wide: int) -> Iterator[Collective]:
  """Yields what a step moves.

  Args:
    config: with the layout.
    sizes: of the model.
    tokens: of one device, all microbatches together.
    wide: how many times as large as a weight the gradient is that is summed over `data`.
  """
  mesh, model, moe = config.mesh, config.model, config.model.moe
  accumulation, passes = config.train.accumulation, _passes(config)
  layers, experts = model.num_layers, len(moe_layers(config.model))
  # A layer's weights are gathered for each forward pass, and again for the backward pass.
  gathers = round(passes + (mesh.fsdp > 1 and model.remat not in _AGAIN)) * accumulation
  expert = round(sizes.expert / mesh.expert / mesh.tensor)
  other, ends = round(sizes.other / mesh.tensor), round(sizes.ends / mesh.tensor)
  if mesh.fsdp > 1:
    yield Collective("all-gather", ("fsdp",), "experts", expert, experts * gathers)
    yield Collective("reduce-scatter", ("fsdp",), "experts", expert, experts * accumulation)
  spread = tuple(axis for axis in ("fsdp", "expert") if getattr(mesh, axis) > 1)
  if spread:
    yield Collective("all-gather", spread, "", other, layers * gathers)
    yield Collective("reduce-scatter", spread, "", other, layers * accumulation)
    yield Collective("all-gather", spread, "", ends, accumulation * round(passes))
    yield Collective("reduce-scatter", spread, "", ends, accumulation)
  copies = tuple(axis for axis in ("data", "context") if getattr(mesh, axis) > 1)
  if copies:
    part = expert * experts / mesh.fsdp + (other * layers + ends) / mesh.fsdp / mesh.expert
    yield Collective("all-reduce", copies, "", round(wide * part), accumulation)
  if mesh.context > 1:
    values = model.latent.value_dim or model.head_dim
    heads = model.num_kv_heads * (model.head_dim + values) // mesh.tensor
    keys = _BYTES * heads * tokens * mesh.context // accumulation
    yield Collective("all-gather", ("context",), "", keys, layers * round(passes) * accumulation)
    yield Collective("reduce-scatter", ("context",), "", keys, layers * accumulation)
  row = model.dim * _BYTES * tokens // accumulation
  slots = moe.dispatch is not Dispatch.GROUPED
  # There and back, forward and backward; what is computed again needs no outputs of slots.
  again = (1 if _in_slots(config) else 2) * (model.remat in _AGAIN) + 2 * (accumulation > 1)
  times = accumulation * experts * (4 + again)
  if mesh.expert > 1 and moe.num_experts:
    rows = round(row * moe.top_k * _slots_per_assignment(config))
    if not slots and moe.exchange is Exchange.ALL_GATHER:
      for kind in ("all-gather", "reduce-scatter"):
        yield Collective(kind, ("expert",), "exchange", row * mesh.expert, times // 2)
    else:
      kind = "all-to-all" if slots or moe.exchange is Exchange.ALL_TO_ALL else "ragged-all-to-all"
      yield Collective(kind, ("expert",), "exchange", rows, times)
  if mesh.tensor > 1:
    yield Collective(
      "all-reduce", ("tensor",), "", row, 2 * layers * accumulation * round(passes + 1)
    )


@functools.cache
def _group(mesh: Any, axes: tuple[str, ...], target: Target) -> roofline.Group:
  return roofline.group_of(_mesh(mesh, target), axes, target)


@functools.cache
def _mesh(mesh: Any, target: Target) -> Any:
  return sharding.make_mesh(mesh, devices(target))


def _optimizer_state(config: Config) -> Any:
  return _state_of(config.model, config.optimizer, config.train)


@functools.cache
def _state_of(model: Any, optimizer: Any, train: Any) -> Any:
  return optimizers.abstract_state(Config(model=model, optimizer=optimizer, train=train))


@functools.cache
def _kept(model: Any, rows: int, length: int) -> float:
  """Returns the bytes that `rows` sequences keep for the backward pass, on one device."""
  data = {"data.batch_size": rows, "data.seq_len": length}
  return cost.activation_bytes(override(Config(model=model), data))


def _activations(config: Config) -> float:
  mesh = config.mesh
  rows = config.data.batch_size // config.train.accumulation
  length = config.data.seq_len // mesh.context
  return _kept(config.model, max(rows // mesh.sequences, 1), length)


def fits(expected: Expected, target: Target) -> bool:
  """Returns whether a step is expected to fit; a tenth is left for what is not counted."""
  return expected.memory <= 0.9 * target.chip.memory


def ranked(config: Config, target: Target) -> list[Expected]:
  """Returns the layouts that a config can have, the best first, and those that do not fit last.

  Of layouts that are equally fast, the one that needs the least memory comes first.
  """
  found = [expect(layout, target) for layout in layouts(config, target)]
  return sorted(found, key=lambda e: (not fits(e, target), round(e.times.step, 3), e.memory))
