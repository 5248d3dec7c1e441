"""Weights that the mesh splits along D or a latent, gathered where a layer computes with them.

XLA's partitioner would gather them unasked. They are gathered by hand because of its TPU compiler,
which sums whole weights, zeros but for a device's own part, in place of a gather over 64 or more
devices, and whole gradients in place of their scatter, where the devices are a whole slice or keep
less than 256 numbers of a last dimension. So every gather here is along a first dimension, over
less than 64 devices and, on a TPU, over less than all of them at once.

Letters: P devices along the batch axes; N rows or tokens of one of them; I inner, the elements
summed over; O outer, the elements of a row of the result.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax import sharding
from moe_jax.config import GradientSums
from moe_jax.kernels import layout, platform
from moe_jax.kernels.autodiff import vary
from moe_jax.kernels.expert_weights import Experts

GATHERED = "gathered_weight"  # checkpoint_name of what is gathered again rather than kept
_MOST = 32  # devices of one gather


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Copies:
  """A weight of which each device along the batch axes has its own copy, and its own gradient."""

  stored: jax.Array  # [P, *weight]

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of the weight."""
    return self.stored.shape[1:]

  @property
  def T(self) -> "Copies":
    """The matrix transposed, under an array's name for it."""
    return Copies(self.stored.swapaxes(1, 2))

  def product(self, x_RI: jax.Array, dtype: jnp.dtype | None) -> jax.Array:
    """Returns each row times its device's copy, y_RO, in `dtype` or, if None, that of x_RI."""
    n, (rows, inner) = self.stored.shape[0], x_RI.shape
    w_PIO, x_PNI = self.stored.reshape(n, inner, -1), x_RI.reshape(n, rows // n, inner)
    y_PNO = jnp.einsum("PNI,PIO->PNO", x_PNI, w_PIO, preferred_element_type=dtype)
    return y_PNO.reshape(rows, -1)

  def __getitem__(self, ids_BL: jax.Array) -> jax.Array:
    """Returns the rows x_BLD of these indices, each from its device's copy."""
    ids_PN = ids_BL.reshape(self.stored.shape[0], -1)
    x_PND = jax.vmap(lambda w_VD, ids_N: w_VD[ids_N])(self.stored, ids_PN)
    return x_PND.reshape(*ids_BL.shape, -1)


def drops_copies() -> bool:
  """Returns whether a layer's backward pass gathers its weights again on the mesh in force.

  Only `fsdp` splits so much that whole weights of all layers might not fit. Of a kernel with a
  gradient of its own the forward pass is then computed again, too.
  """
  mesh = _mesh()
  return not mesh.empty and mesh.shape["fsdp"] > 1


@jax.named_scope("weights")
def copies(weights: Any, sums: GradientSums = GradientSums.COMPUTE) -> Any:
  """Returns a tree of named weights with Copies of the matrices that the mesh splits.

  Experts stay as they are: rows are sent to the devices that hold them. `sums` is the type in which
  the copies' gradients are added up.
  """
  mesh = _mesh()
  if mesh.empty or mesh.shape["fsdp"] * mesh.shape["expert"] == 1:
    return weights
  return jax.tree_util.tree_map_with_path(functools.partial(_copies, sums=sums), weights)


def _copies(path: tuple[Any, ...], weight: jax.Array, sums: GradientSums) -> Any:
  name = sharding.param_name(path)
  letters, letter = name.rsplit("_", 1)[-1], sharding.gathered_letter(name)
  if not letter or "E" in letters:
    return weight
  spec, dimension = sharding.param_spec(name, weight.shape, _mesh()), letters.index(letter)
  if spec[dimension] is None:  # a latent that does not divide
    return weight
  axes = spec[dimension] if isinstance(spec[dimension], tuple) else (spec[dimension],)

  def on_device(weight: jax.Array) -> jax.Array:
    return gathered_whole(weight, dimension, axes, frozenset(sharding.BATCH_AXES), sums)[None]

  rest = (None if i == dimension else axis for i, axis in enumerate(spec))
  copied = jax.sharding.PartitionSpec(sharding.BATCH_AXES, *rest)
  return Copies(jax.shard_map(on_device, in_specs=spec, out_specs=copied)(weight))


@jax.named_scope("weights")
def gathered_experts(weights: Experts, sums: GradientSums = GradientSums.COMPUTE) -> Experts:
  """Returns a device's own experts, whole along D, inside shard_map."""

  copied = frozenset(sharding.BATCH_AXES) - {"expert"}

  def gathered(name: str, weight: jax.Array | None) -> Any:
    dimension = name.rsplit("_", 1)[-1].find("D")
    if weight is None or dimension < 0:
      return weight
    return gathered_whole(weight, dimension, ("fsdp",), copied, sums)

  return weights._replace(**{n: gathered(n, w) for n, w in weights._asdict().items()})


def gathered_whole(
  weight: jax.Array,
  dimension: int,
  axes: tuple[str, ...],
  copied: frozenset[str],
  sums: GradientSums = GradientSums.COMPUTE,
) -> jax.Array:
  """Returns, inside shard_map, all of a dimension that mesh axes split; scatters the gradient.

  Args:
    weight: a device's part.
    dimension: of it, that is gathered.
    axes: that split it.
    copied: axes along which each device gets a copy with a gradient of its own, `axes` among them.
    sums: the type in which gradients are added up.
  """
  dtype = weight.dtype
  if sums is GradientSums.FLOAT32:
    weight = weight.astype(jnp.float32)
  # Marked before it is gathered, so that a gradient is scattered before it is summed over `data`.
  weight = vary(weight, copied)
  stages = [(axis, groups) for axis in reversed(axes) for groups in _stages(_mesh().shape[axis])]
  if not stages:
    return weight.astype(dtype)
  first = jnp.moveaxis(weight, dimension, 0)
  # XLA may keep the last dimension of the weight the last otherwise.
  x = layout.stored(first.reshape(first.shape[0], -1), 0, 1)
  x = _gathered(x, stages, dtype) if x.dtype != dtype else _in_stages(x, stages)
  x = x.reshape(-1, *first.shape[1:])
  return checkpoint_name(jnp.moveaxis(x, 0, dimension), GATHERED)


Stages = list[tuple[str, list[list[int]] | None]]  # mesh axis and groups of each gather


def _in_stages(x: jax.Array, stages: Stages) -> jax.Array:
  for axis, groups in stages:
    x = jax.lax.all_gather(x, axis, tiled=True, axis_index_groups=groups)
  return x


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gathered(x: jax.Array, stages: Stages, dtype: jnp.dtype) -> jax.Array:
  """Returns x gathered in a shorter type; its gradient is scattered in that of x."""
  return _in_stages(x.astype(dtype), stages)


def _scattered(stages: Stages, dtype: jnp.dtype, kept: None, gradient: jax.Array) -> Any:
  x = gradient.astype(jnp.float32)
  for axis, groups in reversed(stages):
    x = jax.lax.psum_scatter(x, axis, tiled=True, axis_index_groups=groups)
  return (x,)


_gathered.defvjp(lambda x, stages, dtype: (_gathered(x, stages, dtype), None), _scattered)


def _stages(size: int) -> list[list[list[int]] | None]:
  """Returns the groups of each gather that an axis of this size takes; None is the whole axis."""
  near = max(n for n in range(1, math.isqrt(size) + 1) if not size % n)
  whole = near > 1 and size == _mesh().size and platform.name() == "tpu"
  if size <= _MOST and not whole:
    return [None] * (size > 1)
  neighbours = [list(range(first, first + near)) for first in range(0, size, near)]
  return [neighbours, [list(group) for group in zip(*neighbours, strict=True)]]


def _mesh() -> jax.sharding.AbstractMesh:
  return jax.sharding.get_abstract_mesh()
