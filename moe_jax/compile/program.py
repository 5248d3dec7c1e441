"""Reads a compiled program: its collectives, and the cycles that its compiler expects of a TPU.

The text of a program is a list of computations. A loop's body counts as often as the loop runs,
which its condition says: the loops of a step count from 0 to a constant.
"""

import collections
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

PHASES = (
  "router", "route", "dispatch", "exchange", "experts", "combine", "statistics", "attention",
  "ffn", "optimizer",
)  # fmt: skip
_KINDS = (
  "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
  "collective-permute",
)  # fmt: skip
_UNKNOWN = 1 << 62  # cycles of a custom call
_BYTES = {"pred": 1, "c64": 8, "c128": 16} | {
  f"{kind}{bits}": bits / 8 for kind in ("s", "u", "f", "bf") for bits in (2, 4, 8, 16, 32, 64)
}  # f8e4m3fn and its like are f8


class Collective(NamedTuple):
  """Collectives of one kind, phase and size."""

  kind: str  # "all-gather"; a reduce-scatter in a fusion is one, too
  axes: tuple[str, ...]  # of the mesh
  phase: str  # the innermost named scope of PHASES; "" for none
  size: int  # bytes of the array that one of them returns to a device; of reduce-scatter, takes
  count: int  # how many run in a step


class Program(NamedTuple):
  """What the text of a compiled program says."""

  collectives: list[Collective]
  cycles: dict[str, int]  # by phase, without communication and custom calls; {} where it has none
  custom_calls: dict[str, int]  # how many of each target run in a step


class _Line(NamedTuple):
  name: str
  types: str  # of the result
  op: str
  rest: str  # operands and attributes


def read_program(hlo: str, mesh: dict[str, int]) -> Program:
  """Returns what an optimized program does in one call.

  Args:
    hlo: `compiled.as_text()`.
    mesh: {axis: its size}, in the order of the program's devices.
  """
  computations = {name: list(map(_parsed, lines)) for name, lines in _computations(hlo)}
  calls: collections.Counter[str] = collections.Counter()
  _count(computations, next(n for n in computations if n.startswith("ENTRY ")), 1, calls)
  found: collections.Counter[tuple[str, tuple[str, ...], str, int]] = collections.Counter()
  cycles: collections.Counter[str] = collections.Counter()
  custom: collections.Counter[str] = collections.Counter()
  for computation, times in calls.items():
    for line in computations[computation]:
      phase = _phase(line.rest)
      if estimate := re.search(r'"estimated_cycles":"(\d+)"', line.rest):
        cycles[phase] += times * int(estimate[1]) * (int(estimate[1]) < _UNKNOWN)
      if line.op == "custom-call" and (target := re.search(r'custom_call_target="([^"]*)"', line.rest)):
        custom[target[1]] += times
      if (kind := _kind(line)) and (axes := _axes(line.rest, mesh)):
        size = _size(_result(line)) * (math.prod(mesh[a] for a in axes) if kind == "reduce-scatter" else 1)
        if kind == "all-reduce" and computation.startswith("%all-reduce-scatter"):
          kind = "reduce-scatter"  # a fusion of both, whose all-reduce returns what it takes
        found[kind, axes, phase, size] += times
  collectives = [Collective(*key, count) for key, count in sorted(found.items())]
  return Program(collectives, {k: v for k, v in cycles.items() if v}, dict(custom))


def _computations(hlo: str) -> Iterator[tuple[str, list[str]]]:
  """Yields the name of each computation, that of the entry after "ENTRY ", and its instructions.

  What is no head and no instruction goes on with the line before: long types, a kernel's text.
  """
  name, lines = "", []
  for line in hlo.splitlines():
    if head := re.match(r"(ENTRY )?(%\S+) \(.*\) -> .*\{$", line):
      if name:
        yield name, lines
      name, lines = (head[1] or "") + head[2], []
    elif re.match(r"  (ROOT )?%\S+ = ", line):
      lines.append(line.strip().removeprefix("ROOT "))
    elif lines:
      lines[-1] += " " + line.strip()
  yield name, lines


def _parsed(line: str) -> _Line:
  name, _, rest = line.partition(" = ")
  end = _closing(rest) if rest.startswith("(") else rest.index(" ")
  types, rest = rest[:end], rest[end:].lstrip()
  op, _, rest = rest.partition("(")
  return _Line(name, types, op, rest)


