"""Where each of our parameters stands in a Hugging Face checkpoint, and how it lies there.

A `Row` of a family's table says: our parameter, their tensor, and the layout of their tensor in the
shape letters of ours. `(HA)D` is a matrix whose first dimension counts heads and their widths, so
q_DHA is transposed and flattened. `2` counts two of our parameters in one tensor, gate and up.
`qkvz_DJY[qkv]` are those parts of Y that are named, one after another in the first dimension of
theirs. The same row serves both directions.

For example Row("ffn.gate_EDF,ffn.up_EDF", "mlp.experts.gate_up_proj", "E(2F)D") of a layer with 4
experts, D = 8, F = 6 says: their tensor is [4, 8, 12]; of each expert the first 6 columns are our
gate_EDF[e], the last 6 our up_EDF[e]. It is one Tensor with two Parts, whose
`half` is 0 and 1. To pack, both are stacked as [2, E, D, F] and transposed to E, D, 2, F; to
unpack, one half's columns are read.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from moe_jax.config import Model
from moe_jax.model import cost, delta
from moe_jax.model.pattern import bias_shape, layer_places, moe_layers

BIAS = ("bias_ZE",)  # the path of the balancing bias, which stands beside the parameters

Ranges = tuple[slice, ...]  # one for each dimension of a tensor
Shape = tuple[int, ...]
Read = Callable[[str, Ranges], np.ndarray]  # their tensor's name, and which part -> the values
Path = tuple[str, ...]  # of a parameter in the Transformer, layers stacked on Z: cost.parameters


class Row(NamedTuple):
  """One line of a family's table."""

  # Below a layer: "attention.q_DHA"; two with a comma between them stand on `2`.
  ours: str
  theirs: str  # below their layer; with {expert} each expert has a tensor of its own
  layout: str


class Part(NamedTuple):
  """What a whole tensor of theirs has of one of our parameters."""

  path: Path
  place: tuple[int, ...]  # on the parameter's first dimensions: (), (layer,) or (layer, expert)
  half: int  # which of two; 0 where there is one
  cut: slice | None = None  # of its last letter, where their tensor has only that


