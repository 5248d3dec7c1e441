"""Reads a compiled program: its collectives, and the cycles that its compiler expects of a TPU.

The text of a program is a list of computations. A loop's body counts as often as the loop runs,
which its condition says: the loops of a step count from 0 to a constant. Of a conditional the false
branch counts, which a step with balanced loads takes.
"""

import collections
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

PHASES = (
  *("embedding", "layers", "weights", "norm", "attention", "rope", "ffn", "moe", "router", "route"),
  *("dispatch", "exchange", "experts", "combine", "statistics", "shared", "residual", "head"),
  *("loss", "optimizer"),
)
_KINDS = (
  "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
  "collective-permute",
)  # fmt: skip
UNKNOWN = 1 << 62  # cycles of a custom call
_BYTES = {"pred": 1, "c64": 8, "c128": 16} | {
  f"{kind}{bits}": bits / 8 for kind in ("s", "u", "f", "bf") for bits in (2, 4, 8, 16, 32, 64)
}  # f8e4m3fn and its like are f8


class Collective(NamedTuple):
  """Collectives of one kind, phase and size."""

  kind: str  # "all-gather"; a reduce-scatter in a fusion is one, too
  axes: tuple[str, ...]  # of the mesh
  phase: str  # the innermost named scope of PHASES; "" for none
  size: int  # bytes of the array that one of them returns to a device; of reduce-scatter, takes
  times: int  # how many run in a step


class Program(NamedTuple):
  """What the text of a compiled program says."""

  collectives: list[Collective]
  cycles: dict[str, int]  # by phase, without communication and custom calls; {} where it has none
  memory_bytes: float  # that a device reads and writes; what stays in a TPU's VMEM is not counted
  custom_calls: dict[str, int]  # how many of each target run in a step


class Line(NamedTuple):
  """An instruction."""

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
  computations, calls = runs(hlo)
  found: collections.Counter[tuple[str, tuple[str, ...], str, int]] = collections.Counter()
  cycles: collections.Counter[str] = collections.Counter()
  custom: collections.Counter[str] = collections.Counter()
  memory_bytes = 0.0
  for computation, times in calls.items():
    types = {line.name: line.types for line in computations[computation]}
    chains = set()  # an asynchronous gather is a chain of fusions, of which each names it
    for line in computations[computation]:
      memory_bytes += times * _traffic(line, types, computations)
      phase = _phase(line)
      if estimate := re.search(r'"estimated_cycles":"(\d+)"', line.rest):
        cycles[phase] += times * int(estimate[1]) * (int(estimate[1]) < UNKNOWN)
      if line.op == "custom-call" and (
        target := re.search(r'custom_call_target="([^"]*)"', line.rest)
      ):
        custom[target[1]] += times
      for one, fused in _communicating(line, computations):
        chain = re.search(r'chain_id="(\w+)"', one.rest)
        key = _collective(one, fused, mesh)
        if key is not None and (chain is None or chain[1] not in chains):
          found[key] += times
          chains |= {chain[1]} if chain else set()
  collectives = [Collective(*key, count) for key, count in sorted(found.items())]
  return Program(collectives, {k: v for k, v in cycles.items() if v}, memory_bytes, dict(custom))


def runs(hlo: str) -> tuple[dict[str, list[Line]], dict[str, int]]:
  """Returns the instructions of each computation, and how often it runs in a call of a program."""
  computations = {name: [_parsed(line) for line in lines] for name, lines in _computations(hlo)}
  calls: collections.Counter[str] = collections.Counter()
  _count(computations, next(n for n in computations if n.startswith("ENTRY ")), 1, calls)
  return computations, calls


def _phase(line: Line) -> str:
  name = re.search(r'op_name="([^"]*)"', line.rest)
  return phase_of(name[1]) if name else ""


def _communicating(line: Line, computations: dict[str, list[Line]]) -> list[tuple[Line, str]]:
  """Returns the collectives that an instruction is or has fused, each with the fusion's name."""
  called = re.search(r"calls=(%[\w.\-]+)", line.rest) if line.op == "fusion" else None
  if called is None:
    return [(line, "")]
  return [(one, called[1]) for one in computations.get(called[1], []) if _kind(one)]


def _collective(
  line: Line, fused: str, mesh: dict[str, int]
) -> tuple[str, tuple[str, ...], str, int] | None:
  """Returns (kind, axes, phase, size) of a collective; None for another instruction."""
  if between := re.search(r'_xla_megascale_transfer_type="(\w+)"', line.rest):
    if line.op != "send":  # to the same devices of other slices, over which `data` alone lies
      return None
    kind = between[1].lower().replace("_", "-")
    return kind, ("data",), _phase(line), _size(line.types.partition(", u32[]")[0])
  kind, axes = _kind(line), _axes(line.rest, mesh)
  if not kind or not axes:
    return None
  size = _size(_result(line))
  if kind == "reduce-scatter":
    size *= len(_first_group(line.rest))
  elif kind == "all-reduce" and fused.startswith("%all-reduce-scatter"):
    kind = "reduce-scatter"
  return kind, axes, _phase(line), size


def _computations(hlo: str) -> Iterator[tuple[str, list[str]]]:
  """Yields the name of each computation, that of the entry after "ENTRY ", and its instructions.

  What is no head and no instruction goes on with the line before: long types, a kernel's text.
  """
  name, lines = "", list[str]()
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


