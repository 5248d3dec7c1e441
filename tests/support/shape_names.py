"""Checks every local `name_LETTERS` of the package against its letters while code runs.

    with shape_names.checked() as lies:
      jax.jit(step).lower(...)
    assert not lies

An array whose name ends in letters has one dimension for each letter, and within one call a letter
has one size. A digit 1 is a dimension of that size (`total_Z1`). Only the locals that a function
has when it returns are checked, and of these only arrays: no packed weights, tuples or None.
"""

import contextlib
import pathlib
import re
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

PACKAGE = str(pathlib.Path(__file__).parents[2] / "moe_jax")
_LETTERS = re.compile(r"(?:^|_)([A-Z1]*[A-Z][A-Z1]*)$")


def letters(name: str) -> str:
  """Returns the letters of a name, 'x_BLD' -> 'BLD', or '' if it has none: `moe`, `E`, `_FEW`."""
  match = _LETTERS.search(name)
  return match[1] if match and "_" in name and not name.isupper() else ""


@contextlib.contextmanager
def checked() -> Iterator[set[str]]:
  """Yields a set that gets a line for each false name in functions of the package called inside."""
  lies: set[str] = set()

  def look(frame: FrameType, event: str, result: Any) -> None:
    if event == "return" and frame.f_code.co_filename.startswith(PACKAGE):
      lies.update(_lies(frame))

  before = sys.getprofile()
  sys.setprofile(look)
  try:
    yield lies
  finally:
    sys.setprofile(before)


def _lies(frame: FrameType) -> Iterator[str]:
  code = frame.f_code
  where = f"{code.co_filename.removeprefix(PACKAGE + '/')}:{code.co_firstlineno} {code.co_name}"
  sizes: dict[str, tuple[int, str]] = {"1": (1, "the digit")}
  for name, value in frame.f_locals.items():
    shape = getattr(value, "shape", None)
    if not letters(name) or not isinstance(shape, tuple) or not hasattr(value, "dtype"):
      continue
    if len(shape) != len(letters(name)):
      yield f"{where}: {name} has the shape {shape}"
      continue
    for letter, size in zip(letters(name), shape, strict=True):
      expected, first = sizes.setdefault(letter, (size, name))
      if expected != size:
        yield f"{where}: {letter} is {expected} in {first} and {size} in {name}"
