"""Refuses a program that does not fit into memory, before anything of it is allocated.

On a CPU nothing else would refuse it: the system promises more memory than there is, and ends the
process when the memory is used.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax

from moe_jax.errors import UserError
from moe_jax.kernels import platform
from moe_jax.start import progress

_MOST = 2**30  # tokens


class Memory:
  """Knows which programs fit into the memory of the mesh's devices."""

  def __init__(self, mesh: jax.sharding.Mesh):
    self._mesh = mesh
    self._fitting: set[Any] = set()  # programs and sizes

  def check(self, what: str, function: Any, *arguments: Any, **static: Any) -> None:
    """Compiles a program and compares the memory that it needs with what this process can have.

    A call of the program with tokens of the same shape is not compiled again.

    Args:
      what: of which size the call is, for the error.
      function: a jitted function.
      arguments: of the call: weights, tokens_BL, and more.
      static: other arguments that the function is compiled for.

    Raises:
      UserError: the memory does not suffice.
    """
    key = (function, arguments[1].shape, *static.values())
    if key in self._fitting:
      return
    says = jax.process_index() == 0
    with progress.waiting("compiling") if says else contextlib.nullcontext():
      program = function.lower(*arguments, **static).compile()
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


def check_count(what: str, tokens: int) -> None:
  """Refuses more tokens of all rows than 32-bit numbers can tell apart."""
  if tokens > _MOST:
    raise UserError(f"{what} are over {_MOST:,} tokens in all; give fewer or shorter ones")


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
