"""Reads documents from files on this machine: the standard library, or the user's own text.

A hash of a document's name puts it in a split, 90/5/5, so it stays there when other documents are
added or removed.
"""

import collections
import hashlib
import json
import os
import pathlib
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO

from moe_jax.config import Data, UserError

SPLITS = ("train", "validation", "test")
_MOST_DOMAINS = 32  # with more folders than this, folders are no kinds of text
_LARGEST = 2**30  # the most bytes of one document, because a TFDS record ends at 2 GiB

Document = tuple[str, str]  # name, text


def hash_of(name: str) -> float:
  """Hashes a name to a number that is uniform in [0, 1)."""
  return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48


def split_of(name: str) -> str:
  """Returns the split of a document: train, validation or test."""
  place = hash_of(name)
  return "train" if place < 0.9 else "validation" if place < 0.95 else "test"


def list_files(root: pathlib.Path, skip: frozenset[str] = frozenset()) -> list[str]:
  """Returns the sorted paths of files below `root`; leaves out hidden names and those in `skip`."""
  paths = []
  for folder, folders, files in os.walk(root):
    folders[:] = [name for name in folders if name not in skip and not name.startswith(".")]
    paths += [os.path.join(folder, name) for name in files if not name.startswith(".")]
  return sorted(pathlib.Path(path).relative_to(root).as_posix() for path in paths)


def stdlib() -> tuple[pathlib.Path, list[str]]:
  """Returns the standard library's folder and the names of its .py files.

  Its tests are included if they are installed. Some packagers (Debian, slim images) leave them out;
  then the text has a third of the size and is harder to compress.
  """
  root = pathlib.Path(sysconfig.get_path("stdlib"))
  skip = frozenset(["site-packages", "dist-packages", "__pycache__"])
  return root, [name for name in list_files(root, skip) if name.endswith(".py")]


def stdlib_documents(root: pathlib.Path, names: Iterable[str]) -> Iterator[Document]:
  """Yields the files of these names; leaves out empty files and files that are not UTF-8."""
  for name in names:
    try:
      text = (root / name).read_bytes().decode()
    except (OSError, UnicodeDecodeError):
      continue
    if text:
      yield name, text


def user_files(config: Data) -> tuple[pathlib.Path, list[str]]:
  """Returns the folder of config.path and the names of the files in it, or of the one file.

  Raises:
    UserError: config.path is empty, does not exist, or is a folder without files.
  """
  path = pathlib.Path(config.path).expanduser().absolute()
  if not config.path:
    raise UserError(
      "config.data.name='text' needs config.data.path: a .txt or .jsonl file, or a folder of them"
    )
  if not path.exists():
    raise UserError(f"config.data.path={config.path!r}: no such file or folder")
  if path.is_file():
    return path.parent, [path.name]
  names = list_files(path)
  if not names:
    raise UserError(f"config.data.path={config.path!r}: no files in this folder")
  return path, names


def first_folders(names: list[str]) -> tuple[str, ...]:
  """Returns the folders directly below the user's folder, which label the documents in them.

  Returns () if there are fewer than 2 or more than 32.
  """
  folders = sorted({name.split("/")[0] for name in names if "/" in name})
  return tuple(folders) if 2 <= len(folders) <= _MOST_DOMAINS else ()


def user_documents(config: Data, root: pathlib.Path, names: list[str]) -> Iterator[Document]:
  """Yields the documents in the user's files.

  Each line of a .jsonl file is a document, whose text is in the field config.text_field; any other
  file is one document.

  Raises:
    UserError: a file cannot be read, is too large or not UTF-8, or a line has no such text.
  """
  for name in names:
    if name.endswith(".jsonl"):
      yield from _lines(config, root / name, name)
    else:
      if (root / name).stat().st_size > _LARGEST:
        raise UserError(
          f"config.data.path={config.path!r}: {root / name} is over 1 GiB; cut it into several "
          "files, or into lines of a .jsonl file"
        )
      with _open(config, root / name) as file:
        text = _decode_text(config, file.read(), str(root / name))
      if text.strip():
        yield name, text


def _lines(config: Data, path: pathlib.Path, name: str) -> Iterator[Document]:
  field = config.text_field
  with _open(config, path) as file:
    for number, line in enumerate(file, 1):
      if not line.strip():
        continue
      try:
        example = json.loads(_decode_text(config, line, f"{path}:{number}"))
      except json.JSONDecodeError as error:
        raise UserError(
          f"config.data.path={config.path!r}: {path}:{number} is not JSON: {error}"
        ) from None
      fields = example if isinstance(example, dict) else {}
      text = fields.get(field)
      if not isinstance(text, str):
        texts = [key for key, value in fields.items() if isinstance(value, str)]
        raise UserError(
          f"config.data.text_field={field!r}: {path}:{number} has no such text; its text fields: "
          f"{', '.join(texts) or 'none'}"
        )
      if text:
        # JSON may contain half of a surrogate pair, which UTF-8 cannot encode.
        yield f"{name}:{number}", text.encode(errors="replace").decode()


def _open(config: Data, path: pathlib.Path) -> BinaryIO:
  try:
    return open(path, "rb")
  except OSError as error:
    raise UserError(
      f"config.data.path={config.path!r}: cannot read {path}: {error.strerror}"
    ) from None


def _decode_text(config: Data, data: bytes, where: str) -> str:
  try:
    if b"\0" not in data:
      return data.decode()
  except UnicodeDecodeError:
    pass
  raise UserError(
    f"config.data.path={config.path!r}: {where} is not UTF-8 text; convert it or remove it"
  )


def split_user_documents(
  config: Data, read: Callable[[], Iterator[Document]]
) -> Callable[[str], Iterator[Document]]:
  """Returns a function from a split to its documents.

  First reads all documents once, so that a mistake is reported before any work. If a split would be
  empty, the two documents of the highest hashes become validation and test. One or two documents
  are each cut by length instead, 90/5/5, at ends of lines.

  Args:
    config: names the path for error messages.
    read: yields all documents, each time it is called.

  Raises:
    UserError: there is no text, or too little to cut.
  """
  counts: collections.Counter[str] = collections.Counter()
  names: list[str] = []
  for name, _ in read():
    counts[split_of(name)] += 1
    if len(names) < 10_000:  # with more documents no split is empty
      names.append(name)
  if not names:
    raise UserError(f"config.data.path={config.path!r}: no text in it")
  if len(names) < 3:
    for name, text in read():
      if not all(_parts(text).values()):
        raise UserError(
          f"config.data.path={config.path!r}: {name} is too short to be cut into train, validation "
          "and test; give more text"
        )
    return lambda split: ((name, _parts(text)[split]) for name, text in read())
  splits: dict[str, str] = {}
  if len(counts) < 3:
    *rest, validation, test = sorted(names, key=hash_of)
    splits = dict.fromkeys(rest, "train") | {validation: "validation", test: "test"}
  return lambda split: (
    (name, text) for name, text in read() if (splits.get(name) or split_of(name)) == split
  )


def _parts(text: str) -> dict[str, str]:
  ends = [int(len(text) * 0.9), int(len(text) * 0.95)]
  lines = [text.rfind("\n", 0, end) + 1 for end in ends]
  first, second = lines if 0 < lines[0] < lines[1] else ends
  return dict(zip(SPLITS, (text[:first], text[first:second], text[second:]), strict=True))
