"""Checks that the values of a file are of the kinds that a report takes, whoever wrote the file.

A kind is one of: a Kind, for a single value; [kind], for a list; a Table; a Mapping; and
{name: kind} or an Object, for an object. Under other names an object may hold anything, but for
names that end in shape letters, as load_ZE does: they hold arrays of so many dimensions. The name
`...` stands for all that are left.
"""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Sizes = dict[str, int]  # {shape letter: its size}, the same everywhere in a file


class WrongError(Exception):
  """A value is of another kind; the message names both."""


class Kind(NamedTuple):
  """What a single value must be."""

  what: str
  holds: Callable[[Any], bool]


class Table(NamedTuple):
  """A list with an item for each index of a shape letter; of two letters, a list of such lists."""

  letters: str
  item: Any
  empty: bool = False  # whether it may be


class Mapping(NamedTuple):
  """An object with any names."""

  item: Any


class Object(NamedTuple):
  """An object that must have the names of `needed`, and may have those of `more`."""

  needed: dict[Any, Any]
  more: dict[Any, Any]


_LARGE = 1e40  # above every float32 and every count; larger numbers overflow in means and pictures
COUNT = Kind("an integer from 0 up", lambda v: type(v) is int and 0 <= v < 1 << 53)
LAYER = Kind("an integer from -1 up", lambda v: type(v) is int and -1 <= v < 1 << 53)
# NaN and infinity are those of a run that has diverged.
NUMBER = Kind("a number", lambda v: type(v) in (int, float) and not _LARGE <= abs(v) < math.inf)
FACTOR = Kind("a number or 'inf'", lambda v: v == "inf" or NUMBER.holds(v))
ANYTHING = Kind("anything", lambda v: True)
TEXT = Kind("a text", lambda v: isinstance(v, str))
TRUTH = Kind("true or false", lambda v: isinstance(v, bool))
SCALAR = Kind("a single value", lambda v: v is None or isinstance(v, str | bool) or NUMBER.holds(v))


def check(value: Any, kind: Any, name: str, sizes: Sizes) -> None:
  """Checks a value of a JSON file.

  Args:
    value: from json.loads.
    kind: that it must be of; see above.
    name: of the value, for messages.
    sizes: of shape letters that are known; new ones are added.

  Raises:
    WrongError: the value is of another kind.
  """
  if isinstance(kind, Kind):
    if not kind.holds(value):
      raise WrongError(f"{name or 'it'} is {_shown(value)}, not {kind.what}")
  elif isinstance(kind, dict | Object | Mapping):
    if not isinstance(value, dict):
      raise WrongError(f"{name or 'it'} is {_shown(value)}, not an object")
    _check_names(value, kind, name, sizes)
  else:
    if not isinstance(value, list):
      raise WrongError(f"{name or 'it'} is {_shown(value)}, not a list")
    item = kind.item if isinstance(kind, Table) else kind[0]
    if isinstance(kind, Table):
      _check_size(len(value), kind.letters[0], name, sizes, kind.empty)
      item = Table(kind.letters[1:], item) if kind.letters[1:] else item
    for i, each in enumerate(value):
      check(each, item, f"{name}[{i}]", sizes)


def _check_names(value: dict[Any, Any], kind: Any, name: str, sizes: Sizes) -> None:
  needed, more = kind if isinstance(kind, Object) else ({}, kind)
  for key in needed:
    if key not in value:
      raise WrongError(f"{name or 'it'} has no {key!r}")
  for key, each in value.items():
    inner = f"{name}.{key}" if name else key
    if isinstance(kind, Mapping):
      check(each, kind.item, inner, sizes)
    elif key in needed or key in more:
      check(each, needed.get(key, more.get(key)), inner, sizes)
    elif letters := re.search(r"_([A-Z]+)$", key):
      _check_array(each, letters[1], inner, sizes)
    elif ... in more:
      check(each, more[...], inner, sizes)


def _check_array(value: Any, letters: str, name: str, sizes: Sizes) -> None:
  try:
    array = np.asarray(value)
  except ValueError:
    raise WrongError(f"{name} has lists of different lengths") from None
  if array.ndim != len(letters) or array.dtype.kind not in "iuf":
    raise WrongError(f"{name} is not an array of numbers with {len(letters)} dimensions")
  size = np.abs(array)
  if np.any((size >= _LARGE) & (size < math.inf)):
    raise WrongError(f"{name} has a number of {_LARGE:g} or more")
  for letter, length in zip(letters, array.shape, strict=True):
    _check_size(length, letter, name, sizes)


def _check_size(length: int, letter: str, name: str, sizes: Sizes, empty: bool = False) -> None:
  known = sizes.setdefault(letter, length)
  if known != length or not (length or empty):
    raise WrongError(f"{name} has {length} items" + f", not {known}" * (known != length))


def _shown(value: Any) -> str:
  """Returns a value in a few letters."""
  if isinstance(value, list | dict):
    return "a list" if isinstance(value, list) else "an object"
  if isinstance(value, int) and abs(value) >= 1 << 64:
    return "a huge integer"
  text = ascii(value)
  return text if len(text) <= 40 else f"{text[:37]}..."
