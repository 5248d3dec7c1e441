"""The tokens of a split as files in the cache: how they are written, and how they are read.

tokens.bin is the stream that pipeline.py describes, documents.npy three numbers for each document,
names.txt their names, and about.json what else is known: also the SHA-256 of each file.
"""

import collections
import functools
import hashlib
import itertools
import os
import pathlib
from typing import Any, NamedTuple, Self

import numpy as np

from moe_jax.errors import DamagedError
from moe_jax.storage import files

_TOKENS, _DOCUMENTS, _NAMES, _ABOUT = "tokens.bin", "documents.npy", "names.txt", "about.json"
_TABLE, _ORDERED, _STATE = "documents.bin", "ordered.bin", "state.json"  # while they are written
_GROWING = (_TOKENS, _NAMES, _TABLE)


class Encoded(NamedTuple):
  """A document in tokens."""

  place: int  # which orders the documents of the stream
  name: str  # "" where all documents have none
  domain: int
  num_bytes: int
  ids_N: np.ndarray  # without the separator


class TokenWriter:
  """Writes the files into a folder, whatever order the documents come in.

  Where the folder has what a killed writer left, it goes on there: `sums` are as they were saved.
  """

  def __init__(self, folder: pathlib.Path, dtype: str, separator: int):
    self._folder, self._dtype = folder, np.dtype(dtype)
    self._separator = np.array([separator], dtype).tobytes()
    saved = files.read_json(folder / _STATE, "") if (folder / _STATE).exists() else {}
    self.sums = collections.Counter[str](saved.get("sums", {}))
    self._files = {name: open(folder / name, "ab") for name in _GROWING}  # noqa: SIM115
    for name, file in self._files.items():
      file.truncate(saved.get(name, 0))  # what came after the state was saved
      file.seek(0, os.SEEK_END)  # which the place of a file that is cut is not

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    for file in self._files.values():
      file.close()

  def add(self, document: Encoded) -> None:
    tokens, names, table = self._files.values()
    tokens.write(self._separator + document.ids_N.astype(self._dtype).tobytes())
    if document.name:
      names.write(document.name.encode() + b"\n")
    row = (document.place, document.domain, 1 + len(document.ids_N), document.num_bytes)
    table.write(np.array(row, np.int64).tobytes())

  def save(self) -> None:
    """Lets a later writer go on from here."""
    sizes = {}
    for name, file in self._files.items():
      file.flush()
      os.fsync(file.fileno())
      sizes[name] = file.tell()
    files.write_json(self._folder / _STATE, sizes | {"sums": self.sums})

  def finish(self) -> None:
    """Orders the documents, and leaves the files that `read_tokens` reads."""
    tokens, names, _ = self._files.values()
    named, folder = names.tell() > 0, self._folder
    self.save()
    tokens.write(self._separator)
    self.__exit__()
    places, domains, lengths, sizes = np.fromfile(folder / _TABLE, np.int64).reshape(-1, 4).T
    order_M = np.argsort(places, kind="stable")
    ordered = folder / _TOKENS
    if (np.diff(order_M) < 0).any():
      ordered = folder / _ORDERED
      _reorder(folder / _TOKENS, ordered, self._dtype, lengths, order_M)
    (folder / _STATE).unlink()  # a later writer, for whom the stream was kept, begins again now
    ordered.replace(folder / _TOKENS)
    starts_M = np.cumsum(lengths[order_M]) - lengths[order_M]
    source_M = order_M if named else places
    # Rows are contiguous, so that a search reads few pages of the map and copies nothing.
    documents_3M = np.array([starts_M, domains[order_M], source_M], np.int64)
    np.save(folder / _DOCUMENTS, documents_3M)
    (folder / _TABLE).unlink()
    digests = {name: _sha256(folder / name) for name in (_TOKENS, _DOCUMENTS, _NAMES)}
    about = dict(dtype=self._dtype.name, named=named, num_documents=len(places))
    about |= dict(num_bytes=int(sizes.sum()), files=digests)
    files.write_json(folder / _ABOUT, files.sealed(about))


def _reorder(
  path: pathlib.Path,
  ordered: pathlib.Path,
  dtype: np.dtype,
  lengths_M: np.ndarray,
  order_M: np.ndarray,
) -> None:
  """Writes the documents of a stream in their order."""
  stream_N = np.memmap(path, dtype, "r")
  ends_M = np.cumsum(lengths_M)
  with open(ordered, "wb") as tokens:
    for m in order_M:
      tokens.write(stream_N[ends_M[m] - lengths_M[m] : ends_M[m]].tobytes())
    tokens.write(stream_N[-1:].tobytes())


def read_tokens(folder: pathlib.Path) -> dict[str, Any]:
  """Returns what a `TokenWriter` has written as fields of pipeline.Rows; arrays are maps of files.

  Raises:
    DamagedError: a file is not what was written, or is missing; no remedy is named.
  """
  try:
    about = files.read_json(folder / _ABOUT, "")
    digests = about["files"]
  except (DamagedError, KeyError):
    raise DamagedError(f"{folder / _ABOUT} is damaged") from None
  for name, digest in digests.items():
    if not (folder / name).is_file() or _sha256(folder / name) != digest:
      raise DamagedError(f"{folder / name} is damaged")
  starts_M, domain_M, source_M = np.load(folder / _DOCUMENTS, mmap_mode="r")
  return dict(
    stream_N=np.memmap(folder / _TOKENS, about["dtype"], "r"),
    starts_M=starts_M,
    domain_M=domain_M,
    source_M=source_M,
    num_documents=about["num_documents"],
    num_bytes=about["num_bytes"],
    digest=digests[_TOKENS],
    name=functools.partial(_name, folder) if about["named"] else "document {}".format,
  )


def _name(folder: pathlib.Path, number: int) -> str:
  with open(folder / _NAMES, "rb") as names:
    return next(itertools.islice(names, number, None))[:-1].decode()


def _sha256(path: pathlib.Path) -> str:
  with open(path, "rb") as file:  # not a memory map, where a disk's error ends the process
    return hashlib.file_digest(file, "sha256").hexdigest()
