"""What kernels with a gradient of their own share: a name for residuals, and shard_map's axes."""

import jax

# The checkpoint_name of what a kernel keeps for its backward pass. Its matmuls may stand in a loop,
# where a remat policy that keeps the results of matmuls does not see them.
KEPT = "kept_by_kernel"


def varying(x: jax.Array) -> frozenset[str]:
  """The mesh axes along which shard_map knows x to differ; none outside of it."""
  return jax.typeof(x).manual_axis_type.varying


def vary(x: jax.Array, axes: frozenset[str]) -> jax.Array:
  """x, seen by shard_map as differing along all of `axes`."""
  missing = tuple(sorted(axes - varying(x)))
  return jax.lax.pcast(x, missing, to="varying") if missing else x


def vary_alike(*arrays: jax.Array) -> list[jax.Array]:
  """The arrays, each varying along every axis along which one of them does.

  The transposed cast sums a weight's gradient over the devices that share the weight.
  """
  axes = frozenset().union(*map(varying, arrays))
  return [vary(a, axes) for a in arrays]
