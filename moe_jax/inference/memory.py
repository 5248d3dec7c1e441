"""Refuses a program that does not fit into memory, before anything of it is allocated.

On a CPU nothing else would refuse it: the system promises more memory than there is, and ends the
process when the memory is used.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax import sharding
from moe_jax.errors import UserError
from moe_jax.kernels import platform

_MOST = 2**30  # tokens of all rows, since their places are 32-bit numbers


class Memory:
  """Knows which programs fit into the memory of the mesh's devices."""

  def __init__(self, mesh: jax.sharding.Mesh):
    self._mesh = mesh
    self._fitting: set[Any] = set()  # programs and sizes

  def check(
    self,
    what: str,
    function: Any,
    weights: Any,
    sizes: tuple[int, int],
    types: Sequence[type],
    *more: Any,
    slots: int = 0,
    **static: Any,
  ) -> None:
    """Compiles a program and compares the memory that it needs with what this process can have.

    A call of the program with the same sizes is not compiled again.

    Args:
      what: of which size the call is, for the error.
      function: a jitted function.
      weights: its first argument.
      sizes: B and L. The arguments after the weights are arrays [B, L], [B], [B], ...
      types: of these arrays.
      more: the arguments after these.
      slots: of a cache; 0 for a function without this argument.
      static: other arguments that the function is compiled for.

    Raises:
      UserError: the memory does not suffice.
    """
    B, L = sizes
    key = (function, sizes, slots, *static.values())
    if key in self._fitting:
      return
    if B * max(L, slots) > _MOST:
      raise UserError(f"{what} are over {_MOST:,} tokens in all; give fewer or shorter ones")
    split = NamedSharding(self._mesh, PartitionSpec(sharding.BATCH_AXES))
    shapes = [
      jax.ShapeDtypeStruct(sizes[:1] if number else sizes, dtype, sharding=split)
      for number, dtype in enumerate(types)
    ]
    static |= {"slots": slots} if slots else {}
    with jax.set_mesh(self._mesh), one_line(what):
      program = function.lower(weights, *shapes, *more, **static).compile()
    usage = program.memory_analysis()  # None on platforms that do not tell
    needed = usage.argument_size_in_bytes + usage.output_size_in_bytes if usage else 0
    needed += usage.temp_size_in_bytes - usage.alias_size_in_bytes if usage else 0
    have = platform.memory_bytes(sharing=len(self._mesh.local_devices))
    if have is not None and needed > have:
      raise UserError(
        f"{what} need {needed / 1e9:,.1f} GB of memory on each device, which has "
        f"{have / 1e9:,.1f}; give fewer or shorter ones"
      )
    self._fitting.add(key)


@contextlib.contextmanager
def one_line(what: str) -> Iterator[None]:
  """Turns a device's error that memory is exhausted into one line."""
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    why = " ".join(str(error).split())[:200]
    raise UserError(f"{what} do not fit into memory ({why}); give fewer or shorter ones") from error
