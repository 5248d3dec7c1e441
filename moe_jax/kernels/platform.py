"""What device this is: the one place that asks."""

import jax


def name() -> str:
  """cpu, gpu or tpu."""
  return jax.default_backend()


def one_cpu() -> bool:
  """Whether the mesh in force is one CPU device."""
  return name() == "cpu" and jax.sharding.get_abstract_mesh().size == 1
