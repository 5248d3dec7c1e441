"""For kernels that define their own gradient: a name for residuals, and shard_map's axes."""

from typing import Any

import jax

# The checkpoint_name of the arrays that a kernel saves for its backward pass. A remat policy that
# saves the results of matmuls does not find those of a kernel whose matmuls stand in a loop.
SAVED_BY_KERNEL = "kept_by_kernel"


def varying(x: jax.Array) -> frozenset[str]:
  """Returns the mesh axes along which x differs, as shard_map tracks it; none outside shard_map."""
  return jax.typeof(x).manual_axis_type.varying


def vary(x: jax.Array, axes: frozenset[str]) -> jax.Array:
  """Returns x marked for shard_map as differing along all of `axes`."""
  missing = tuple(sorted(axes - varying(x)))
  return jax.lax.pcast(x, missing, to="varying") if missing else x


def vary_alike(arrays: Any) -> Any:
  """Returns a tree of arrays, each marked as varying along every axis along which one of them does.

  The gradient of this cast sums a weight's gradient over the devices that share the weight.
  """
  axes: frozenset[str] = frozenset().union(*map(varying, jax.tree.leaves(arrays)))
  return jax.tree.map(lambda x: vary(x, axes), arrays)
