"""The files of a Hugging Face checkpoint: config.json, safetensors with an index, the tokenizer.

Only headers and the ranges that are asked for are read, by the package `safetensors`, which checks
a header before it uses it. Nothing of a file is executed: pickled weights (.bin) are not read.
"""

import contextlib
import json
import math
import os
import pathlib
import re
import shutil
import time
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from moe_jax.errors import StorageError, UserError, is_storage
from moe_jax.hf import fp8, mxfp4
from moe_jax.hf.ranges import Ranges
from moe_jax.start import command_line
from moe_jax.storage import files

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TOKENIZER, SENTENCEPIECE = "tokenizer.json", "tokenizer.model"
# Files beside the weights that travel with them.
OF_TOKENIZER = (
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
  "chat_template.jinja",
)
BESIDE = (
  CONFIG, "generation_config.json", TOKENIZER, SENTENCEPIECE, "vocab.json", "merges.txt",
  *OF_TOKENIZER,
)  # fmt: skip
_DTYPES: dict[str, Any] = {
  "F64": np.float64,
  "F32": np.float32,
  "F16": np.float16,
  "BF16": ml_dtypes.bfloat16,
}
WRITTEN = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
# Weights that stand in several tensors of few bits: the module that reads them, and bits a number.
_QUANTIZED = {"MXFP4": (mxfp4, 4.25), "FP8": (fp8, 8)}
_OF_TEXT = "model.language_model."  # before the names of a text model beside one of images
_SECONDS = 5.0  # between lines of progress