class Tensor(NamedTuple):
  """One tensor of their checkpoint."""

  name: str
  layout: str
  parts: tuple[Part, ...]
  sizes: dict[str, int]  # of the letters of the layout

  @property
  def groups(self) -> list[str]:
    """The letters of each dimension: ["HA", "D"]."""
    return [flat or one for flat, one in re.findall(r"\((\w+)\)|(\w)", self.layout)]

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of their tensor."""
    first, *rest = self._shape(self.parts[0])
    return (first + sum(self._shape(part)[0] for part in self.parts[1:] if part.cut), *rest)

  def _sizes(self, part: Part) -> dict[str, int]:
    if part.cut is None:
      return self.sizes
    return self.sizes | {_letters(part)[-1]: part.cut.stop - part.cut.start}

  def _shape(self, part: Part) -> tuple[int, ...]:
    """Returns the shape of their tensor, or of the rows that a cut part has there."""
    sizes = self._sizes(part)
    return tuple(math.prod(sizes[letter] for letter in group) for group in self.groups)

  def pack(self, arrays: list[np.ndarray]) -> np.ndarray:
    """Returns their tensor of the arrays of its parts, in our layout."""
    if self.parts[0].cut is None:
      return self._pack(arrays, self.parts[0])
    cuts = zip(arrays, self.parts, strict=True)
    return np.concatenate([self._pack([array[..., part.cut]], part) for array, part in cuts])

  def _pack(self, arrays: list[np.ndarray], part: Part) -> np.ndarray:
    letters = _letters(part)
    whole = arrays[0]
    if "2" in self.layout:
      whole, letters = np.stack(arrays), "2" + letters
    if "1" in self.layout:
      whole, letters = whole[None], "1" + letters
    order = [letters.index(letter) for group in self.groups for letter in group]
    return whole.transpose(order).reshape(self._shape(part))

  def unpack(self, read: Read, part: Part, wanted: dict[str, slice]) -> np.ndarray:
    """Returns a piece of one of our parameters, in our layout.

    Args:
      read: reads a range of their tensor.
      part: of `parts`.
      wanted: the range of each letter of our parameter; of a cut, from its beginning.
    """
    sizes_of = self._sizes(part)
    ranges = wanted | {"2": slice(part.half, part.half + 1), "1": slice(0, 1)}
    bounds, lengths, chosen = [], [], []
    for group in self.groups:
      sizes = [sizes_of[letter] for letter in group]
      parts = [ranges[letter] for letter in group]
      first = np.ravel_multi_index([r.start for r in parts], sizes)
      last = np.ravel_multi_index([r.stop - 1 for r in parts], sizes)
      counts = [r.stop - r.start for r in parts]
      if last + 1 - first == math.prod(counts):  # they lie side by side
        bounds.append(slice(int(first), int(last) + 1))
        lengths += counts
        chosen += [slice(None)] * len(group)
      else:
        bounds.append(slice(0, math.prod(sizes)))
        lengths += sizes
        chosen += parts
    if part.cut is not None:
      before = self.parts[: self.parts.index(part)]
      rows = sum(self._shape(other)[0] for other in before)
      bounds[0] = slice(bounds[0].start + rows, bounds[0].stop + rows)
    piece = read(self.name, tuple(bounds)).reshape(lengths)[tuple(chosen)]
    letters = "".join(self.groups)
    order = [letters.index(letter) for letter in _letters(part)]
    unit = [letters.index(letter) for letter in "12" if letter in letters]
    return piece.transpose(order + unit).reshape([piece.shape[axis] for axis in order])


def _letters(part: Part) -> str:
  """The shape letters of a part of a parameter, without those of its place."""
  letters = part.path[-1].rsplit("_", 1)[-1]
  if part.path == BIAS:
    letters = letters[1:]
  return letters[max(len(part.place) - 1, 0) :]


def tensors(
  model: Model, top: tuple[Row, ...], layer: tuple[Row, ...], prefix: str
) -> list[Tensor]:
  """Returns all tensors of a checkpoint of this model, in the order of the layers.

  `top` are the rows of what stands beside the layers, `layer` those of a layer that has their
  parameter, and `prefix` begins its names: "model.layers.{layer}.".

  Raises:
    KeyError: a parameter of the model stands in no row; its path.
  """
  shapes = {path: shape.shape for path, shape in cost.parameters(model).items()}
  with_experts = moe_layers(model)
  if with_experts:
    shapes[BIAS] = bias_shape(model)
  everything = {".".join(path): (path, ()) for path in shapes}
  cuts = delta.slices(model.delta)
  found = [tensor for row in top for tensor in _of_row(row, row.theirs, everything, shapes, cuts)]
  for number, (where, place) in enumerate(layer_places(model)):
    below: dict[str, tuple[Path, tuple[int, ...]]] = {
      ".".join(path[len(where) :]): (path, (place,))
      for path in shapes
      if path[: len(where)] == where
    }
    if number in with_experts:
      below["bias_ZE"] = BIAS, (with_experts.index(number),)
    for row in layer:
      found += _of_row(row, prefix.format(layer=number) + row.theirs, below, shapes, cuts)
  placed = {part.path for tensor in found for part in tensor.parts}
  for path in shapes:
    if path not in placed and path != BIAS:
      raise KeyError(".".join(path))
  return found


def _of_row(
  row: Row,
  name: str,
  below: Mapping[str, tuple[Path, tuple[int, ...]]],
  shapes: Mapping[Path, tuple[int, ...]],
  cuts: Mapping[str, slice],
) -> list[Tensor]:
  """Returns the tensors of a row: none where the model lacks the parameter, E of {expert}.

  `below` is {a row's name of ours: (the parameter, its place)}.
  """
  parameters, _, named = row.ours.removesuffix("]").partition("[")
  ours = parameters.split(",")
  places = [below[name_] for name_ in ours if name_ in below]
  if not places:
    return []
  held: list[slice | None] = [cuts[name_] for name_ in named] or [None]
  shape = shapes[places[0][0]]
  letters = places[0][0][-1].rsplit("_", 1)[-1]
  sizes = dict(zip(reversed(letters), reversed(shape), strict=False)) | {"1": 1, "2": len(ours)}
  experts: list[tuple[int, ...]] = [()]
  if "{expert}" in name:
    experts = [(expert,) for expert in range(sizes["E"])]
  return [
    Tensor(
      name.format(expert=expert[0]) if expert else name,
      row.layout,
      tuple(
        Part(path, at + expert, half, cut) for half, (path, at) in enumerate(places) for cut in held
      ),
      {letter: sizes[letter] for group in row.layout for letter in group if letter not in "()"},
    )
    for expert in experts
  ]


Places = dict[tuple[int, ...], list[tuple[Tensor, Part]]]  # {Part.place: where it stands}


def pieces(
  path: Path, index: Ranges, parts: Places, read: Read
) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
  """Yields (start, values) of a part of a stacked parameter, reading no more than that part.

  One piece is what one tensor of theirs has of it: of one layer, or of one expert. It has the
  dimensions of the parameter. `index` has a range of each dimension, `parts` says where each
  Part.place of this parameter stands, and `read` reads a range of their tensor.
  """
  letters = path[-1].rsplit("_", 1)[-1]
  letters = "Z" * (len(index) - len(letters)) + letters
  ranges = dict(zip(letters, index, strict=True))
  depth = len(next(iter(parts)))
  outer = list(ranges)[:depth]
  inner = {letter: r for letter, r in ranges.items() if letter not in outer}
  for at in itertools.product(*(range(ranges[o].start, ranges[o].stop) for o in outer)):
    start = [i - ranges[o].start for i, o in zip(at, outer, strict=True)] + [0] * len(inner)
    for tensor, part in parts[at]:
      wanted = inner
      if part.cut is not None:
        r = inner[letters[-1]]
        first, stop = max(r.start, part.cut.start), min(r.stop, part.cut.stop)
        if first >= stop:
          continue
        wanted = inner | {letters[-1]: slice(first - part.cut.start, stop - part.cut.start)}
        start[-1] = first - r.start
      values = tensor.unpack(read, part, wanted)
      yield tuple(start), values.reshape((1,) * depth + values.shape)


def by_parameter(found: list[Tensor]) -> dict[Path, Places]:
  """Returns {path: {Part.place: [(tensor, part)]}} of all parameters."""
  parameters: dict[Path, Places] = {}
  for tensor in found:
    for part in tensor.parts:
      parameters.setdefault(part.path, {}).setdefault(part.place, []).append((tensor, part))
  return parameters


def replaced(
  rows: tuple[Row, ...], others: tuple[Row, ...], names: Iterable[str]
) -> tuple[Row, ...]:
  """Returns the rows, with those others that some of a checkpoint's names have in their place."""
  there = tuple(row for row in others if any(name.endswith("." + row.theirs) for name in names))
  taken = {name for row in there for name in row.ours.split(",")}
  return (*(row for row in rows if row.ours.split(",")[0] not in taken), *there)
