"""The optimizers, their schedule, what weight decay leaves alone; the routers' balancing bias."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from moe_jax import config as config_lib
from moe_jax import sharding
from moe_jax.config import OptimizerName
from moe_jax.model.transformer import abstract_params
from moe_jax.training.metrics import parameter_group

_MUON_BETA = 0.95  # of the momentum, as in 2502.16982
_MUON_RMS = 0.2  # of an update's entries: about AdamW's, so that one learning rate serves both


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


def _by_name(params: Any, value: Callable[[str, int], Any]) -> Any:
  """value(name, number of dimensions) of each parameter, as a tree."""
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: value(sharding.param_name(path), leaf.ndim), params
  )


def decay_mask(params: Any) -> Any:
  """`decays` of each parameter, as a tree."""
  return _by_name(params, lambda name, _: decays(name))


def _adamw(optimizer: config_lib.Optimizer, rate: optax.Schedule) -> optax.GradientTransformation:
  return optax.adamw(
    rate, b1=optimizer.b1, b2=optimizer.b2, eps=optimizer.eps,
    weight_decay=optimizer.weight_decay, mask=decay_mask,
  )  # fmt: skip


def _adafactor(
  optimizer: config_lib.Optimizer, rate: optax.Schedule
) -> optax.GradientTransformation:
  # Not optax.adafactor: there weight decay is not times the rate, and the rate is relative to the
  # weights, so that neither field would mean what it means with AdamW.
  return optax.chain(
    optax.scale_by_factored_rms(),
    optax.clip_by_block_rms(1.0),
    optax.add_decayed_weights(optimizer.weight_decay, decay_mask),
    optax.scale_by_learning_rate(rate),
  )


def _muon(optimizer: config_lib.Optimizer, rate: optax.Schedule) -> optax.GradientTransformation:
  def kind(name: str, ndim: int) -> str:
    return "muon" if muon_axes(name, ndim) else "adamw"

  muon = optax.contrib.muon(
    rate, beta=_MUON_BETA, weight_decay=optimizer.weight_decay, consistent_rms=_MUON_RMS,
    muon_weight_dimension_numbers=lambda params: _by_name(params, muon_axes),
  )  # fmt: skip
  # Its own Adam is Nesterov's and takes no mask of weight decay, so the rest is left to AdamW.
  return optax.partition(
    {"muon": _experts_first(muon), "adamw": _adamw(optimizer, rate)},
    lambda params: _by_name(params, kind),
  )


def _experts_first(inner: optax.GradientTransformation) -> optax.GradientTransformation:
  """The same transformation, which sees stacks of experts as [E, Z, ...] in place of [Z, E, ...].

  optax makes one dimension of the two, and only where E is the first of them do experts stay split
  over devices; otherwise every device gathers all experts and orthogonalises each of them.
  """

  def swap(tree: Any) -> Any:
    def one(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
      letters = sharding.param_name(path).rsplit("_", 1)[-1]
      stacked = letters.startswith("E") and leaf.ndim == len(letters) + 1
      return leaf.swapaxes(0, 1) if stacked else leaf

    return jax.tree_util.tree_map_with_path(one, tree)

  def update(updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
    return swap(inner.update(swap(updates), swap(state), swap(params)))

  return optax.GradientTransformation(inner.init, update)


def muon_axes(name: str, ndim: int) -> optax.contrib.MuonDimensionNumbers | None:
  """The axes of a parameter's matrix, its inputs and its outputs; None if AdamW updates it.

  Told by the shape letters: q_DHA is a matrix [D, H*A], out_HAD is [H*A, D], and up_EDF is a matrix
  [D, F] for each expert, as it is for each of the stacked layers. Axes are counted from the end.
  """
  if parameter_group(name) not in ("attention", "experts", "ffn"):
    return None
  letters = name.rsplit("_", 1)[-1]
  axes = {letter: axis - len(letters) for axis, letter in enumerate(letters) if letter != "E"}
  assert "D" in axes and len(axes) > 1 and ndim >= len(letters), name
  width, others = (axes.pop("D"),), tuple(axes.values())
  into, out_of = (width, others) if width < others else (others, width)
  return optax.contrib.MuonDimensionNumbers(reduction_axis=into, output_axis=out_of)


class OptimizerRecord(NamedTuple):
  """All that is known about an optimizer."""

  make: Callable[[config_lib.Optimizer, optax.Schedule], optax.GradientTransformation]
  about: str  # a sentence for docs/guide.md


OPTIMIZERS = {
  OptimizerName.ADAMW: OptimizerRecord(
    _adamw, "Two moments of each gradient, and weight decay apart from them (1711.05101)."
  ),
  OptimizerName.ADAFACTOR: OptimizerRecord(
    _adafactor,
    "No first moment, and the second one as a row and a column of the two largest dimensions if "
    "both have 128 or more (1804.04235).",
  ),
  OptimizerName.MUON: OptimizerRecord(
    _muon,
    "Momentum made orthogonal, each expert's matrices alone (2502.16982); embeddings, head, norms "
    "and routers by AdamW.",
  ),
}


def make_optimizer(optimizer: config_lib.Optimizer, steps: int) -> optax.GradientTransformation:
  """The chosen optimizer of a run of `steps`, behind the clipping of gradients."""
  chosen = OPTIMIZERS[optimizer.name].make(optimizer, schedule(optimizer, steps))
  if not optimizer.clip_norm:
    return chosen
  return optax.chain(optax.clip_by_global_norm(optimizer.clip_norm), chosen)


def abstract_state(config: config_lib.Config) -> Any:
  """The shapes of the optimizer's state; nothing is allocated."""
  optimizer = make_optimizer(config.optimizer, config.train.steps)
  return jax.eval_shape(optimizer.init, abstract_params(config.model))


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
