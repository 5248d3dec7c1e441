"""The files of a Hugging Face checkpoint: config.json, safetensors with an index, the tokenizer.

Only headers and the ranges that are asked for are read, by the package `safetensors`, which checks
a header before it uses it. Nothing of a file is executed: pickled weights (.bin) are not read.
"""

import json
import math
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from moe_jax.errors import StorageError, UserError, is_storage
from moe_jax.hf import fp8, mxfp4
from moe_jax.hf.layout import Ranges
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
# Weights that stand in several tensors of few bits: the module that reads them, and bits a number.
_QUANTIZED = {"MXFP4": (mxfp4, 4.25), "FP8": (fp8, 8)}
_OF_TEXT = "model.language_model."  # before the names of a text model beside one of images
_ROWS = 4096  # of two matrices that are compared


def _shards(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns the files of a checkpoint whose index is missing, which their names number."""
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
    self._stored: dict[str, np.ndarray] = {}  # maps of the files
    self.bytes_read = 0
    for path in self._paths():
      whole, header = _opened(path)
      for name, about in header.items():
        ours = "model." + name.removeprefix(_OF_TEXT) if name.startswith(_OF_TEXT) else name
        self.types[ours], self.shapes[ours] = about["dtype"], tuple(about["shape"])
        stored = whole[slice(*about["data_offsets"])].view(_DTYPES.get(about["dtype"], np.uint8))
        if stored.size == math.prod(self.shapes[ours]):  # else it is of a type that is not read
          stored = stored.reshape(self.shapes[ours])
        self._stored[ours] = stored
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
    """Returns whether two matrices have the same values, by rows, so that none is held whole."""
    if self.shapes[one] != self.shapes[other]:
      return False
    height, width = self.shapes[one]
    starts = range(0, height, _ROWS)
    parts = ((slice(n, min(n + _ROWS, height)), slice(0, width)) for n in starts)
    return all(np.array_equal(self.read(one, part), self.read(other, part)) for part in parts)

  def _part(self, name: str, ranges: Ranges) -> np.ndarray:
    """Returns a range of a tensor as the file has it; of an FP8 tensor the bytes."""
    values = np.array(self._stored[name][ranges])
    self.bytes_read += values.nbytes
    return values


def _opened(path: pathlib.Path) -> tuple[np.ndarray, dict[str, Any]]:
  """Returns a map of the bytes of all tensors of a file, and its header."""
  if not path.is_file():
    raise UserError(f"{path}: no such file, though {INDEX} names it: an incomplete download")
  try:
    with safetensors.safe_open(path, "numpy"):
      pass  # it has checked the header
  except (safetensors.SafetensorError, OSError) as error:
    raise UserError(f"{path} is damaged, or no safetensors file: {error}") from None
  whole = np.memmap(path, np.uint8, "r")
  begin = 8 + int.from_bytes(whole[:8].tobytes(), "little")
  header = json.loads(whole[8:begin].tobytes())
  header.pop("__metadata__", None)
  return whole[begin:], header


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


def write_checkpoint(
  target: pathlib.Path,
  sizes: Mapping[str, int],
  largest: int,
  value: Callable[[str], np.ndarray],
  config: Mapping[str, Any],
  beside: Mapping[str, pathlib.Path | str],
) -> None:
  """Writes safetensors and their index, config.json, and what goes beside them.

  All is written into a folder beside the target, which takes the target's name at the end.

  Args:
    target: a folder that does not exist yet, or is empty.
    sizes: {tensor: its bytes}, in the order in which they are asked for.
    largest: bytes of a file; a single tensor may be larger.
    value: returns a tensor by its name; those of one file are held at a time.
    config: what config.json has.
    beside: {name in the target: file or text}.

  Raises:
    StorageError: the target cannot be written; then nothing is left there.
  """
  planned: list[list[str]] = [[]]
  room = largest
  for name, size in sizes.items():
    if size > room and planned[-1]:
      planned.append([])
      room = largest
    planned[-1].append(name)
    room -= size
  folder = target.with_name(f".{target.name}.unfinished")
  shutil.rmtree(folder, ignore_errors=True)
  where: dict[str, str] = {}
  try:
    folder.mkdir(parents=True)
    for number, names in enumerate(planned, 1):
      file = f"model-{number:05d}-of-{len(planned):05d}.safetensors" if planned[1:] else SINGLE
      held = {name: value(name) for name in names}
      safetensors.numpy.save_file(held, folder / file, metadata={"format": "pt"})
      (folder / file).chmod(folder.stat().st_mode & 0o666)  # it is made for its owner alone
      where |= dict.fromkeys(names, file)
    copy(beside, folder)
    if planned[1:]:
      index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
      files.write_json(folder / INDEX, index)
    files.write_json(folder / CONFIG, dict(config))
    if target.exists():
      target.rmdir()  # it is empty
    folder.rename(target)
  except (OSError, safetensors.SafetensorError) as error:
    kind = UserError if isinstance(error, OSError) and not is_storage(error) else StorageError
    raise kind(f"{target}: cannot be written ({error})") from error
  finally:
    shutil.rmtree(folder, ignore_errors=True)