def _shards(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns the files of a checkpoint whose index is missing, which their names number.

  Raises:
    UserError: one of them is missing.
  """
  found = {}
  for path in folder.glob("model-*.safetensors"):
    if number := re.fullmatch(r"model-(\d+)-of-(\d+)\.safetensors", path.name):
      found[int(number[1])] = path, int(number[2])
  for total in {total for _, total in found.values()}:
    if gone := sorted(set(range(1, total + 1)) - set(found)):
      raise UserError(
        f"{folder}: file {gone[0]} of {total} is missing, and {INDEX}: an incomplete download"
      )
  return [found[number][0] for number in sorted(found)]


class StoredTensors:
  """The tensors of a checkpoint on disk: their shapes, and ranges of their values."""

  def __init__(self, folder: pathlib.Path):
    """Reads the headers.

    Raises:
      UserError: there are no safetensors, or a file is missing or damaged.
    """
    self.folder = folder
    self.shapes: dict[str, tuple[int, ...]] = {}
    self.types: dict[str, str] = {}
    self._files: dict[str, tuple[pathlib.Path, str]] = {}  # and the name there
    self._open: dict[pathlib.Path, Any] = {}
    self._starts: dict[pathlib.Path, dict[str, int]] = {}
    self.bytes_read = 0
    for path in self._paths():
      for name in self._handle(path).keys():  # noqa: SIM118 (the handle is no dict)
        part = self._handle(path).get_slice(name)
        ours = "model." + name.removeprefix(_OF_TEXT) if name.startswith(_OF_TEXT) else name
        self._files[ours], self.types[ours] = (path, name), part.get_dtype()
        self.shapes[ours] = tuple(part.get_shape())
    for kind, (module, _) in _QUANTIZED.items():
      for name, shape in module.find(self.shapes, self.types).items():
        for part in module.PARTS:
          del self.shapes[name + part]
        self.shapes[name], self.types[name] = shape, kind

  def _paths(self) -> list[pathlib.Path]:
    if (self.folder / SINGLE).is_file():
      return [self.folder / SINGLE]
    if not (self.folder / INDEX).is_file():
      if shards := _shards(self.folder):
        return shards
      raise UserError(
        f"{self.folder}: neither {SINGLE} nor {INDEX} there; weights in other files (.bin, .pth) "
        "are pickled programs, which are not run: convert them to safetensors first"
      )
    where = read_hf_json(self.folder / INDEX).get("weight_map")
    names: set[Any] = set(where.values()) if isinstance(where, dict) else {None}
    for name in names:
      if not isinstance(name, str) or os.path.basename(name) != name or not name:
        raise UserError(f"{self.folder / INDEX}: weight_map names {name!r}, which is no file there")
    return [self.folder / name for name in sorted(names)]

  def _handle(self, path: pathlib.Path) -> Any:
    if path not in self._open:
      if not path.is_file():
        raise UserError(f"{path}: no such file, though {INDEX} names it: an incomplete download")
      try:
        self._open[path] = safetensors.safe_open(path, "numpy")
      except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged, or no safetensors file: {error}") from None
    return self._open[path]

  def size(self, name: str) -> int:
    """Returns the bytes of a tensor."""
    if self.types[name] in _QUANTIZED:
      return int(math.prod(self.shapes[name]) * _QUANTIZED[self.types[name]][1] / 8)
    width = np.dtype(_DTYPES[self.types[name]]).itemsize if self.readable(name) else 1
    return math.prod(self.shapes[name]) * width

  def readable(self, name: str) -> bool:
    """Returns whether a tensor is of a type that can be read."""
    return self.types[name] in (*_DTYPES, *_QUANTIZED)

  def read(self, name: str, ranges: Ranges) -> np.ndarray:
    """Returns a range of a tensor's values, in the file's type; float32 if that has few bits."""
    if self.types[name] in _QUANTIZED:
      module, _ = _QUANTIZED[self.types[name]]
      return module.read(name, self.shapes[name], ranges, self._part)
    return self._part(name, ranges)

  def same(self, one: str, other: str) -> bool:
    """Returns whether two tensors, of matrices, have the same values."""
    shape, rows = self.shapes[one], 4096  # so that no matrix is held whole
    if shape != self.shapes[other]:
      return False
    for start in range(0, shape[0], rows):
      ranges = (slice(start, min(start + rows, shape[0])), *(slice(0, n) for n in shape[1:]))
      if not np.array_equal(self.read(one, ranges), self.read(other, ranges)):
        return False
    return True

  def _part(self, name: str, ranges: Ranges) -> np.ndarray:
    """Returns a range of a tensor as the file has it; of an FP8 tensor the bytes."""
    path, there = self._files[name]
    if self.types[name] == "FP8":  # NumPy has no such type, so `safetensors` does not read it
      if path not in self._starts:
        self._starts[path] = _starts(path)
      stored = np.memmap(path, np.uint8, "r", self._starts[path][there], self.shapes[name])
      values = np.array(stored[ranges])
      self.bytes_read += values.nbytes
      return values
    part = self._handle(path).get_slice(there)
    values = part[ranges] if ranges else part[...]
    self.bytes_read += values.nbytes
    return values


def _starts(path: pathlib.Path) -> dict[str, int]:
  """Returns the byte of a file at which each tensor begins; safe_open has checked the header."""
  with path.open("rb") as file:
    size = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(size))
  header.pop("__metadata__", None)
  return {name: 8 + size + tensor["data_offsets"][0] for name, tensor in header.items()}


class Progress:
  """Says now and then how many bytes are read or written, how fast, and how long it will take."""

  def __init__(self, verb: str, total: int, say: Callable[[str], None] | None):
    self._verb, self._total, self._say = verb, total, say
    self._started = self._told = time.monotonic()

  def at(self, done: int) -> None:
    """To be called after each piece, with the bytes of all pieces so far."""
    now = time.monotonic()
    if self._say is None or now - self._told < _SECONDS:
      return
    self._told = now
    rate = done / (now - self._started)
    left = command_line.clock(max(self._total - done, 0) / rate)
    self._say(f"{self._verb} {gb(done)} of {gb(self._total)}, {gb(rate)}/s, {left} left")


def gb(size: float) -> str:
  """Formats bytes."""
  return f"{size / 1e9:.2f} GB"


def read_hf_json(path: pathlib.Path) -> dict[str, Any]:
  """Returns the object of a JSON file; raises a UserError where there is none."""
  if not path.is_file():
    raise UserError(f"{path}: no such file")
  return files.read_json(path, "download it again")


def copy(named: Mapping[str, pathlib.Path | str], target: pathlib.Path) -> None:
  """Copies small files, those of {name in the target: file or text} that there are."""
  target.mkdir(parents=True, exist_ok=True)
  for name, source in named.items():
    if isinstance(source, str):
      files.write(target / name, source)
    elif source.is_file():
      files.write(target / name, files.read_bytes(source))


class TensorWriter:
  """Writes safetensors in files of at most so many bytes, and their index.

  All is written into a folder beside the target, which takes the target's name at the end.
  """

  def __init__(self, target: pathlib.Path, sizes: Mapping[str, int], largest: int):
    """Plans the files.

    Args:
      target: a folder that does not exist yet, or is empty.
      sizes: {tensor: its bytes}, in the order in which they will come.
      largest: bytes of a file; a single tensor may be larger.
    """
    self.target, self._sizes = target, dict(sizes)
    self.folder = target.with_name(f".{target.name}.unfinished")
    shutil.rmtree(self.folder, ignore_errors=True)
    self._planned: list[list[str]] = [[]]
    room = largest
    for name, size in sizes.items():
      if size > room and self._planned[-1]:
        self._planned.append([])
        room = largest
      self._planned[-1].append(name)
      room -= size
    self._held: dict[str, np.ndarray] = {}
    self._written = 0
    with _storage(target):
      self.folder.mkdir(parents=True)

  def add(self, name: str, values: np.ndarray) -> None:
    """Adds the next tensor; a file is written when its last one has come."""
    self._held[name] = values
    if list(self._held) == self._planned[self._written]:
      path = self.folder / self._file(self._written)
      with _storage(self.target):
        safetensors.numpy.save_file(self._held, path, metadata={"format": "pt"})
        path.chmod(self.folder.stat().st_mode & 0o666)  # it is made for its owner alone
      self._held, self._written = {}, self._written + 1

  def _file(self, number: int) -> str:
    total = len(self._planned)
    return SINGLE if total == 1 else f"model-{number + 1:05d}-of-{total:05d}.safetensors"

  def finish(self, config: Mapping[str, Any], beside: Mapping[str, pathlib.Path | str]) -> None:
    """Writes the index and config.json, copies what goes beside, and names the folder."""
    with _storage(self.target):
      copy(beside, self.folder)
      if len(self._planned) > 1:
        where = {n: self._file(i) for i, names in enumerate(self._planned) for n in names}
        index = {"metadata": {"total_size": sum(self._sizes.values())}, "weight_map": where}
        files.write(self.folder / INDEX, json.dumps(index, indent=2) + "\n")
      files.write(self.folder / CONFIG, json.dumps(config, indent=2) + "\n")
      if self.target.exists():
        self.target.rmdir()  # it is empty
      self.folder.rename(self.target)

  def drop(self) -> None:
    """Deletes what is not finished."""
    shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def _storage(target: pathlib.Path) -> Any:
  try:
    yield
  except (OSError, safetensors.SafetensorError) as error:
    if isinstance(error, safetensors.SafetensorError) or is_storage(error):
      raise StorageError(f"{target}: cannot be written ({error})") from error
    raise UserError(f"{target}: cannot be written ({error})") from error
