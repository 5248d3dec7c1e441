"""Lowers and compiles a run's own programs for devices that are not here."""

import functools
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax import sharding
from moe_jax.compile import flops as flops_lib
from moe_jax.compile import program as program_lib
from moe_jax.compile import targets
from moe_jax.compile.targets import Target
from moe_jax.config import Config, Remat, override
from moe_jax.data import pipeline
from moe_jax.errors import UserError
from moe_jax.inference import decoding, generate, sampling
from moe_jax.model import cost
from moe_jax.model.cost import gib
from moe_jax.model.pattern import bias_shape
from moe_jax.model.transformer import abstract_params
from moe_jax.moe import validation
from moe_jax.start import flags, progress
from moe_jax.storage import checkpoint
from moe_jax.training import setup as setup_lib
from moe_jax.training import step as step_lib

MODES = ("train", "prefill", "decode")


class Memory(NamedTuple):
  """Bytes on each device, as the compiler counts them."""

  arguments: int
  outputs: int
  temporaries: int
  aliased: int  # of the outputs, which take the place of arguments

  @property
  def peak(self) -> int:
    """All of it at once."""
    return self.arguments + self.outputs + self.temporaries - self.aliased


class Compiled(NamedTuple):
  """A program, and what is known of it."""

  config: Config  # with its mesh resolved
  mesh: jax.sharding.Mesh
  tokens: int  # of a step, on all devices
  flops: flops_lib.Flops
  hlo: str
  program: program_lib.Program
  memory: Memory
  seconds: float  # of compiling
  flags: list[flags.Flag]


class DoesNotFitError(UserError):
  """The compiler found no way to run the program in the memory of the devices."""


def compile_for(
  config: Config,
  target: Target,
  mode: str,
  say: Callable[[str], None],
  set_flags: list[flags.Flag] | None = None,
  here: Sequence[jax.Device] = (),
) -> Compiled:
  """Compiles a run's step for devices that need not be here.

  Args:
    config: of the run; its mesh may leave one axis open.
    target: the devices.
    mode: "train", a training step; "prefill", the first pass over data.batch_size prompts of
      data.seq_len tokens; "decode", a step for as many rows whose cache has room for seq_len.
    say: prints a line of progress.
    set_flags: of the compiler, by default those that a run on the devices would set.
    here: the devices, where they are this machine's.

  Raises:
    DoesNotFitError: the memory of a device does not suffice.
    UserError: the config does not suit the devices, the step does not reuse the memory of its
      state, or the remat policy saves as much as none.
  """
  if mode != "train":
    config = override(config, {"mesh": sharding.of_whole_sequences(config.mesh)})
  config = validation.resolve_mesh(config, target.devices)
  if set_flags is None:
    set_flags = flags.flags_of(target.family, config, target.slices)
  mesh = sharding.make_mesh(config.mesh, here or targets.devices(target))
  if mode == "train":
    check_remat(config)
  with jax.set_mesh(mesh):
    if mode == "train":
      traced, tokens = train_step(config, mesh)
    else:
      traced, tokens = _inference(config, mesh, mode)
    say(f"traced; compiling for {target.devices} devices, which takes minutes for a large model")
    counted = flops_lib.count(traced.jaxpr, cost.mean_keys(config))
    start = time.monotonic()
    try:
      with progress.waiting("compiling"):
        compiled = traced.lower().compile(compiler_options=flags.compiler_options(set_flags))
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      used = re.search(r"Used ([\d.]+\w) of ([\d.]+\w) hbm", str(error)) or re.search(
        r"temporaries \(([\d.]+\w)\) exceeds available HBM \(([\d.]+\w)\)", str(error)
      )
      needs = f"{used[1]}iB of {used[2]}iB" if used else " ".join(str(error).split())[:200]
      raise DoesNotFitError(f"it needs {needs} on each device") from None
    seconds = time.monotonic() - start
  memory = memory_of(compiled)
  check_donation(memory, mode)
  if memory.peak > target.chip.memory:
    raise DoesNotFitError(
      f"it needs {gib(memory.peak)} of {gib(target.chip.memory)} on each device"
    )
  hlo = compiled.as_text()
  read = program_lib.read_program(hlo, dict(mesh.shape))
  return Compiled(config, mesh, tokens, counted, hlo, read, memory, seconds, set_flags)


