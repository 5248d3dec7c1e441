"""The pure training step, and how it is compiled."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from moe_jax import sharding
from moe_jax.config import Config, OnNonfinite
from moe_jax.data import pipeline
from moe_jax.model import transformer
from moe_jax.moe import dispatch, routers
from moe_jax.moe.balance import updated_bias
from moe_jax.training import losses, metrics
from moe_jax.training.setup import Setup, TrainState

Step = Callable[[TrainState, pipeline.Batch[jax.Array]], tuple[TrainState, dict[str, jax.Array]]]


def train_step(
  state: TrainState, batch: pipeline.Batch[jax.Array], setup: Setup
) -> tuple[TrainState, dict[str, jax.Array]]:
  """Returns the state after one optimizer step, and the step's metrics.

  The function is pure: the same state and batch give the same result, on any mesh.
  """
  config = setup.config
  key = jax.random.fold_in(jax.random.key(config.train.seed), state.step)

  def loss_fn(params: Any) -> tuple[jax.Array, Any]:
    sums = batch_sums(params, state.bias_ZE, batch, key, config=config)
    all_losses = losses.total(sums, config.loss, len(setup.moe_layers))
    return all_losses.total, (all_losses, sums)

  grads, (all_losses, sums) = jax.grad(loss_fn, has_aux=True)(state.params)
  with jax.named_scope("optimizer"):
    updates, opt_state = setup.optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
  bias_ZE = updated_bias(state.bias_ZE, sums.moe.routed_E, config.model.moe.bias_update_rate)
  step_metrics = {
    "loss": all_losses.cross_entropy,
    "total_loss": all_losses.total,
    "load_balance": all_losses.load_balance,
    "router_z": all_losses.router_z,
    "z": all_losses.z,
    "param_norm": optax.tree.norm(params),
    "learning_rate": setup.schedule(state.step),
    "tokens": sums.targets,
  } | metrics.gradient_norms(grads)
  load_ZE = state.load_ZE
  if config.model.moe.num_experts:
    step_metrics["importance"] = all_losses.importance
    if routers.ROUTERS[config.model.moe.router].has_load:
      step_metrics["load_loss"] = all_losses.load
    step_metrics |= metrics.moe_metrics(sums.moe)
    load_ZE = load_ZE + (step_metrics["load_ZE"] - load_ZE) / config.health.window
    step_metrics["window_load_ZE"] = load_ZE
    step_metrics["window_dead_experts_Z"] = metrics.count_dead(load_ZE)
  new = TrainState(state.step + 1, params, opt_state, bias_ZE, load_ZE)
  if config.health.on_nonfinite is OnNonfinite.SKIP:
    # Of all metrics, as health.Monitor looks at them: what it calls skipped is skipped.
    finite = jnp.array([jnp.all(jnp.isfinite(value)) for value in step_metrics.values()]).all()
    new = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
    new = new._replace(step=state.step + 1)  # the next step draws other noise
  return new, step_metrics


def batch_sums(
  params: Any,
  bias_ZE: jax.Array,
  batch: pipeline.Batch[jax.Array],
  key: jax.Array,
  *,
  config: Config,
) -> losses.Sums:
  """Returns the loss sums of the batch, of which one microbatch at a time is computed.

  A balance loss multiplies two means over the batch, so the gradients of microbatches do not add up
  to the gradient of the batch. The sums do add up, and the loss is computed from the total. This is
  exact; its price is that the backward pass computes each microbatch's forward pass again.
  """

  def forward(params: Any, batch: pipeline.Batch[jax.Array], key: jax.Array) -> losses.Sums:
    out = transformer.target_nll(config.model, params, bias_ZE, batch, key, train=True)
    return losses.sums(out.nll_BL, out.log_z_BL, batch.segments_BL > 0, out.stats)

  accumulation = config.train.accumulation
  if accumulation == 1:
    return forward(params, batch, key)

  group_rows = dispatch.group_rows(config.model.moe, config.data.seq_len)

  def split(x_BL: jax.Array) -> jax.Array:
    # Every device keeps its own rows, and the rows of a routing group stay together: a microbatch
    # is every `accumulation`-th group of each device.
    B, L = x_BL.shape
    x = x_BL.reshape(-1, accumulation, group_rows, L).swapaxes(0, 1)
    spec = jax.sharding.PartitionSpec(None, sharding.SEQUENCE_AXES)
    return jax.lax.with_sharding_constraint(x.reshape(accumulation, B // accumulation, L), spec)

  micro = jax.tree.map(split, batch)
  keys = jax.random.split(key, accumulation)
  first = jax.tree.map(lambda x: x[0], (micro, keys))
  shapes = jax.eval_shape(forward, params, *first)
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

  @jax.checkpoint
  def add(total: losses.Sums, microbatch: Any) -> tuple[losses.Sums, None]:
    return jax.tree.map(jnp.add, total, forward(params, *microbatch)), None

  return jax.lax.scan(add, zeros, (micro, keys))[0]


def compile_step(
  setup: Setup, only: tuple[str, ...] = (), *, donate: bool = True
) -> jax.stages.Wrapped:
  """Returns the jitted `train_step`, which is compiled when it is called.

  Args:
    setup: of the run; its kernels are chosen.
    only: the metrics to return; () is all. Leaving some out shows what they cost.
    donate: whether the step reuses the memory of the state that it is given.
  """

  def step(
    state: TrainState, batch: pipeline.Batch[jax.Array]
  ) -> tuple[TrainState, dict[str, jax.Array]]:
    state, values = train_step(state, batch, setup)
    return state, {name: values[name] for name in only or values}

  replicated = jax.sharding.NamedSharding(setup.mesh, jax.sharding.PartitionSpec())
  # The returned state is placed as the given one; otherwise the second step would compile anew.
  shardings = (setup.shardings, replicated)
  return jax.jit(step, donate_argnums=0 if donate else (), out_shardings=shardings)
