"""Data sets, prepared on first use and read by random access; no TensorFlow needed."""

import functools
import hashlib
import json
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import tensorflow_datasets as tfds

from moe_jax.config import Data
from moe_jax.data import cache, catalog, domains, text_files
from moe_jax.errors import DamagedError, UserError

_PYTHON = ".".join(map(str, sys.version_info[:3]))
_ReadSplit = Callable[[str], Iterator[text_files.Document]]


class Corpus(NamedTuple):
  """Documents that are read or made on this machine.

  key: a folder's name in the cache, which differs for different contents.
  documents: checks the files, raises UserError for a mistake, and returns a function from a split
    to its documents.
  labels: the domains that a document can have, each the first folder of its name.
  """

  key: str
  documents: Callable[[], _ReadSplit]
  labels: tuple[str, ...] = ()


class Dataset(NamedTuple):
  """Declares a data set that is made on this machine."""

  read: Callable[[Data], Corpus]
  version: str  # three numbers, which TFDS requires
  about: str  # a cell of docs/guide.md
  field: str = ""  # the field of the text in TFDS's records; "" for config.data.text_field


class DamagedCopy(DamagedError):
  """The prepared documents in the cache, which can be made again, are damaged."""

  def __init__(self, folder: pathlib.Path, inode: int, why: str):
    super().__init__(f"{folder} is damaged: {why}; delete it, and the next start makes it again")
    self._remove = functools.partial(cache.remove, folder, inode, f"{folder} is damaged: {why}")

  def remove(self) -> None:
    """Removes the copy, unless another process has made it again by now."""
    self._remove()


class Documents:
  """Random access to the documents of one split as UTF-8 bytes.

  identity: a string that differs for different documents.
  domains: the labels that a document can have, the same for every split; () if there are none.
  """

  def __init__(
    self,
    source: Any,
    field: str,
    identity: str,
    domains: tuple[str, ...] = (),
    damaged: Callable[[str], DamagedError] = DamagedError,
  ):
    """Keeps the arguments; `damaged(why)` makes the error for a document that cannot be read."""
    self.identity = identity
    self.domains = domains
    self._source = source
    self._field = field
    self._damaged = damaged

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> bytes:
    text = self._read(index)[self._field]
    return text.encode() if isinstance(text, str) else text

  def name(self, index: int) -> str:
    """The document's path, or its number in the split where the data set names none."""
    path = self._read(index).get("path", f"document {index}")
    return path if isinstance(path, str) else path.decode()

  def _read(self, index: int) -> dict[str, Any]:
    try:
      return self._source[index]
    except RuntimeError as error:  # which array_record raises for a wrong checksum
      raise self._damaged(catalog.first_line(error)) from None

  def domain(self, index: int) -> int:
    """Returns the index in `domains` of the first folder of a document's path; -1 if not there."""
    folder = self.name(index).split("/")[0]
    return self.domains.index(folder) if folder in self.domains else -1


def prepare(config: Data, split: str) -> Documents:
  """Returns the documents of `split`: train, validation or test.

  config.train_split, config.validation_split or config.test_split names the split for TFDS. TFDS
  orders documents by a hash of each example's key, so the order is the same on every machine.

  Raises:
    UserError: there is no such data set, split or text field, or it cannot be prepared or read.
  """
  field = config.text_field
  labels: tuple[str, ...] = ()
  damaged: Callable[[str], DamagedError]
  if config.name in DATASETS:
    record = DATASETS[config.name]
    corpus = record.read(config)
    copy = _prepare_corpus(config, record.version, corpus)
    damaged = functools.partial(DamagedCopy, copy, copy.stat().st_ino)
    with catalog.quiet():
      builder = tfds.builder_from_directory(copy / config.name / record.version)
    labels = corpus.labels
    field = record.field or field
  else:
    builder = catalog.find(config.name, list(DATASETS))
    damaged = functools.partial(catalog.damaged, config.name, builder.data_dir)
  if field not in builder.info.features:
    raise UserError(
      f"config.data.text_field={field!r} is not a field of config.data.name={config.name!r}, which "
      f"has: {', '.join(builder.info.features)}"
    )
  name = getattr(config, f"{split}_split")
  folder = pathlib.Path(builder.data_dir)
  try:
    with catalog.quiet():
      source = builder.as_data_source(name)
      first = source[0][field]
  except (ValueError, KeyError, AssertionError, IndexError) as error:
    raise UserError(
      f"config.data.{split}_split={name!r} is not a split of config.data.name={config.name!r}, or "
      f"is empty; the splits are: {', '.join(builder.info.splits)} ({catalog.first_line(error)})"
    ) from None
  except RuntimeError as error:
    raise damaged(catalog.first_line(error)) from None
  if not isinstance(first, bytes | str):
    raise UserError(f"config.data.text_field={field!r} holds {type(first).__name__}, not text")
  info = hashlib.sha256((folder / "dataset_info.json").read_bytes()).hexdigest()
  time_ns = (folder / "dataset_info.json").stat().st_mtime_ns
  identity = json.dumps([str(folder), info, time_ns, name, field])
  return Documents(source, field, identity, labels, damaged)


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]  # tfds adds it
  """A TFDS builder that writes the documents (name, text) that `documents(split)` yields."""

  def __init__(self, name: str, version: str, documents: _ReadSplit, data_dir: pathlib.Path):
    # Attributes of the object; in TFDS they are attributes of the class.
    self.name, self.VERSION = name, tfds.core.Version(version)
    self._documents = documents
    super().__init__(data_dir=data_dir)

  def _info(self) -> tfds.core.DatasetInfo:
    text = tfds.features.Text()
    features = tfds.features.FeaturesDict({"text": text, "path": text})
    return tfds.core.DatasetInfo(builder=self, features=features)

  def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict[str, str]]]]:
    return {split: self._generate_examples(split) for split in text_files.SPLITS}

  def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, str]]]:
    for name, text in self._documents(split):
      yield name, {"text": text, "path": name}


