"""The optimizers, the learning rate's schedule, weight decay, and the routers' balancing bias."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from moe_jax import sharding
from moe_jax.config import Config, Optimizer, OptimizerName, Schedule
from moe_jax.model.transformer import abstract_params
from moe_jax.training.metrics import parameter_group

_MUON_BETA = 0.95  # decay of the momentum, as in 2502.16982
_FACTORED = 128  # Adafactor's second moment is a row and a column where both have so many entries
# The root mean square of an update's entries. It is about that of AdamW, so that one learning rate
# suits both optimizers.
_MUON_RMS = 0.2


def schedule(optimizer: Optimizer, steps: int) -> optax.Schedule:
  """Returns the function from a step, counted from 0, to the learning rate.

  It rises linearly in `warmup_steps`. Then it falls as a cosine, or stays and falls linearly at the
  end (WSD, 2404.06395), or stays constant.

  Args:
    optimizer: the settings.
    steps: of the whole run.
  """
  peak, warmup = optimizer.learning_rate, optimizer.warmup_steps
  final = peak * optimizer.final_fraction
  rising = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
  if optimizer.schedule is Schedule.COSINE:
    falling = optax.cosine_decay_schedule(peak, max(steps - warmup, 1), optimizer.final_fraction)
    return optax.join_schedules([rising, falling], [warmup])
  flat = optax.constant_schedule(peak)
  if optimizer.schedule is Schedule.CONSTANT:
    return optax.join_schedules([rising, flat], [warmup])
  decay = max(round(optimizer.decay_fraction * steps), 1)
  falling = optax.linear_schedule(peak, final, decay)
  return optax.join_schedules([rising, flat, falling], [warmup, max(steps - decay, warmup)])


def decays(name: str) -> bool:
  """Returns whether weight decay applies to the parameter of that name.

  It applies to matrices, but not to embeddings, routers, biases and norm scales. The name decides,
  not the shape, since the stacked norm scales of all layers have two dimensions, too.
  """
  parameter = sharding.declared(name)
  if parameter is not None:
    return parameter.decays
  return sharding.is_matrix(name) and not name.startswith("embed_")


def _by_name(params: Any, value: Callable[[str, int], Any]) -> Any:
  """Returns the tree of value(name, number of dimensions) for each parameter."""
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: value(sharding.param_name(path), leaf.ndim), params
  )


def decay_mask(params: Any) -> Any:
  """Returns the tree of `decays` for each parameter."""
  return _by_name(params, lambda name, _: decays(name))


def _adamw(optimizer: Optimizer, rate: optax.Schedule) -> optax.GradientTransformation:
  return optax.adamw(
    rate,
    b1=optimizer.b1,
    b2=optimizer.b2,
    eps=optimizer.eps,
    weight_decay=optimizer.weight_decay,
    mask=decay_mask,
    mu_dtype=optimizer.moment_dtype.value,
  )


def _adafactor(optimizer: Optimizer, rate: optax.Schedule) -> optax.GradientTransformation:
  # optax.adafactor does not multiply weight decay by the learning rate, and takes the rate relative
  # to the size of the weights. Both fields would mean something else than with AdamW.
  return optax.chain(
    _each_matrix(optax.scale_by_factored_rms(min_dim_size_to_factor=_FACTORED)),
    optax.clip_by_block_rms(1.0),
    optax.add_decayed_weights(optimizer.weight_decay, decay_mask),
    optax.scale_by_learning_rate(rate),
  )


def _each_matrix(inner: optax.GradientTransformation) -> optax.GradientTransformation:
  """Returns Adafactor's scaling in which each layer's and each expert's matrix stands alone.

  optax makes rows and columns of the two largest dimensions, also of one that counts experts.
  """
  one, axes = optax.FactoredState(0, 0, 0, 0), optax.FactoredState(None, 0, 0, 0)

  def each(function: Any, into: Any, out_of: Any, like: Any, *trees: Any) -> Any:
    def call(path: tuple[Any, ...], array: jax.Array, *more: Any) -> Any:
      mapped = function
      for _ in range(_stacked(sharding.param_name(path), array.shape)):
        mapped = jax.vmap(mapped, into, out_of)
      return mapped(array, *more)

    found = jax.tree_util.tree_map_with_path(call, *trees)
    return jax.tree.transpose(jax.tree.structure(trees[0]), jax.tree.structure(like), found)

  def init(params: Any) -> Any:
    return each(inner.init, 0, axes, one, params)._replace(count=jnp.zeros((), jnp.int32))

  def update(updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
    states = jax.tree.map(lambda *moments: optax.FactoredState(state.count, *moments), *state[1:])
    like, into = (0, one), (0, axes, 0)
    updates, new = each(inner.update, into, (0, axes), like, updates, states, params)
    return updates, new._replace(count=optax.safe_increment(state.count))

  return optax.GradientTransformation(init, update)


def _stacked(name: str, shape: tuple[int, ...]) -> int:
  """Returns how many dimensions count matrices, if optax would make rows or columns of one."""
  letters = name.rsplit("_", 1)[-1]
  stacked = len(shape) - len(letters) + letters.startswith("E")
  second = sorted((0, *shape))[-2]
  return stacked if max(shape[:stacked], default=0) >= second >= _FACTORED else 0


def _muon(optimizer: Optimizer, rate: optax.Schedule) -> optax.GradientTransformation:
  def kind(name: str, ndim: int) -> str:
    return "muon" if muon_axes(name, ndim) else "adamw"

  muon = optax.contrib.muon(
    rate,
    beta=_MUON_BETA,
    weight_decay=optimizer.weight_decay,
    consistent_rms=_MUON_RMS,
    mu_dtype=optimizer.moment_dtype.value,
    muon_weight_dimension_numbers=lambda params: _by_name(params, muon_axes),
  )
  # muon's own Adam uses Nesterov momentum and cannot leave parameters out of weight decay, so AdamW
  # updates the parameters that are no matrices.
  return optax.partition(
    {"muon": _experts_first(muon), "adamw": _adamw(optimizer, rate)},
    lambda params: _by_name(params, kind),
  )


def _experts_first(inner: optax.GradientTransformation) -> optax.GradientTransformation:
  """Returns the transformation for stacked experts in the order [E, Z, ...], not [Z, E, ...].

  optax makes one dimension of these two. Experts stay split over the devices only if E is the first
  of them. Otherwise every device gathers all experts and makes the matrices of each orthogonal.
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
  """Returns the input axes and output axes of a parameter's matrix; None if AdamW updates it.

  The shape letters say it: q_DHA is a matrix [D, H*A], out_HAD is [H*A, D], and up_EDF has a matrix
  [D, F] for each expert. A stack of layers has one for each layer. Axes are counted from the end.
  A matrix without D is one from a latent, [Q, H*A] or [W, H*Y].
  """
  if sharding.declared(name) is not None:
    return None
  if parameter_group(name) not in ("attention", "experts", "ffn") or not sharding.is_matrix(name):
    return None
  letters = name.rsplit("_", 1)[-1]
  axes = {letter: axis - len(letters) for axis, letter in enumerate(letters) if letter != "E"}
  assert len(axes) > 1 and ndim >= len(letters), name
  inner = sharding.gathered_letter(name)
  width, others = (axes.pop(inner),), tuple(axes.values())
  into, out_of = (width, others) if width < others else (others, width)
  return optax.contrib.MuonDimensionNumbers(reduction_axis=into, output_axis=out_of)


