"""Tokamax's grouped matmuls: each of its implementations is a separate kernel here.

Tokamax's own order of preference is not used: on a GPU it prefers `mosaic`, whose weight gradient
is slow, and on a TPU it does not try `mosaic_tpu_v2`.
"""

import functools
from collections.abc import Callable

import jax

from moe_jax.errors import UserError
from moe_jax.kernels.activation import Nonlinearity
from moe_jax.kernels.expert_weights import Experts, with_grouped_matmul

_OLDEST = (0, 0, 17)  # earlier versions give an expert without rows NaN weight gradients on a GPU


def missing_tokamax(name: str) -> str:
  """Returns why tokamax's implementation `name` cannot run on the mesh in force; "" if it can."""
  try:
    import tokamax
  except ImportError:
    return "tokamax is not installed: pip install 'moe_jax[cuda]' or 'moe_jax[tpu]', Python 3.12"
  version = tokamax.__version__
  if tuple(int(part) for part in version.split(".")[:3]) < _OLDEST:
    return f"tokamax {version} is too old: pip install 'tokamax>=0.0.17', which needs Python 3.12"
  mesh = jax.sharding.get_abstract_mesh()
  if name == "mosaic_tpu_v2" and not mesh.empty and mesh.size > 1:
    return "it does not run under shard_map, so it needs a mesh of one device"
  return ""


def implementation(name: str) -> Callable[..., jax.Array]:
  """Returns a kernel that computes experts.experts with tokamax's implementation `name`."""
  return functools.partial(_experts, name)


def _experts(
  name: str,
  x_ND: jax.Array,
  weights: Experts,
  sizes_E: jax.Array,
  activation: Nonlinearity,
) -> jax.Array:
  reason = missing_tokamax(name)
  if reason:
    raise UserError(f"config.model.moe.grouped_matmul={name}: {reason}; or set it to auto")
  import tokamax

  def matmul(x: jax.Array, w: jax.Array, sizes_E: jax.Array) -> jax.Array:
    axis_type = jax.typeof(x).manual_axis_type  # tokamax's kernels do not infer it
    return tokamax.ragged_dot(
      x, w, group_sizes=sizes_E, implementation=name, manual_axis_type=axis_type
    )

  return with_grouped_matmul(matmul, x_ND, weights, sizes_E, activation)