def _python_stdlib(config: Data) -> Corpus:
  root, names = text_files.stdlib()

  def documents(split: str) -> Iterator[text_files.Document]:
    split_names = [name for name in names if text_files.split_of(name) == split]
    return text_files.stdlib_documents(root, split_names)

  return Corpus(_library_key(config, root, names), lambda: documents)


def _python_domains(config: Data) -> Corpus:
  root, names = domains.sources()
  key = _library_key(config, root, names, domains.VERSION)
  return Corpus(key, lambda: functools.partial(domains.documents, root, names), domains.DOMAINS)


def _library_key(config: Data, root: pathlib.Path, names: list[str], *version: str) -> str:
  if not names:
    raise UserError(
      f"config.data.name={config.name!r}: no .py files in {root}; use your own text: "
      "--config.data.name=text --config.data.path=..."
    )
  sizes = [f"{name} {(root / name).stat().st_size}" for name in names]
  return f"{config.name}-{_PYTHON}-{cache.key(*version, *sizes)}"


def _user_text(config: Data) -> Corpus:
  files = text_files.user_files(config)
  parts = ["3", str(files.root), config.text_field]  # 3: of the rules by which files are read
  parts += [f"{name} {size} {time_ns}" for name, (size, time_ns) in files.seen.items()]

  def documents() -> _ReadSplit:
    text_files.describe(config, files)
    return text_files.split_user_documents(config, lambda: text_files.user_documents(config, files))

  return Corpus(f"text-{cache.key(*parts)}", documents, text_files.first_folders(files.seen))


# The data sets that are made on this machine; any other name is a data set of TFDS.
DATASETS = {
  "python_stdlib": Dataset(
    _python_stdlib, _PYTHON,
    "the `.py` files of the running Python's standard library, about 30 MB",
  ),
  "python_domains": Dataset(
    _python_domains, _PYTHON, "11 MB made of it in three labelled domains: code, prose, bytecode"
  ),
  "text": Dataset(
    _user_text, "1.0.0",
    "your files: `config.data.path` is a file, or a folder whose every file is read",
    field="text",
  ),
}  # fmt: skip


def _prepare_corpus(config: Data, version: str, corpus: Corpus) -> pathlib.Path:
  """Returns the folder in the cache with the documents of a corpus, for all splits."""

  def build(folder: pathlib.Path) -> None:
    start = time.monotonic()
    documents = corpus.documents()
    with catalog.quiet():
      builder = _Builder(config.name, version, documents, folder)
      try:
        builder.download_and_prepare(file_format=catalog.FORMAT)
      except RuntimeError as error:  # which array_record raises for a full disk
        raise cache.failed(folder, " ".join(str(error).split())[:200]) from error
    shutil.rmtree(folder / "downloads", ignore_errors=True)  # an empty folder that TFDS makes
    cache.seal(folder, without="*.array_record*")
    counts = {split: info.num_examples for split, info in builder.info.splits.items()}
    cache.notice(
      f"prepared {config.name} {config.path or version}: "
      + ", ".join(f"{count:,} {split}" for split, count in counts.items())
      + f" documents, {builder.info.dataset_size}, {time.monotonic() - start:.1f} s"
    )

  return cache.build_once(cache.directory() / "prepared" / corpus.key, build, cache.check)