def _parsed(line: str) -> Line:
  name, _, rest = line.partition(" = ")
  end = _closing(rest) if rest.startswith("(") else rest.index(" ")
  types, rest = rest[:end], rest[end:].lstrip()
  op, _, rest = rest.partition("(")
  return Line(name, types, op, rest)


def _closing(text: str) -> int:
  """Returns the place after the parenthesis that closes the first one."""
  depth = 0
  for place, letter in enumerate(text):
    depth += (letter == "(") - (letter == ")")
    if not depth:
      return place + 1
  raise ValueError(text[:80])


def _count(
  computations: dict[str, list[Line]], name: str, times: int, calls: collections.Counter[str]
) -> None:
  """Adds how often a computation runs, and those that it runs, in a call of the program."""
  calls[name] += times
  for line in computations[name]:
    if line.op == "while":
      found = re.search(r"condition=(%[^,\s]+), body=(%[^,\s]+)", line.rest)
      assert found, line.name
      _count(computations, found[2], times * _trips(computations[found[1]], line.rest), calls)
    elif line.op in ("call", "call-start", "conditional", "async-start"):
      attributes = r"(?:to_apply|calls|false_computation|branch_computations)=\{?(%[^,\s}]+)"
      for each in re.findall(attributes, line.rest):
        _count(computations, each, times, calls)


def _trips(condition: list[Line], attributes: str) -> int:
  """Returns how often a loop runs: as XLA says, or up to the constant that its condition has."""
  if known := re.search(r'known_trip_count":\{"n":"(\d+)"', attributes):
    return int(known[1])
  constants = [
    int(found[1])
    for line in condition
    if line.op == "constant" and (found := re.match(r"(\d+)\)", line.rest))
  ]
  return max(constants, default=1)


def _kind(line: Line) -> str:
  op = line.op.removesuffix("-start")
  return op if op in _KINDS else ""


def phase_of(scope: str) -> str:
  """Returns the innermost phase of a named scope, "jit(step)/jvp()/moe/route"; "" for none."""
  return next((word for word in re.split(r"[/()]", scope)[::-1] if word in PHASES), "")


def _result(line: Line) -> str:
  """Returns the type of what a collective returns; of a start, without its operands."""
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


def _size(types: str, *, stored: bool = False) -> int:
  """Returns the bytes of the arrays of a type; `stored`: of those alone that are not in VMEM."""
  sizes = 0.0
  for kind, dims, layout in re.findall(r"\b(pred|[a-z]+\d+)\w*\[([\d,]*)\](\{[^}]*\})?", types):
    if not stored or "S(" not in layout:
      sizes += _BYTES[kind] * math.prod(int(n) for n in dims.split(",") if n)
  return round(sizes)


# What moves no bytes, or whose bytes are counted inside.
_FREE = {
  "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional",
  "after-all", "partition-id", "replica-id", "async-start",
}  # fmt: skip


def _traffic(line: Line, types: dict[str, str], computations: dict[str, list[Line]]) -> float:
  """Returns the bytes that an instruction reads from memory and writes to it."""
  if line.op in _FREE or line.op.endswith("-done"):
    return 0.0
  operands = re.findall(r"%[\w.\-]+", line.rest[: _closing("(" + line.rest) - 1])
  read = [float(_size(types.get(name, ""), stored=True)) for name in operands]
  written = float(_size(_result(line), stored=True))
  if line.op == "dynamic-update-slice":
    return 2 * read[1]
  if line.op in ("dynamic-slice", "slice", "gather"):
    return 2 * written
  called = re.search(r"calls=(%[\w.\-]+)", line.rest) if line.op == "fusion" else None
  if called and called[1] in computations:
    body = computations[called[1]]
    for index, part in _slices(body).items():
      if index < len(read):
        read[index] = min(read[index], part)
    if body[-1].op == "dynamic-update-slice" and read:  # in place: its other rows stay
      written = min(written, read[-1] if len(read) > 1 else written)
  return sum(read) + written


def _slices(body: list[Line]) -> dict[int, float]:
  """Returns {operand of a fusion: bytes that it reads of it}, where it reads slices alone."""
  found: dict[int, float] = {}
  inside = {line.name: line.types for line in body}
  for parameter in (line for line in body if line.op == "parameter"):
    users = [line for line in body if re.search(re.escape(parameter.name) + r"\b(?!\.)", line.rest)]
    parts = 0.0
    for user in users:
      operands = re.findall(r"%[\w.\-]+", user.rest.partition(")")[0])
      if user.op in ("dynamic-slice", "slice", "gather") and operands[0] == parameter.name:
        parts += _size(user.types)
      elif user.op == "dynamic-update-slice" and operands[0] == parameter.name:
        parts += _size(inside.get(operands[1], ""))
      else:
        break
    else:
      found[int(parameter.rest.partition(")")[0])] = parts
  return found


def _axes(rest: str, mesh: dict[str, int]) -> tuple[str, ...]:
  """Returns the axes of the mesh along which the devices of a group differ."""
  group = _first_group(rest)
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
  if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):  # axes of its own
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
    along = re.findall(r"'(\w+)'", named[2])
    index = tuple(slice(None) if name in along else 0 for name in sizes)
    return np.arange(math.prod(sizes.values())).reshape(*sizes.values())[index].ravel().tolist()
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
