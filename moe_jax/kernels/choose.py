"""Chooses the kernels of a run once, before the model is traced; train.py prints and records them.

`auto` becomes the platform's attention kernel, and the fastest experts kernel whose values and
gradients agree with the reference. Speed is measured at the run's own sizes; agreement on at most
512 rows, because the reference may do E times the arithmetic. A resumed run takes the kernels that
its workdir recorded, so that all parts of a run use the same ones. The first of several processes
decides for all, because they must compile the same program.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from moe_jax import sharding
from moe_jax.config import Attention, Config, Dispatch, Exchange, GroupedMatmul, Model
from moe_jax.config.fields import flatten
from moe_jax.errors import UserError
from moe_jax.kernels import context, platform
from moe_jax.kernels import mask as mask_lib
from moe_jax.kernels.activation import gated
from moe_jax.kernels.attention import ATTENTION_KERNELS
from moe_jax.kernels.attention import choose_attention as choose_attention
from moe_jax.kernels.experts import EXPERT_KERNELS, Experts
from moe_jax.kernels.mask import Mask

_COMPARED_ROWS = 512  # of a comparison with the reference
_ROUNDS = 3
# Allowed difference as a part of the array's largest element: kernels round and sum differently.
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}

Function = Callable[..., jax.Array]
Name = TypeVar("Name")


def check_kernels(config: Config) -> None:
  """Refuses a kernel or an exchange that the config names and that cannot run here.

  Args:
    config: of a run; its mesh is resolved.

  Raises:
    UserError: it does not run on this platform, or not with the run's sizes and mesh.
  """
  model, moe = config.model, config.model.moe
  grouped = moe.num_experts and moe.dispatch is Dispatch.GROUPED
  wrong = {}
  if model.attention is not Attention.AUTO:
    attention = ATTENTION_KERNELS[model.attention]
    refused = next(filter(None, (attention.refuses(*c) for c in _attention_cases(config))), "")
    wrong["model.attention"] = _not_for(attention.platforms) or (
      refused and f"it refuses {refused}"
    )
  if grouped and moe.grouped_matmul is not GroupedMatmul.AUTO:
    experts = EXPERT_KERNELS[moe.grouped_matmul]
    with jax.set_mesh(sharding.make_mesh(config.mesh)):
      wrong["model.moe.grouped_matmul"] = _not_for(experts.platforms) or experts.available()
  if grouped and config.mesh.expert > 1:
    wrong["model.moe.exchange"] = _exchange_refused(moe.exchange)
  fields = flatten(config)
  for field, reason in wrong.items():
    if reason:
      raise UserError(f"config.{field}={fields[field]}: {reason}; set it to auto")


def _exchange_refused(exchange: Exchange) -> str:
  if not platform.has_exchange(exchange):
    return f"it does not run on {platform.name()}"
  setting = platform.breaks_ragged() if exchange is Exchange.RAGGED else ""
  return setting and f"with {setting}, which you can drop, its gradients are NaN on a GPU"


def _not_for(platforms: tuple[str, ...]) -> str:
  here = platform.name()
  return "" if here in platforms else f"it runs on {' and '.join(platforms)}, not on {here}"


def resolve(config: Config, recorded: dict[str, str]) -> tuple[Config, dict[str, str], list[str]]:
  """Replaces every `auto` of a kernel in the config.

  Args:
    config: of the run; its mesh is resolved.
    recorded: the record that an earlier start of this run returned, {} for none. It decides where
      the config says `auto`. On another kind of device it is ignored and kernels are chosen anew.

  Returns:
    The config; the record for the workdir; lines to print.

  Raises:
    UserError: a kernel that the config names cannot run on this device.
  """
  check_kernels(config)
  device = jax.devices()[0].device_kind
  model, moe, lines = config.model, config.model.moe, []
  if recorded and recorded["device"] != device:
    lines.append(f"kernels            chosen anew, because the run began on {recorded['device']}")
    recorded = {}
  recorded = {operation: name for operation, name in recorded.items() if name != "auto"}
  attention, line = _attention_of_run(config, recorded.get("attention", ""))
  lines.append(f"attention          {line}")
  grouped_matmul, exchange = moe.grouped_matmul, moe.exchange
  if moe.num_experts and moe.dispatch is Dispatch.GROUPED:
    grouped_matmul, line = _experts_of_run(config, recorded.get("grouped_matmul", ""))
    lines.append(f"grouped matmul     {line}")
    before = recorded.get("exchange", "")
    line = _named(exchange.value, before)
    if exchange is Exchange.AUTO:
      exchange = Exchange(before or platform.default_exchange().value)
      if config.mesh.expert > 1 and _exchange_refused(exchange):
        exchange = platform.default_exchange()
      line = exchange.value
    lines.append(f"exchange           {line}")
  moe = dataclasses.replace(moe, grouped_matmul=grouped_matmul, exchange=exchange)
  model = dataclasses.replace(model, attention=attention, moe=moe)
  names = {"attention": attention, "grouped_matmul": grouped_matmul, "exchange": exchange}
  record = {"device": device} | {name: kernel.value for name, kernel in names.items()}
  return dataclasses.replace(config, model=model), record, lines


def for_reading(model: Model, recorded: dict[str, str]) -> Model:
  """Returns the model with the kernels that its run recorded, for evaluation and generation.

  On another kind of device than the run's, `auto` remains, and it replaces a kernel or an exchange
  that does not run on this platform.
  """
  here, moe = platform.name(), model.moe
  attention, grouped_matmul = model.attention, moe.grouped_matmul
  if recorded.get("device") == jax.devices()[0].device_kind:
    attention = Attention(recorded["attention"])
    grouped_matmul = GroupedMatmul(recorded["grouped_matmul"])
  if attention in ATTENTION_KERNELS and here not in ATTENTION_KERNELS[attention].platforms:
    attention = Attention.AUTO
  if grouped_matmul in EXPERT_KERNELS and here not in EXPERT_KERNELS[grouped_matmul].platforms:
    grouped_matmul = GroupedMatmul.AUTO
  exchange = moe.exchange if platform.has_exchange(moe.exchange) else Exchange.AUTO
  moe = dataclasses.replace(moe, grouped_matmul=grouped_matmul, exchange=exchange)
  return dataclasses.replace(model, attention=attention, moe=moe)


def _named(name: str, recorded: str) -> str:
  """Returns the line to print about a choice that the config names."""
  before = f"; until now the run used {recorded}" if recorded not in ("", name) else ""
  return f"{name}, which the config names{before}"


def _attention_cases(config: Config) -> list[tuple[Any, ...]]:
  """Returns the arguments of AttentionKernel.refuses for each mask that a layer has."""
  model = config.model
  batch, length = config.data.batch_size // config.train.accumulation, config.data.seq_len
  parts = config.mesh.context
  q_shape = (batch * parts, length // parts, model.num_heads, model.head_dim)
  k_shape = (batch, length, model.num_kv_heads, model.head_dim)
  dtype = jnp.dtype(model.compute_dtype.value)
  sinks_H = jnp.zeros(model.num_heads) if model.sinks else None
  layers = (False, True) if model.global_every and model.window else (False,)
  masks = [mask_lib.of_layer(model, is_global=is_global) for is_global in layers]
  part = context.Part(0, parts, None) if parts > 1 else None
  return [(q_shape, k_shape, dtype, m._replace(sinks_H=sinks_H, context=part)) for m in masks]


def _attention_of_run(config: Config, recorded: str) -> tuple[Attention, str]:
  model = config.model
  if model.attention is not Attention.AUTO:
    return model.attention, _named(model.attention.value, recorded)
  if recorded:
    return Attention(recorded), f"{recorded}, which the run began with"

  def decide() -> tuple[Attention, str]:
    cases = _attention_cases(config)
    for case in cases:
      name, line = choose_attention(platform.name(), *case)
      if name is Attention.REFERENCE:
        return name, line
    try:
      off = max(attention_difference(name, *case) for case in cases)
    except Exception as error:  # a library that is missing, or does not know this device
      why = str(error).splitlines()[0]
      return Attention.REFERENCE, f"reference, because {name.value} does not run here: {why}"
    if not off <= TOLERANCE[model.compute_dtype.value]:
      why = f"{name.value} differs from it by {off:.1e}"
      return Attention.REFERENCE, f"reference, because {why}"
    return name, f"{line}; differs from the reference by {off:.0e}"

  return _first_process_decides(decide, list(Attention))


def attention_difference(
  kernel: Attention,
  q_shape: tuple[int, ...],
  k_shape: tuple[int, ...],
  dtype: jnp.dtype,
  mask: Mask,
) -> float:
  """Returns how much `kernel` differs from the reference on a row of three documents.

  The arguments are those of attention.AttentionKernel.refuses; one row of the batch is compared.
  """
  q_shape, k_shape = (1, *q_shape[1:]), (1, *k_shape[1:])
  rng = np.random.default_rng(0)
  cuts = np.sort(rng.integers(0, k_shape[1], 2))
  with _one_device():
    segments_BL = jnp.asarray(1 + np.searchsorted(cuts, np.arange(k_shape[1]))[None], jnp.int32)
    if mask.context is not None:
      own_BL = segments_BL[:, mask.context.places(jnp.arange(q_shape[1]), q_shape[1])]
      mask = mask._replace(context=mask.context._replace(segments_BL=own_BL))
    shapes = (q_shape, k_shape, k_shape, q_shape)
    q, k, v, dy = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)

    def bound(name: Attention) -> Function:
      function = ATTENTION_KERNELS[name].function
      return lambda q, k, v: function(q, k, v, segments_BL, mask)

    return kernel_difference(bound(kernel), bound(Attention.REFERENCE), (q, k, v), dy)


def _experts_of_run(config: Config, recorded: str) -> tuple[GroupedMatmul, str]:
  moe = config.model.moe
  if moe.grouped_matmul is not GroupedMatmul.AUTO:
    return moe.grouped_matmul, _named(moe.grouped_matmul.value, recorded)
  if recorded:
    return GroupedMatmul(recorded), f"{recorded}, which the run began with"
  return _first_process_decides(lambda: _fastest_experts(config), list(GroupedMatmul))


def _fastest_experts(config: Config) -> tuple[GroupedMatmul, str]:
  """Returns the fastest kernel that agrees with the reference, and a line of measured numbers."""
  model, moe, mesh = config.model, config.model.moe, config.mesh
  dtype, D = jnp.dtype(model.compute_dtype.value), model.dim
  E, F = moe.num_experts // mesh.expert, moe.expert_dim // mesh.tensor
  tokens = config.data.batch_size // config.train.accumulation * config.data.seq_len
  rows = max(tokens * moe.top_k // (mesh.sequences * mesh.context), 1)
  candidates = [
    name
    for name, kernel in EXPERT_KERNELS.items()
    if platform.name() in kernel.tried_on and not kernel.available()
  ]
  seconds: dict[GroupedMatmul, float] = {}
  notes = []
  with _one_device():
    few = _trial(uneven_sizes(min(rows, _COMPARED_ROWS), E), D, F, dtype)
    rng = np.random.default_rng(0)
    many = _trial(rng.multinomial(rows, rng.dirichlet(np.full(E, 10.0))), D, F, dtype)
    for kernel in candidates:
      try:
        ours, theirs = (with_sizes(name, few.sizes_E) for name in (kernel, REFERENCE))
        off = kernel_difference(ours, theirs, few.arrays, few.dy_ND)
        if not off <= TOLERANCE[dtype.name]:
          notes.append(f"{kernel.value} differs from the reference by {off:.1e}")
        elif len(candidates) == 1:
          return kernel, f"{kernel.value}; differs from the reference by {off:.0e}"
        else:
          function = with_sizes(kernel, many.sizes_E)
          seconds[kernel] = _step_seconds(function, many.arrays, many.dy_ND)
          notes.append(f"{kernel.value} {1e3 * seconds[kernel]:.2f} ms")
      except Exception as error:  # a kernel that does not know this device or these sizes
        notes.append(f"{kernel.value} does not run here: {str(error).splitlines()[0]}")
  best = min(seconds, key=seconds.__getitem__, default=REFERENCE)
  return best, f"{best.value} ({', '.join(notes)}; {rows} rows)"


REFERENCE = GroupedMatmul.RAGGED_DOT


class _Trial(NamedTuple):
  """Random arguments of an experts kernel, with uneven loads."""

  arrays: tuple[jax.Array, ...]  # x_ND, gate_EDF, up_EDF, down_EFD
  sizes_E: jax.Array
  dy_ND: jax.Array


def uneven_sizes(N: int, E: int) -> np.ndarray:
  """Returns [E] sizes of groups of N rows: none, one, about a block of a kernel; then the rest."""
  sizes: list[int] = []
  for size in (257, 0, 1, 63, 65):  # what tells most first, where there is room for a few
    if len(sizes) < E - 1 and sum(sizes) + size <= N:
      sizes.append(size)
  rest = np.array_split(np.arange(N - sum(sizes)), E - len(sizes))
  return np.array([*sizes, *map(len, rest)])


def _trial(sizes: np.ndarray, D: int, F: int, dtype: jnp.dtype) -> _Trial:
  rng, N, E = np.random.default_rng(0), int(sizes.sum()), len(sizes)
  shapes = ((N, D), (E, D, F), (E, D, F), (E, F, D))
  arrays = tuple(jnp.asarray(rng.normal(size=s) * s[-2] ** -0.5, dtype) for s in shapes)
  dy_ND = jnp.asarray(rng.normal(size=(N, D)), dtype)
  return _Trial(arrays, jnp.asarray(sizes, jnp.int32), dy_ND)


def with_sizes(kernel: GroupedMatmul, sizes_E: jax.Array) -> Function:
  """Returns (x_ND, gate_EDF, up_EDF, down_EFD) -> y_ND of a kernel, for rows sorted by expert."""

  def experts(
    x_ND: jax.Array, gate_EDF: jax.Array, up_EDF: jax.Array, down_EFD: jax.Array
  ) -> jax.Array:
    weights = Experts(gate_EDF, up_EDF, down_EFD)
    return EXPERT_KERNELS[kernel].function(x_ND, weights, sizes_E, gated)

  return experts


def _with_gradients(function: Function) -> Function:
  def both(dy: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    y, vjp = jax.vjp(function, *arrays)
    return (y, *vjp(dy))

  return jax.jit(both)


def kernel_difference(
  function: Function, reference: Function, arrays: tuple[jax.Array, ...], dy: jax.Array
) -> float:
  """Returns the largest difference of values or gradients, as a part of the largest element."""
  ours, theirs = (
    [np.asarray(x, np.float32) for x in _with_gradients(f)(dy, *arrays)]
    for f in (function, reference)
  )
  return max(
    float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-9))
    for a, b in zip(ours, theirs, strict=True)
  )


def _step_seconds(function: Function, arrays: tuple[jax.Array, ...], dy: jax.Array) -> float:
  """Returns the seconds of one forward and backward pass, the least of `_ROUNDS`."""
  step = _with_gradients(function)
  jax.block_until_ready(step(dy, *arrays))
  seconds = []
  for _ in range(_ROUNDS):
    start = time.perf_counter()
    jax.block_until_ready(step(dy, *arrays))
    seconds.append(time.perf_counter() - start)
  return min(seconds)


def _one_device() -> Any:
  """Returns a context whose mesh is this process's first device: trials need no other process."""
  mesh = jax.make_mesh(
    (1,) * len(sharding.AXES),
    sharding.AXES,
    devices=jax.local_devices()[:1],
    axis_types=(jax.sharding.AxisType.Auto,) * len(sharding.AXES),
  )
  return jax.set_mesh(mesh)


def _first_process_decides(
  decide: Callable[[], tuple[Name, str]], names: list[Name]
) -> tuple[Name, str]:
  """Returns the decision of the first process; the line of other processes is empty."""
  if jax.process_count() == 1:
    return decide()
  name, line = decide() if jax.process_index() == 0 else (names[0], "")
  index = multihost_utils.broadcast_one_to_all(np.int32(names.index(name)))
  return names[int(index)], line
