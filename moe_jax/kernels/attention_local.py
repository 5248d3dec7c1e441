"""Runs an attention kernel that knows no mesh on each device's own sequences and heads."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from moe_jax import sharding


def on_each_device(attend: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
  """Returns `attend` of (q_BLHA, k_BLGA, v_BLGA, segments_BL, sinks_H), for global arrays.

  The sinks may be None. The batch is split over the batch axes of the mesh in force, query and
  key/value heads over `tensor`; `attend` gets the arrays of one device. No device needs another's
  rows, so nothing is sent. Without a mesh, on one device, or within shard_map, where the arrays are
  a device's own, nothing is split. The kernels want values as wide as keys, so narrower ones are
  padded with zeros.
  """
  attend = _with_values_as_wide_as_keys(attend)
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1 or mesh.manual_axes:
    return attend
  specs = tuple(sharding.spec(letters) for letters in ("BLHA", "BLGA", "BLGA", "BL", "H"))
  # The replication check cannot see into a Pallas call. Without it the gradient of the sinks, which
  # alone are not split over all axes, is summed over the others.
  return jax.shard_map(attend, in_specs=specs, out_specs=specs[0], check_vma=False)


def _with_values_as_wide_as_keys(attend: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
  def wide(q: jax.Array, k: jax.Array, v: jax.Array, *others: jax.Array | None) -> jax.Array:
    missing = k.shape[-1] - v.shape[-1]
    if not missing:
      return attend(q, k, v, *others)
    return attend(q, k, jnp.pad(v, ((0, 0),) * 3 + ((0, missing),)), *others)[..., :-missing]

  return wide
