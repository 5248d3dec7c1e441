"""The tokens of a split as files in the cache: how they are written, and how they are read.

tokens.bin is the stream that pipeline.py describes, checksums.npy the CRC-32 of each of its parts,
documents.npy three numbers for each document, and about.json what else is known.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import zlib
from typing import Any, NamedTuple, Self

import numpy as np

from moe_jax.data import cache
from moe_jax.errors import DamagedError

_PART = 2**13  # tokens that have a checksum in common


class Tokens:
  """The stream in a file. What is read of it is compared with its checksum, each time."""

  def __init__(self, path: pathlib.Path, dtype: str, checksums_P: np.ndarray):
    self._path, self._dtype, self._checksums_P = path, np.dtype(dtype), checksums_P
    # Not a memory map: if the disk fails or the file is cut, reading a map ends the process.
    self._file = os.open(path, os.O_RDONLY)
    self._length = os.fstat(self._file).st_size // self._dtype.itemsize

  def __del__(self) -> None:
    os.close(self._file)

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, places: slice) -> np.ndarray:
    """Returns a piece of the stream.

    Raises:
      DamagedError: the file is no longer what was written.
    """
    start, stop, _ = places.indices(self._length)
    first, end = start // _PART, -(-stop // _PART)
    parts = [self._part(p) for p in range(first, end)]
    offset = first * _PART
    return np.frombuffer(b"".join(parts), self._dtype)[start - offset : max(stop - offset, 0)]

  def _part(self, p: int) -> bytes:
    size = _PART * self._dtype.itemsize
    part = os.pread(self._file, size, p * size)
    if zlib.crc32(part) != self._checksums_P[p]:
      with contextlib.suppress(OSError):
        (self._path.parent / cache.SUSPECT).touch()  # the next start looks at the whole file
      raise DamagedError(
        f"{self._path} is damaged: a checksum is another one; the next start of the same command "
        "makes it again and goes on"
      )
    return part


class Stored(NamedTuple):
  """What `read` returns."""

  stream_N: Tokens
  documents_3M: np.ndarray  # int64: the rows starts_M, domain_M and source_M of pipeline.Rows
  counts: dict[str, Any]  # as they were given to `Writer.finish`
  digest: str  # SHA-256 of the stream


class Writer:
  """Writes the files into an empty folder: `add`, again and again, then `finish`."""

  def __init__(self, folder: pathlib.Path, dtype: np.dtype):
    self._folder, self._dtype = folder, dtype
    self._file = open(folder / "tokens.bin", "wb")  # noqa: SIM115  closed by __exit__
    self._digest = hashlib.sha256()
    self._pending = bytearray()  # the beginning of a part
    self._checksums: list[int] = []

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self._file.close()

  def add(self, tokens_N: np.ndarray) -> None:
    """Appends tokens to the stream."""
    data = tokens_N.astype(self._dtype).tobytes()
    self._digest.update(data)
    self._pending += data
    size = _PART * self._dtype.itemsize
    while len(self._pending) >= size:
      self._write(self._pending[:size])
      del self._pending[:size]

  def _write(self, part: bytes | bytearray) -> None:
    self._checksums.append(zlib.crc32(part))
    self._file.write(part)

  def finish(self, documents_3M: np.ndarray, counts: dict[str, Any]) -> None:
    """Writes the rest, and the checksums of all files."""
    if self._pending:
      self._write(self._pending)
    self._file.close()
    # Rows are contiguous, so that a search reads few pages of the map and copies nothing.
    np.save(self._folder / "documents.npy", documents_3M)
    np.save(self._folder / "checksums.npy", np.array(self._checksums, np.uint32))
    about = {"dtype": self._dtype.name, "digest": self._digest.hexdigest(), "counts": counts}
    (self._folder / "about.json").write_text(json.dumps(about))
    cache.seal(self._folder)


def read(folder: pathlib.Path) -> Stored:
  """Returns what a Writer has written. `cache.check` comes before."""
  about = json.loads((folder / "about.json").read_text())
  checksums_P = np.load(folder / "checksums.npy", mmap_mode="r")
  return Stored(
    stream_N=Tokens(folder / "tokens.bin", about["dtype"], checksums_P),
    documents_3M=np.load(folder / "documents.npy", mmap_mode="r"),
    counts=about["counts"],
    digest=about["digest"],
  )
