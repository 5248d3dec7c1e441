"""The facts of a run, made once: mesh, optimizer, layers, cost, and the state that it trains."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from moe_jax import sharding
from moe_jax.config import Config
from moe_jax.kernels import choose
from moe_jax.model import cost
from moe_jax.model.pattern import bias_shape, moe_layers
from moe_jax.model.transformer import Transformer
from moe_jax.moe import validation
from moe_jax.start import startup
from moe_jax.training import optimizers


class TrainState(NamedTuple):
  """All that one step hands to the next. A checkpoint holds it and the data iterator."""

  step: jax.Array  # int32 [], the number of steps taken
  params: Any  # nnx state of a Transformer
  opt_state: Any
  bias_ZE: jax.Array  # float32, the bias of loss-free balancing; zeros where it is off
  load_ZE: jax.Array  # float32, running mean of each expert's share of its layer's assignments


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
  """What follows from a config and the devices that it runs on."""

  config: Config  # checked, with its mesh resolved
  mesh: jax.sharding.Mesh
  optimizer: optax.GradientTransformation
  schedule: optax.Schedule  # step -> learning rate
  moe_layers: list[int]  # index in the network of each MoE layer, in the order of Z
  counts: cost.Counts  # parameters and FLOPs
  shapes: TrainState  # of the state, without its arrays
  shardings: TrainState  # of the state on the mesh
  init: Callable[[], TrainState]  # compiled: makes the state of step 0 on the mesh


def prepare(config: Config) -> Setup:
  """Starts jax, and returns the setup of a run on all devices.

  Raises:
    UserError: the config does not fit the devices, or a kernel that it names does not run here.
  """
  startup.start(config)
  config = validation.resolve_mesh(config, jax.device_count())
  choose.check_kernels(config)
  made = make(config, sharding.make_mesh(config.mesh))
  cost.check_training_memory(config, made.shapes.opt_state)
  return made


def make(config: Config, mesh: jax.sharding.Mesh) -> Setup:
  """Returns the setup of a checked config on a mesh of its sizes; allocates nothing."""
  optimizer = optimizers.make_optimizer(config.optimizer, config.train.steps)

  def new_state() -> TrainState:
    model = Transformer(config.model, nnx.Rngs(jax.random.key(config.train.seed)))
    params = nnx.state(model, nnx.Param)
    bias_ZE = jnp.zeros(bias_shape(config.model))
    load_ZE = jnp.full_like(bias_ZE, 1 / bias_ZE.shape[1])
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), bias_ZE, load_ZE)

  shapes = jax.eval_shape(new_state)
  shardings = sharding.param_shardings(shapes, mesh, shapes.params)
  return Setup(
    config=config,
    mesh=mesh,
    optimizer=optimizer,
    schedule=optimizers.schedule(config.optimizer, config.train.steps),
    moe_layers=moe_layers(config.model),
    counts=cost.count(config),
    shapes=shapes,
    shardings=shardings,
    init=jax.jit(new_state, out_shardings=shardings),  # its weights do not depend on the mesh
  )
