"""The data sets by name: those that are read or made on this machine, and all others of TFDS."""

import functools
import json
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

from moe_jax.config import Data
from moe_jax.data import catalog, domains, tables, text_files
from moe_jax.data import documents as documents_lib
from moe_jax.data.documents import Corpus, Documents
from moe_jax.errors import UserError
from moe_jax.storage import cache

_PYTHON = ".".join(map(str, sys.version_info[:3]))


class Dataset(NamedTuple):
  """Declares a data set that is read or made on this machine."""

  read: Callable[[Data], Corpus]
  about: str  # a cell of docs/guide.md


def prepare(config: Data, split: str) -> Documents:
  """Returns the documents of `split`, train, validation or test, in the same order everywhere.

  Raises:
    UserError: there is no such data set, split or text field, or it cannot be prepared or read.
      Mistakes in the user's files are found when the documents are read.
  """
  if config.name not in DATASETS:
    return catalog.documents(config, split, list(DATASETS))
  corpus = DATASETS[config.name].read(config)
  identity = json.dumps([corpus.key, getattr(config, f"{split}_split")])
  select = functools.partial(documents_lib.select, config, corpus, split)
  return Documents(identity, corpus.labels, select)


def _python_stdlib(config: Data) -> Corpus:
  root, names = text_files.stdlib()
  key = _library_key(config, root, names)
  return Corpus(key, lambda *_: text_files.stdlib_documents(root, names))


def _python_domains(config: Data) -> Corpus:
  root, names = domains.sources()
  key = _library_key(config, root, names, domains.VERSION)
  return Corpus(
    key, lambda *_: iter(domains.documents(root, tuple(names))), domains.DOMAINS, domains.split_of
  )


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
  parts = ["3", str(files.root), config.column]  # 3: of the rules by which files are read
  parts += [f"{name} {size} {time_ns}" for name, (size, time_ns) in files.seen.items()]

  def read(empty: list[str], keep: Callable[[str], bool]) -> Iterator[text_files.Document]:
    for name, text in text_files.user_documents(config, files, keep):
      if text.strip():
        yield name, text
      elif of_tables:
        yield name, ""
      else:
        empty.append(name)

  of_tables = all(map(tables.is_table, files.seen))
  splits = text_files.named_splits(files)
  return Corpus(
    f"text-{cache.key(*parts)}",
    read,
    text_files.first_folders(files.seen),
    functools.partial(text_files.split_in, splits, frozenset(splits.values())),
    text_files.describe_files(config, files),
    functools.partial(text_files.document_names, config, files) if of_tables else None,
  )


# The data sets that are made on this machine; any other name is a data set of TFDS.
DATASETS = {
  "python_stdlib": Dataset(
    _python_stdlib,
    "the `.py` files of the running Python's standard library, about 30 MB",
  ),
  "python_domains": Dataset(
    _python_domains, "11 MB made of it in three labelled domains: code, prose, bytecode"
  ),
  "text": Dataset(
    _user_text,
    "your files: `config.data.path` is a file, a folder, or a pattern: text, JSON lines, Parquet, "
    "Arrow",
  ),
}
