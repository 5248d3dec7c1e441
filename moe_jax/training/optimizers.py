"""AdamW, its schedule, what weight decay leaves alone; and the routers' balancing bias."""

import jax
import jax.numpy as jnp
import optax

from moe_jax import config as config_lib
from moe_jax import sharding


def schedule(optimizer: config_lib.Optimizer, steps: int) -> optax.Schedule:
  """Learning rate at a step, from 0: linear warm-up, then cosine, WSD (2404.06395) or constant."""
  peak, warmup = optimizer.learning_rate, optimizer.warmup_steps
  final = peak * optimizer.final_fraction
  rising = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
  if optimizer.schedule is config_lib.Schedule.COSINE:
    falling = optax.cosine_decay_schedule(peak, max(steps - warmup, 1), optimizer.final_fraction)
    return optax.join_schedules([rising, falling], [warmup])
  flat = optax.constant_schedule(peak)
  if optimizer.schedule is config_lib.Schedule.CONSTANT:
    return optax.join_schedules([rising, flat], [warmup])
  decay = max(round(optimizer.decay_fraction * steps), 1)
  falling = optax.linear_schedule(peak, final, decay)
  return optax.join_schedules([rising, flat, falling], [warmup, max(steps - decay, warmup)])


def decays(name: str) -> bool:
  """Whether weight decay applies: matrices, but not embeddings, routers or norm scales.

  Told by name, since a stack of norm scales has two dimensions as a matrix has.
  """
  parameter = sharding.declared(name)
  if parameter is not None:
    return parameter.decays
  return len(name.rsplit("_", 1)[-1]) > 1 and not name.startswith("embed_")


def make_optimizer(optimizer: config_lib.Optimizer, steps: int) -> optax.GradientTransformation:
  def mask(params):
    return jax.tree_util.tree_map_with_path(
      lambda path, _: decays(sharding.param_name(path)), params
    )

  adamw = optax.adamw(
    schedule(optimizer, steps),
    b1=optimizer.b1, b2=optimizer.b2, eps=optimizer.eps,
    weight_decay=optimizer.weight_decay, mask=mask,
  )  # fmt: skip
  if not optimizer.clip_norm:
    return adamw
  return optax.chain(optax.clip_by_global_norm(optimizer.clip_norm), adamw)


def updated_bias(bias_ZE: jax.Array, routed_ZE: jax.Array, rate: float) -> jax.Array:
  """Loss-free balancing (2408.15664): +rate below the mean load, -rate above it, then centred.

  Args:
    bias_ZE: float32; added to the scores for the selection only.
    routed_ZE: int32 assignments of the whole batch, all devices and microbatches.
    rate: u of the paper, 1e-3 there; 0 leaves the bias as it is.
  """
  if not rate or not routed_ZE.size:
    return bias_ZE
  # In integers, without E * load: total/E - load = (quotient - load) + remainder/E.
  quotient_Z1, remainder_Z1 = jnp.divmod(jnp.sum(routed_ZE, axis=1, keepdims=True), len(bias_ZE[0]))
  gap_ZE = quotient_Z1 - routed_ZE
  sign_ZE = jnp.where(gap_ZE != 0, jnp.sign(gap_ZE), jnp.sign(remainder_Z1))
  bias_ZE = bias_ZE + rate * sign_ZE.astype(jnp.float32)
  return bias_ZE - jnp.mean(bias_ZE, axis=1, keepdims=True)
