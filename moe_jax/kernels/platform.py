"""What device this is: the one place that asks."""

import jax

from moe_jax.config import Exchange


def name() -> str:
  """cpu, gpu or tpu."""
  return jax.default_backend()


def one_cpu() -> bool:
  """Whether the mesh in force is one CPU device."""
  return name() == "cpu" and jax.sharding.get_abstract_mesh().size == 1


def default_exchange() -> Exchange:
  """What `auto` is: XLA:CPU has no ragged exchange, and only on TPU it is known to be fast."""
  return Exchange.RAGGED if name() == "tpu" else Exchange.ALL_GATHER