class OptimizerRecord(NamedTuple):
  """An optimizer: how it is made, and what the guide says about it."""

  make: Callable[[Optimizer, optax.Schedule], optax.GradientTransformation]
  about: str  # a sentence for docs/guide.md


OPTIMIZERS = {
  OptimizerName.ADAMW: OptimizerRecord(
    _adamw, "Two moments of each gradient, and weight decay apart from them (1711.05101)."
  ),
  OptimizerName.ADAFACTOR: OptimizerRecord(
    _adafactor,
    "No first moment, and the second one as a row and a column of the two largest dimensions if "
    "both have 128 or more (1804.04235); of stacked experts, each alone.",
  ),
  OptimizerName.MUON: OptimizerRecord(
    _muon,
    "Momentum made orthogonal, each expert's matrices alone (2502.16982); embeddings, head, norms "
    "and routers by AdamW.",
  ),
}


def make_optimizer(optimizer: Optimizer, steps: int) -> optax.GradientTransformation:
  """Returns the optimizer that the config names; gradients are clipped before it sees them.

  Args:
    optimizer: the settings.
    steps: of the whole run, for the schedule.
  """
  chosen = OPTIMIZERS[optimizer.name].make(optimizer, schedule(optimizer, steps))
  if not optimizer.clip_norm:
    return chosen
  return optax.chain(optax.clip_by_global_norm(optimizer.clip_norm), chosen)


def abstract_state(config: Config) -> Any:
  """Returns the shapes of the optimizer's state; no memory is allocated."""
  optimizer = make_optimizer(config.optimizer, config.train.steps)
  return jax.eval_shape(optimizer.init, abstract_params(config.model))


def restart_schedule(state: Any) -> Any:
  """Returns an optimizer's state in which the learning rate's schedule is at step 0 again.

  Moments, and the counts by which Adam corrects their bias, stay as they are.
  """

  def is_schedule(node: Any) -> bool:
    return isinstance(node, optax.ScaleByScheduleState)

  return jax.tree.map(
    lambda node: jax.tree.map(jnp.zeros_like, node) if is_schedule(node) else node,
    state,
    is_leaf=is_schedule,
  )
