"""What a data set gives: the documents of a split. And how texts of this machine become that.

TFDS, which once stored a copy of these texts, decided their order, and the digests of recorded runs
depend on it: the documents of a split are sorted by a hash of the split's name and their own.
"""

import hashlib
import types
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from moe_jax.config import Data
from moe_jax.data import text_files
from moe_jax.data.text_files import SPLITS, Document
from moe_jax.errors import UserError, few, notice, short
from moe_jax.start import progress


class Documents(NamedTuple):
  """The documents of one split.

  identity: a string that differs for different documents.
  domains: the labels that a document can have, the same for every split; () if there are none.
  read: returns how many documents there are, and an iterator over (place, name, text as UTF-8). The
    place orders them in the split; the name is "" where the data set has none.
  """

  identity: str
  domains: tuple[str, ...]
  read: Callable[[], tuple[int, Iterator[tuple[int, str, bytes]]]]

  def domain(self, name: str) -> int:
    """Returns the index in `domains` of the first folder of a document's name; -1 if not there."""
    folder = name.split("/")[0]
    return self.domains.index(folder) if folder in self.domains else -1


class Corpus(NamedTuple):
  """Texts that are read or made on this machine.

  key: differs for different texts.
  read: yields all documents, the same each time; raises UserError for a mistake in a file. It adds
    the names of documents without text, which it leaves out, to a list. It may leave out those
    whose names a function, which says what is wanted, does not accept.
  labels: the domains that a document can have, each the first folder of its name.
  split_of: the split of a document, by its name.
  notes: lines that say what is read.
  names: yields the names of all documents where that is less work than to read them; the documents
    of a split then have the order in which they are read, and empty ones are read too.
  """

  key: str
  read: Callable[[list[str], Callable[[str], bool]], Iterator[Document]]
  labels: tuple[str, ...] = ()
  split_of: Callable[[str], str] = text_files.split_of
  notes: tuple[str, ...] = ()
  names: Callable[[], Iterator[str]] | None = None


class _Listing(NamedTuple):
  """Which documents are in which split."""

  keys: dict[str, np.ndarray]  # {split: the sorted keys of its documents}
  splits: dict[str, tuple[str, ...]]  # of a document, where Corpus.split_of does not say


_listings: dict[str, _Listing] = {}  # {Corpus.key}: a run's splits have one listing
_MOST_NAMES = 10_000  # with more documents no split is empty, unless files' names say so


def no_split(config: Data, split: str, splits: list[str], error: Exception) -> UserError:
  """Returns the error for a config's split that the data set does not have."""
  name = getattr(config, f"{split}_split")
  return UserError(
    f"config.data.{split}_split={name!r} is not a split of config.data.name={config.name!r}, or "
    f"is empty; the splits are: {', '.join(splits)} ({short(error)})"
  )


def select(
  config: Data, corpus: Corpus, split: str
) -> tuple[int, Iterator[tuple[int, str, bytes]]]:
  """Returns `Documents.read` of the part of a corpus that config names for `split`.

  If a split would be empty, the two documents of the highest hashes become validation and test. One
  or two documents are each cut by length instead, 90/5/5, at ends of lines.

  Raises:
    UserError: there is no text, too little to cut, or no such split.
  """
  listing = _listed(config, corpus)
  infos = {
    name: types.SimpleNamespace(num_examples=len(keys), shard_lengths=[len(keys)])
    for name, keys in listing.keys.items()
  }
  name = getattr(config, f"{split}_split")
  try:
    cuts = tfds.core.ReadInstruction.from_spec(name).to_absolute(infos)
    parts = [(cut.splitname, listing.keys[cut.splitname][cut.from_ : cut.to]) for cut in cuts]
    count = sum(len(keys) for _, keys in parts)
    if not count:
      raise ValueError("no documents")
  except (ValueError, NotImplementedError) as error:
    raise no_split(config, split, list(SPLITS), error) from None

  def splits_of(name: str) -> tuple[str, ...]:
    return listing.splits.get(name) or (corpus.split_of(name),)

  def wanted(name: str) -> bool:
    return any(of in splits_of(name) for of, _ in parts)

  def documents() -> Iterator[tuple[int, str, bytes]]:
    for number, (name, text) in enumerate(corpus.read([], wanted)):
      splits = splits_of(name)
      for of in splits:
        piece = _cut(text)[of] if splits == SPLITS else text
        for place in _places(parts, of, name):
          yield number if corpus.names else place, name, piece.encode()

  return count, documents()


def _places(parts: list[tuple[str, np.ndarray]], split: str, name: str) -> Iterator[int]:
  """Yields where a document stands in a sum of parts of splits, which may have it again."""
  key, begin = _key(split, name), 0
  for of, keys in parts:
    if of == split:
      place = int(np.searchsorted(keys, key))
      if place < len(keys) and keys[place] == key:
        yield begin + place
    begin += len(keys)


def _key(split: str, name: str) -> bytes:
  """Returns the hash by which TFDS sorts, and a byte, because NumPy ignores zeros at an end."""
  text = (split + name).replace("\\", "/")
  return hashlib.md5(text.encode(), usedforsecurity=False).digest() + b"."


def _listed(config: Data, corpus: Corpus) -> _Listing:
  """Reads all documents once, so that a mistake is reported before any work."""
  if corpus.key in _listings:
    return _listings[corpus.key]
  for note in corpus.notes:
    notice(note)
  names: list[str] = []
  empty: list[str] = []
  keys = {split: bytearray() for split in SPLITS}
  with progress.waiting(f"looking through {config.path or config.name}"):
    found = corpus.names() if corpus.names else (n for n, _ in corpus.read(empty, lambda _: True))
    for name in found:
      split = corpus.split_of(name)
      keys[split] += _key(split, name)
      if len(names) < _MOST_NAMES:
        names.append(name)
  if not names:
    raise UserError(f"config.data.path={config.path!r}: no text in it")
  if empty:
    notice(f"left out {len(empty):,} documents of {config.path} without text: {few(empty)}")
  splits: dict[str, tuple[str, ...]] = {}
  if len(names) < 3:
    splits = dict.fromkeys(names, SPLITS)
    for name, text in corpus.read([], lambda _: True):
      if not all(_cut(text).values()):
        raise UserError(
          f"config.data.path={config.path!r}: {name} is too short to be cut into train, validation "
          "and test; give more text"
        )
  elif len(names) < _MOST_NAMES and not all(keys.values()):
    *rest, validation, test = sorted(names, key=text_files.hash_of)
    splits = {name: ("train",) for name in rest}
    splits |= {validation: ("validation",), test: ("test",)}
  if splits:
    for split in SPLITS:
      keys[split] = bytearray().join(_key(split, n) for n, of in splits.items() if split in of)
  in_order = {split: np.sort(np.frombuffer(keys[split], "S17")) for split in SPLITS}
  return _listings.setdefault(corpus.key, _Listing(in_order, splits))


def _cut(text: str) -> dict[str, str]:
  ends = [int(len(text) * 0.9), int(len(text) * 0.95)]
  lines = [text.rfind("\n", 0, end) + 1 for end in ends]
  first, second = lines if 0 < lines[0] < lines[1] else ends
  return dict(zip(SPLITS, (text[:first], text[first:second], text[second:]), strict=True))
