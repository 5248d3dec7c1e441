"""The tokens of a split as files in the cache: how they are written, and how they are read.

tokens.bin is the stream that pipeline.py describes, documents.npy three numbers for each document,
names.txt their names, and about.json what else is known: also the SHA-256 of each file.
"""

import array
import functools
import hashlib
import itertools
import pathlib
from collections.abc import Iterable
from typing import Any, NamedTuple

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
  digests = {name: _sha256(folder / name) for name in (_TOKENS, _DOCUMENTS, _NAMES)}
  about = dict(dtype=dtype, named=named, num_documents=len(places), num_bytes=num_bytes)
  files.write_json(folder / _ABOUT, files.sealed(about | dict(files=digests)))


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


def read_tokens(folder: pathlib.Path) -> dict[str, Any]:
  """Returns what `write_tokens` has written as fields of pipeline.Rows; arrays are maps of files.

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
