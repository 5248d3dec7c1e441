"""Attention of each device on its own sequences and heads: a library's kernel knows no mesh."""

from collections.abc import Callable

import jax

from moe_jax import sharding


def on_each_device(attend: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
  """`attend` of (q_BLHA, k_BLGA, v_BLGA, segments_BL), on the mesh that is in force, if any.

  The batch is split over its axes, query and key/value heads over `tensor`; `attend` sees the
  local sizes. No device needs another's rows, so nothing is sent.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return attend
  specs = tuple(sharding.spec(letters) for letters in ("BLHA", "BLGA", "BLGA", "BL"))
  # The replication check cannot see into a Pallas call. It is not needed: every array that has a
  # gradient is split over all axes of the mesh, so no gradient has to be summed over devices.
  return jax.shard_map(attend, in_specs=specs, out_specs=specs[0], check_vma=False)