def _closing(text: str) -> int:
  """Returns the place after the parenthesis that closes the first one."""
  depth = 0
  for place, letter in enumerate(text):
    depth += (letter == "(") - (letter == ")")
    if not depth:
      return place + 1
  raise ValueError(text[:80])


def _count(
  computations: dict[str, list[_Line]], name: str, times: int, calls: collections.Counter[str]
) -> None:
  """Adds how often a computation runs, and those that it runs, in a call of the program."""
  calls[name] += times
  for line in computations[name]:
    if line.op == "while":
      found = re.search(r"condition=(%[^,\s]+), body=(%[^,\s]+)", line.rest)
      assert found, line.name
      _count(computations, found[2], times * _trips(computations[found[1]], line.rest), calls)
    elif line.op in ("call", "call-start", "conditional", "async-start") or (
      line.op == "fusion" and "calls=%all-reduce-scatter" in line.rest
    ):
      attributes = r"(?:to_apply|calls|true_computation|false_computation)=(%[^,\s]+)"
      branches = re.search(r"branch_computations=\{([^}]*)\}", line.rest)
      called = re.findall(attributes, line.rest)
      called += branches[1].split(", ") if branches else []
      for each in called:
        _count(computations, each, times, calls)


def _trips(condition: list[_Line], attributes: str) -> int:
  """Returns how often a loop runs: as XLA says, or up to the constant that its condition has."""
  if known := re.search(r'known_trip_count":\{"n":"(\d+)"', attributes):
    return int(known[1])
  constants = [int(found[1]) for line in condition
               if line.op == "constant" and (found := re.match(r"(\d+)\)", line.rest))]
  return max(constants, default=1)


def _kind(line: _Line) -> str:
  op = line.op.removesuffix("-start")
  return op if op in _KINDS else ""


def _phase(rest: str) -> str:
  name = re.search(r'op_name="([^"]*)"', rest)
  scopes = [word for word in re.split(r"[/()]", name[1] if name else "") if word in PHASES]
  return scopes[-1] if scopes else ""


def _result(line: _Line) -> str:
  """Returns the type of what a collective returns; of an asynchronous start, without its operands."""
  if not line.op.endswith("-start") or line.op == "all-reduce-start" or line.types[0] != "(":
    return line.types
  parts, depth = [""], 0
  for letter in line.types[1:-1]:
    depth += (letter in "([{") - (letter in ")]}")
    if letter == "," and not depth:
      parts.append("")
    else:
      parts[-1] += letter
  return parts[1]


def _size(types: str) -> int:
  """Returns the bytes of the arrays of a type; of an asynchronous start, those of its result."""
  arrays = re.findall(r"\b(pred|[a-z]+\d+)\w*\[([\d,]*)\]", types)
  sizes = [_BYTES[kind] * math.prod(int(n) for n in dims.split(",") if n) for kind, dims in arrays]
  return round(sum(sizes))


def _axes(rest: str, mesh: dict[str, int]) -> tuple[str, ...]:
  """Returns the axes of the mesh along which the devices of a group differ."""
  group = _first_group(rest)
  if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
    axes = re.findall(r"'(\w+)'", named[2])
    if all(axis in mesh for axis in axes):
      return tuple(axes)
    sizes = re.findall(r"'(\w+)'=(\d+)", named[1])  # a mesh of the compiler's own: 'axis_0'=64
    devices = np.arange(math.prod(int(n) for _, n in sizes)).reshape([int(n) for _, n in sizes])
    group = devices[tuple(slice(None) if a in axes else 0 for a, _ in sizes)].ravel().tolist()
  return tuple(
    axis for place, axis in enumerate(mesh) if len({_places(d, mesh)[place] for d in group}) > 1
  )


def _places(device: int, mesh: dict[str, int]) -> list[int]:
  places = []
  for size in reversed(mesh.values()):
    device, place = divmod(device, size)
    places.append(place)
  return places[::-1]


def _first_group(rest: str) -> list[int]:
  """Returns the devices of a collective's first group, by any of HLO's spellings."""
  if pairs := re.search(r"source_target_pairs=\{\{([\d,]*)\}", rest):
    return [int(n) for n in pairs[1].split(",")]
  if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
    return [int(n) for n in listed[1].split(",")]
  if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
    groups, dims = ([int(n) for n in iota[i].split(",")] for i in (1, 2))
    order = [int(n) for n in iota[3].split(",")] if iota[3] else range(len(dims))
    devices = np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(groups[0], -1)
    return devices[0].tolist()
  return []
