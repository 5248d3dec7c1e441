"""What a config is made of: a field with its default, meaning and bounds, and a choice of words.

docs/config.md and `train.py --help` are written from here. Imports no jax.
"""

import dataclasses
import enum
import math
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

from moe_jax.errors import UserError

T = TypeVar("T")

LARGEST_INT = 2**31 - 1  # steps, tokens and sizes are int32 on a device
LARGEST_SEED = 2**32 - 1  # jax would take a larger one modulo 2**32
_SMALLEST, _LARGEST = 1.2e-38, 3.4e38  # float32: beyond them a number is 0 or infinite on a device


class Bounds(NamedTuple):
  """The values that a number may have; an infinite bound is none."""

  at_least: float = -math.inf
  above: float = -math.inf
  at_most: float = math.inf
  below: float = math.inf
  infinite: bool = False  # inf is a value too: no limit

  def wrong(self, value: float) -> str:
    """What is wrong with a value, "must be at least 1"; "" if nothing is."""
    if value == math.inf and self.infinite:
      return ""
    if not -math.inf < value < math.inf:
      return "is not a finite number"
    if not (self.above < value < self.below and self.at_least <= value <= self.at_most):
      return f"must be {self}"
    if isinstance(value, int):
      too_large = value > LARGEST_INT and self.at_most == math.inf
      return f"is too large: an integer is at most {LARGEST_INT}" if too_large else ""
    in_range = not value or _SMALLEST <= abs(value) <= _LARGEST
    return "" if in_range else f"is out of float32's range, {_SMALLEST} to {_LARGEST}"

  def __str__(self) -> str:
    limits = zip(("at least", "above", "at most", "below"), self, strict=False)
    words = " and ".join(
      f"{word} {n if isinstance(n, int) else f'{n:g}'}" for word, n in limits if math.isfinite(n)
    )
    return words + "; inf is no limit" * self.infinite


def option(default: T, help: str, **bounds: Any) -> T:
  """A field of a section: its default, what it means, and the Bounds of a number."""
  return dataclasses.field(default=default, metadata={"help": help, "bounds": Bounds(**bounds)})


class Section:
  """Base of a config's sections, which never change. An int where a float belongs becomes one."""

  __slots__ = ()

  def __post_init__(self) -> None:
    for name, kind in type(self).__annotations__.items():
      if kind is float and type(value := getattr(self, name)) is int:
        object.__setattr__(self, name, float(value))


def walk(config: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field, Any]]:
  """("model.moe.top_k", its dataclass field, its value) of each field of a config."""
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if isinstance(value, Section):
      yield from walk(value, f"{prefix}{field.name}.")
    else:
      yield prefix + field.name, field, value


def flatten(config: Any) -> dict[str, Any]:
  """{"model.moe.top_k": 2, ...}, with values as config.json has them."""
  return {name: plain(value) for name, _, value in walk(config)}


def plain(value: Any) -> Any:
  """A value of a field as JSON can have it."""
  if isinstance(value, enum.Enum):
    return value.value
  return "inf" if value == math.inf else value


def spelled(value: Any) -> str:
  """A value of a field as the command line takes it."""
  return str(value).lower() if isinstance(value, bool) else str(plain(value))


def from_plain(field: dataclasses.Field, name: str, value: Any) -> Any:
  """Inverse of what `flatten` does to the value of a field; UserError for an unknown word."""
  kind = field.type
  if kind is float and value == "inf":
    return math.inf
  if not isinstance(kind, type) or not issubclass(kind, enum.Enum):
    return value
  try:
    return kind(value)
  except ValueError:
    choices = ", ".join(member.value for member in kind)
    raise UserError(f"config.{name}={value!r} is not one of: {choices}") from None


class Choice(enum.Enum):
  """A word of the command line and its meaning, which may also stand in the class's docstring."""

  _value_: str
  meaning: str

  def __new__(cls, value: str, meaning: str = "") -> "Choice":
    member = object.__new__(cls)
    member._value_, member.meaning = value, meaning
    return member