def train_step(config: Config, mesh: jax.sharding.Mesh) -> tuple[Any, int]:
  """Returns the traced training step of a config on the mesh in force, and its tokens."""
  setup = setup_lib.make(config, mesh)
  rows = NamedSharding(mesh, PartitionSpec(sharding.SEQUENCE_AXES))
  size = (config.data.batch_size, config.data.seq_len)
  tokens_BL = jax.ShapeDtypeStruct(size, np.int32, sharding=rows)
  batch = pipeline.Batch(*[tokens_BL] * len(pipeline.Batch._fields))
  state = checkpoint.abstract(setup.shapes, setup.shardings)
  return step_lib.compile_step(setup).trace(state, batch), size[0] * size[1]


def _inference(config: Config, mesh: jax.sharding.Mesh, mode: str) -> tuple[Any, int]:
  model = decoding.for_inference(config.model)
  B, L = config.data.batch_size, config.data.seq_len
  bias_ZE = jax.ShapeDtypeStruct(bias_shape(model), jnp.float32)
  unstacked = functools.partial(decoding.unstacked, model)
  shapes = jax.eval_shape(unstacked, abstract_params(model), bias_ZE)
  placed = sharding.param_shardings(shapes, mesh, spread=False)
  weights = checkpoint.abstract(shapes, placed)
  rows = NamedSharding(mesh, PartitionSpec(sharding.BATCH_AXES))

  def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=rows if shape else None)

  number_B, done_B = array((B,), jnp.int32), array((B,), jnp.bool_)
  number, seed = array((), jnp.int32), array((), jnp.uint32)
  draw, greedy = sampling.options(0.0, 0, 1.0, model.vocab_size)
  options: dict[str, Any] = dict(model=model, num_ids=model.vocab_size, ends=(0,), kind=greedy)
  prefill = jax.jit(functools.partial(generate.prefill, slots=L, **options))
  prompts = (weights, array((B, L), jnp.int32), number_B, done_B, seed, draw)
  if mode == "prefill":
    return prefill.trace(*prompts), B * L
  cache = jax.eval_shape(prefill, *prompts)[0]
  decode = jax.jit(functools.partial(generate.decode, **options), donate_argnames="cache")
  return decode.trace(weights, cache, number_B, done_B, seed, number, number, draw), B


def memory_of(compiled: jax.stages.Compiled) -> Memory:
  """Returns the memory of a compiled program."""
  usage: Any = compiled.memory_analysis()
  return Memory(
    usage.argument_size_in_bytes,
    usage.output_size_in_bytes,
    usage.temp_size_in_bytes,
    usage.alias_size_in_bytes,
  )


def check_donation(memory: Memory, mode: str) -> None:
  """Refuses a program whose results do not take the place of the arguments that they replace."""
  kept = memory.outputs - memory.aliased
  if mode != "prefill" and kept > 0.05 * memory.outputs + 2**16:  # metrics, tokens
    raise UserError(
      f"the step returns {gib(memory.outputs)} on each device and reuses {gib(memory.aliased)} of "
      "its arguments: a donation is lost, so that state is in memory twice"
    )


def check_remat(config: Config) -> None:
  """Refuses a policy that saves no less than none: it names what nothing in the model is called."""
  if config.model.remat is Remat.NONE:
    return
  none = override(config, {"model.remat": Remat.NONE})
  kept, all_kept = cost.activation_bytes(config), cost.activation_bytes(none)
  if kept >= all_kept:
    raise UserError(
      f"config.model.remat={config.model.remat.value} keeps {gib(kept)} of activations on each "
      f"device, and none would keep {gib(all_kept)}: the policy does nothing"
    )
