"""The vocabulary of sweep files: arms, products and zips of arms, and the Sweep that has them."""

import dataclasses
import itertools
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

from moe_jax.config import Config
from moe_jax.errors import UserError
from moe_jax.start import command_line

Transform = Callable[[Config], Config]


@dataclasses.dataclass(frozen=True, slots=True)
class Arm:
  """A named change of the base config."""

  name: str  # also the name of the arm's folder
  fields: dict[str, Any]  # {"model.moe.top_k": 1}; enums by member or value
  transforms: tuple[Transform, ...] = ()  # applied one after the other, after all fields
  notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
  """The sweep that `get_sweep()` of a sweep file returns; the file's docstring is the question."""

  base: str  # a config file
  arms: Sequence[Arm]
  seeds: Sequence[int] = (0, 1, 2)  # each sets train.seed and data.seed, the same in every arm
  target: str = ""  # the arm whose final loss the others have to reach, "" for none
  evaluate: Sequence[str] = ()  # more flags for eval.py: ("--routing",)
  published: str = ""  # the published result, and the paper and table that it is from
  band: str = ""  # the results that count as a reproduction; state them before the run


def arm(name: str, *changes: dict[str, Any] | Transform, notes: str = "") -> Arm:
  """Makes an arm of fields and transforms: arm("a", {"train.steps": 100}, match("dense", ...)).

  Raises a UserError where the name cannot be a folder's, or a change is twice or of another type.
  """
  if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.=-]*", name):
    raise UserError(
      f"arm {name!r}: the name is also a folder's; use letters, digits and _ . = - alone"
    )
  found = Arm(name, {}, notes=(notes,) if notes else ())
  for change in changes:
    if isinstance(change, dict) and all(isinstance(field, str) for field in change):
      found = _joined([found, Arm(name, change)], name)
    elif callable(change):
      found = dataclasses.replace(found, transforms=(*found.transforms, change))
    else:
      raise UserError(f"arm {name}: {change!r} is neither {{field: value}} nor a transform")
  return found


def product(*lists: Sequence[Arm]) -> list[Arm]:
  """Returns every combination of one arm of each list; arms "a" and "b" become "a-b"."""
  return [_joined(arms) for arms in itertools.product(*lists)]


def zipped(*lists: Sequence[Arm]) -> list[Arm]:
  """Joins the first arms of all lists, then the second ones, and so on."""
  if len({len(arms) for arms in lists}) > 1:
    lengths = " and ".join(str(len(arms)) for arms in lists)
    raise UserError(f"zipped: the lists have {lengths} arms; give each the same number")
  return [_joined(arms) for arms in zip(*lists, strict=True)]


def _joined(arms: Sequence[Arm], name: str = "") -> Arm:
  """Returns an arm with the changes of all of them; its name joins theirs unless it is given."""
  name = name or "-".join(a.name for a in arms)
  fields: dict[str, Any] = {}
  for field, value in (item for a in arms for item in a.fields.items()):
    if field in fields:
      raise UserError(
        f"arm {name}: config.{field} is set twice, to {fields[field]} and {value}; "
        "set it in one of them"
      )
    fields[field] = value
  transforms = tuple(transform for a in arms for transform in a.transforms)
  return Arm(name, fields, transforms, tuple(note for a in arms for note in a.notes))


def load_sweep(path: str) -> tuple[str, Sweep]:
  """Returns the question and the Sweep of a sweep file; a UserError names the line that fails."""
  if not os.path.isfile(path):
    raise UserError(f"--sweep={path}: no such file")
  sweep, question = command_line.run_file(path, "get_sweep", Sweep)
  for name in ("base", "target", "published", "band"):
    if not isinstance(getattr(sweep, name), str):
      raise UserError(f"{path}: {name}={getattr(sweep, name)!r} is not a text")
  for name, kind in (("arms", Arm), ("seeds", int), ("evaluate", str)):
    value = getattr(sweep, name)
    if not isinstance(value, list | tuple | range) or not all(isinstance(v, kind) for v in value):
      hint = f"; write ({value!r},)" if isinstance(value, kind) else ""
      raise UserError(f"{path}: {name}={value!r} is not a list of {kind.__name__}{hint}")
  if not question:
    raise UserError(f"{path}: it has no docstring; begin with the question that it answers")
  return question, sweep
