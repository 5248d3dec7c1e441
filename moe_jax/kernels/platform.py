"""The kind of device that this process runs on; no other module of the model asks JAX for it."""

import jax

from moe_jax.config import Exchange


def name() -> str:
  """Returns "cpu", "gpu" or "tpu"."""
  return jax.default_backend()


def one_cpu() -> bool:
  """Returns whether the mesh in force is one CPU device."""
  return name() == "cpu" and jax.sharding.get_abstract_mesh().size == 1


def default_exchange() -> Exchange:
  """Returns the exchange that `auto` stands for.

  XLA:CPU has no ragged exchange, and only on a TPU is the ragged exchange known to be fast.
  """
  return Exchange.RAGGED if name() == "tpu" else Exchange.ALL_GATHER
