"""The tokens of a split as files in the cache: how they are written, and how they are read.

tokens.bin is the stream that pipeline.py describes, documents.npy three numbers for each document,
names.txt their names, and about.json what else is known: also the size and CRC-32 of each file.
"""

import array
import functools
import hashlib
import itertools
import pathlib
import zlib
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from moe_jax.errors import DamagedError
from moe_jax.storage import files

_TOKENS, _DOCUMENTS, _NAMES, _ABOUT = "tokens.bin", "documents.npy", "names.txt", "about.json"


class Encoded(NamedTuple):
  """A document in tokens."""

  place: int  # which orders the documents of the stream
  name: str  # "" where all documents have none
  domain: int
  num_bytes: int
  ids_N: np.ndarray  # without the separator


class Stored(NamedTuple):
  """What `read` returns."""

  # These fields are those of pipeline.Rows; the arrays are maps of the files.
  stream_N: np.ndarray
  starts_M: np.ndarray
  domain_M: np.ndarray
  source_M: np.ndarray
  num_documents: int
  num_bytes: int
  digest: str  # SHA-256 of the stream
  name: Callable[[int], str]


def write_tokens(
  folder: pathlib.Path, dtype: str, separator: int, documents: Iterable[Encoded]
) -> None:
  """Writes the files into an empty folder, whatever order the documents come in."""
  places, domains, lengths = (array.array("q") for _ in range(3))
  num_bytes = 0
  begin = np.array([separator], dtype)
  with open(folder / _TOKENS, "wb") as tokens, open(folder / _NAMES, "wb") as names:
    for document in documents:
      places.append(document.place)
      domains.append(document.domain)
      lengths.append(1 + len(document.ids_N))
      num_bytes += document.num_bytes
      tokens.write(begin.tobytes() + document.ids_N.astype(dtype).tobytes())
      if document.name:
        names.write(document.name.encode() + b"\n")
    named = names.tell() > 0
    tokens.write(begin.tobytes())
  order_M = np.argsort(places, kind="stable")
  lengths_M = np.array(lengths, np.int64)
  if (np.diff(order_M) < 0).any():
    _reorder(folder / _TOKENS, np.dtype(dtype), lengths_M, order_M)
  starts_M = np.cumsum(lengths_M[order_M]) - lengths_M[order_M]
  source_M = order_M if named else np.array(places, np.int64)
  # Rows are contiguous, so that a search reads few pages of the map and copies nothing.
  documents_3M = np.array([starts_M, np.array(domains, np.int64)[order_M], source_M], np.int64)
  np.save(folder / _DOCUMENTS, documents_3M)
  with open(folder / _TOKENS, "rb") as tokens:
    digest = hashlib.file_digest(tokens, "sha256").hexdigest()
  sums = {name: _size_and_crc32(folder / name) for name in (_TOKENS, _DOCUMENTS, _NAMES)}
  about = dict(dtype=dtype, sha256=digest, num_documents=len(places), num_bytes=num_bytes)
  files.write_json(folder / _ABOUT, files.sealed(about | dict(named=named, files=sums)))


def _reorder(
  path: pathlib.Path, dtype: np.dtype, lengths_M: np.ndarray, order_M: np.ndarray
) -> None:
  """Brings the documents in a stream into their order."""
  unordered = path.rename(path.with_suffix(".unordered"))
  stream_N = np.memmap(unordered, dtype, "r")
  ends_M = np.cumsum(lengths_M)
  with open(path, "wb") as tokens:
    for m in order_M:
      tokens.write(stream_N[ends_M[m] - lengths_M[m] : ends_M[m]].tobytes())
    tokens.write(stream_N[-1:].tobytes())
  unordered.unlink()


def read_tokens(folder: pathlib.Path) -> Stored:
  """Returns what `write` has written, after comparing it with the checksums.

  Raises:
    DamagedError: a file is not what was written, or is missing; no remedy is named.
  """
  try:
    about = files.read_json(folder / _ABOUT, "")
    sums = about["files"]
  except (DamagedError, KeyError):
    raise DamagedError(f"{folder / _ABOUT} is damaged") from None
  for name, written in sums.items():
    try:
      found = _size_and_crc32(folder / name)
    except FileNotFoundError as error:
      raise DamagedError(f"{folder / name} is damaged: {error.strerror}") from None
    if found != written:
      raise DamagedError(f"{folder / name} is damaged: its size or checksum is another one")
  starts_M, domain_M, source_M = np.load(folder / _DOCUMENTS, mmap_mode="r")
  return Stored(
    stream_N=np.memmap(folder / _TOKENS, about["dtype"], "r"),
    starts_M=starts_M,
    domain_M=domain_M,
    source_M=source_M,
    num_documents=about["num_documents"],
    num_bytes=about["num_bytes"],
    digest=about["sha256"],
    name=functools.partial(_name, folder) if about["named"] else "document {}".format,
  )


def _name(folder: pathlib.Path, number: int) -> str:
  with open(folder / _NAMES, "rb") as names:
    return next(itertools.islice(names, number, None))[:-1].decode()


def _size_and_crc32(path: pathlib.Path) -> list[int]:
  size = crc = 0
  with open(path, "rb") as file:  # not a memory map, where a disk's error ends the process
    while block := file.read(2**20):
      size, crc = size + len(block), zlib.crc32(block, crc)
  return [size, crc]
