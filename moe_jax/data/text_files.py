"""Documents in files on this machine, and their split: the standard library, the user's own text.

A document's split is a hash of its name, 90/5/5, so it stays when other documents come or go.
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
_MOST_DOMAINS = 32  # more folders than these are an archive's order, not kinds of text
_LARGEST = 2**30  # bytes of one document: a TFDS record ends at 2 GiB

Document = tuple[str, str]  # name, text


def hash_of(name: str) -> float:
  """Uniform in [0, 1)."""
  return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48


def split_of(name: str) -> str:
  place = hash_of(name)
  return "train" if place < 0.9 else "validation" if place < 0.95 else "test"


def list_files(root: pathlib.Path, skip: frozenset[str] = frozenset()) -> list[str]:
  """Sorted paths below `root`, without hidden files and folders and those named in `skip`."""
  found = []
  for folder, folders, files in os.walk(root):
    folders[:] = [name for name in folders if name not in skip and not name.startswith(".")]
    found += [os.path.join(folder, name) for name in files if not name.startswith(".")]
  return sorted(pathlib.Path(path).relative_to(root).as_posix() for path in found)


def stdlib() -> tuple[pathlib.Path, list[str]]:
  """The standard library's folder and its .py files.

  With its tests where they are installed: some packagers (Debian, slim images) leave them out, and
  then the text is a third of the size and harder to compress.
  """
  root = pathlib.Path(sysconfig.get_path("stdlib"))
  skip = frozenset(["site-packages", "dist-packages", "__pycache__"])
  return root, [name for name in list_files(root, skip) if name.endswith(".py")]


def stdlib_documents(root: pathlib.Path, names: Iterable[str]) -> Iterator[Document]:
  for name in names:
    try:
      text = (root / name).read_bytes().decode()
    except (OSError, UnicodeDecodeError):
      continue
    if text:
      yield name, text


def user_files(config: Data) -> tuple[pathlib.Path, list[str]]:
  """config.path as a folder and the files in it."""
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
  """The folders right below the user's own, which label the documents in them; () if just one."""
  folders = sorted({name.split("/")[0] for name in names if "/" in name})
  return tuple(folders) if 2 <= len(folders) <= _MOST_DOMAINS else ()


def user_documents(config: Data, root: pathlib.Path, names: list[str]) -> Iterator[Document]:
  """Each line of a .jsonl file under config.text_field; any other file is one document."""
  for name in names:
    if name.endswith(".jsonl"):
      yield from _lines(config, root / name, name)
    else:
      if (root / name).stat().st_size > _LARGEST:
        raise UserError(
          f"config.data.path={config.path!r}: {root / name} is over 1 GiB; cut it into several "
          "files, or lines of a .jsonl file"
        )
      with _open(config, root / name) as file:
        text = _decode(config, file.read(), str(root / name))
      if text.strip():
        yield name, text


def _lines(config: Data, path: pathlib.Path, name: str) -> Iterator[Document]:
  field = config.text_field
  with _open(config, path) as file:
    for number, line in enumerate(file, 1):
      if not line.strip():
        continue
      try:
        example = json.loads(_decode(config, line, f"{path}:{number}"))
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
        # JSON may hold half of a surrogate pair, which UTF-8 cannot.
        yield f"{name}:{number}", text.encode(errors="replace").decode()


def _open(config: Data, path: pathlib.Path) -> BinaryIO:
  try:
    return open(path, "rb")
  except OSError as error:
    raise UserError(
      f"config.data.path={config.path!r}: cannot read {path}: {error.strerror}"
    ) from None


def _decode(config: Data, data: bytes, where: str) -> str:
  try:
    if b"\0" not in data:
      return data.decode()
  except UnicodeDecodeError:
    pass
  raise UserError(
    f"config.data.path={config.path!r}: {where} is not UTF-8 text; convert it or take it away"
  )


def split_user_documents(
  config: Data, read: Callable[[], Iterator[Document]]
) -> Callable[[str], Iterator[Document]]:
  """Documents by split; reads everything once first, so that mistakes come before work.

  Where so few documents leave a split empty, the two of the highest hashes become validation and
  test. One or two documents are each cut by length instead, 90/5/5, at ends of lines.
  """
  counts: collections.Counter[str] = collections.Counter()
  names: list[str] = []
  for name, _ in read():
    counts[split_of(name)] += 1
    if len(names) < 10_000:  # beyond, no split is empty
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
  chosen: dict[str, str] = {}
  if len(counts) < 3:
    *rest, validation, test = sorted(names, key=hash_of)
    chosen = dict.fromkeys(rest, "train") | {validation: "validation", test: "test"}
  return lambda split: (
    (name, text) for name, text in read() if (chosen.get(name) or split_of(name)) == split
  )


def _parts(text: str) -> dict[str, str]:
  ends = [int(len(text) * 0.9), int(len(text) * 0.95)]
  lines = [text.rfind("\n", 0, end) + 1 for end in ends]
  first, second = lines if 0 < lines[0] < lines[1] else ends
  return dict(zip(SPLITS, (text[:first], text[first:second], text[second:]), strict=True))
