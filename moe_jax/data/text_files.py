"""Reads documents from files on this machine: the standard library, or the user's own text.

A hash of a document's name puts it in a split, 90/5/5, so it stays there when other documents are
added or removed. Files of tables and compressed files may name a split instead.
"""

import collections
import glob
import gzip
import hashlib
import io
import itertools
import json
import os
import pathlib
import re
import stat
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple

from moe_jax.config import Data
from moe_jax.data import tables
from moe_jax.errors import UserError, few, short

SPLITS = ("train", "validation", "test")
_MOST_DOMAINS = 32  # with more folders than this, folders are no kinds of text
_UNPRINTED = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # controls; bytes that are no UTF-8
_LARGEST = 2**30  # the most bytes of one document, which is read whole
_MARKUP = (".json", ".csv", ".tsv")
_COMPRESSED = (".gz", ".zst")
# In the name of a file on a hub: "data/train-00000-of-00002.parquet".
_NAMED = re.compile(r"(?<![a-z])(train|validation|valid|val|dev|test)(?![a-z])")
_LARGEST_NAMED = 2**26  # of a text that a flag names

Document = tuple[str, str]  # name, text


def hash_of(name: str) -> float:
  """Hashes a name to a number that is uniform in [0, 1)."""
  return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48


def split_of(name: str) -> str:
  """Returns the split of a document: train, validation or test."""
  place = hash_of(name)
  return "train" if place < 0.9 else "validation" if place < 0.95 else "test"


def list_files(
  root: pathlib.Path,
  skip: frozenset[str] = frozenset(),
  fail: Callable[[OSError], None] | None = None,
) -> tuple[list[str], list[str]]:
  """Returns the sorted paths of files below `root`, and those of what is not looked into.

  That are hidden names, folders in `skip`, and links to folders. `fail` is called with the error of
  a folder that cannot be read, which is otherwise left out.
  """
  found: tuple[list[str], list[str]] = [], []
  for folder, folders, files in os.walk(root, onerror=fail):
    closed = {n for n in folders if n in skip or os.path.islink(os.path.join(folder, n))}
    closed |= {name for name in folders + files if name.startswith(".")}
    folders[:] = [name for name in folders if name not in closed]
    for name in {*files, *closed}:
      found[name in closed].append(os.path.relpath(os.path.join(folder, name), root))
  return sorted(found[0]), sorted(found[1])


def stdlib() -> tuple[pathlib.Path, list[str]]:
  """Returns the standard library's folder and the names of its .py files.

  Its tests are included if they are installed. Some packagers (Debian, slim images) leave them out;
  then the text has a third of the size and is harder to compress.
  """
  root = pathlib.Path(sysconfig.get_path("stdlib"))
  skip = frozenset(["site-packages", "dist-packages", "__pycache__"])
  names = [name for name in list_files(root, skip)[0] if name.endswith(".py")]
  return root, [name for name in names if (root / name).is_file()]


def stdlib_documents(root: pathlib.Path, names: Iterable[str]) -> Iterator[Document]:
  """Yields the files of these names; leaves out empty files and files that are not UTF-8."""
  for name in names:
    try:
      text = (root / name).read_bytes().decode()
    except (OSError, UnicodeDecodeError):
      continue
    if text:
      yield name, text


class UserFiles(NamedTuple):
  """The user's files as they were when they were listed."""

  root: pathlib.Path
  seen: dict[str, tuple[int, int]]  # {name: size and time of change}, sorted by name
  unread: list[str]  # hidden names, links to folders, and what stands beside tables


def named_splits(files: UserFiles) -> dict[str, str]:
  """Returns {file: the split that its name says}, of tables and compressed files.

  A folder's whole name says it before a word of the file's own. {} where none says train; the names
  of other files say nothing.
  """
  splits = {}
  for name in files.seen:
    *folders, own = name.lower().split("/")
    words = [folder for folder in folders if _NAMED.fullmatch(folder)] or _NAMED.findall(own)
    if words and own.endswith((*tables.SUFFIXES, *_COMPRESSED)):
      splits[name] = words[0] if words[0] in SPLITS else "validation"
  return splits if "train" in splits.values() else {}


def split_in(splits: dict[str, str], taken: frozenset[str], document: str) -> str:
  """Returns the split of a document: as its file says, or by its hash where no file says which.

  `taken` are the splits that files name.
  """
  named = splits.get(document, splits.get(document.rpartition(":")[0], "train"))
  hashed = split_of(document)
  return hashed if named == "train" and hashed not in taken else named


def user_files(config: Data) -> UserFiles:
  """Returns the files in the folder config.path, or those of a pattern ("*.parquet"), or the one.

  Beside tables nothing else is read.

  Raises:
    UserError: config.path is empty, does not exist, or is a folder without files; or what is in it
      cannot be read as a file.
  """
  path = pathlib.Path(config.path).expanduser().absolute()
  if not config.path:
    raise UserError(
      "config.data.name='text' needs config.data.path: a file of text, JSON lines or a table, a "
      "folder of them, or a pattern"
    )

  def fail(error: OSError) -> None:
    raise _unread(config, error.filename, error) from None

  unread: list[str] = []
  if os.path.isdir(path):
    names, unread = list_files(path, fail=fail)
    if not names:
      raise UserError(f"config.data.path={config.path!r}: no files in this folder")
  elif os.path.lexists(path):
    path, names = path.parent, [path.name]
  else:
    found = sorted(f for f in glob.glob(str(path), recursive=True) if not os.path.isdir(f))
    if not found:
      raise UserError(f"config.data.path={config.path!r}: no such file or folder")
    path = pathlib.Path(os.path.commonpath([os.path.dirname(f) for f in found]))
    names = [os.path.relpath(f, path) for f in found]
  if any(map(tables.is_table, names)):  # a hub puts a README and lists of its own beside them
    unread += [name for name in names if not tables.is_table(name)]
    names = [name for name in names if tables.is_table(name)]
  return UserFiles(path, {name: _look(config, path / name) for name in names}, unread)


def describe_files(config: Data, files: UserFiles) -> tuple[str, ...]:
  """Returns lines that say of which endings files are read, "12 .py, 3 .md", and what is not."""
  endings = collections.Counter(pathlib.PurePath(name).suffix or "others" for name in files.seen)
  kinds = ", ".join(f"{count:,} {ending}" for ending, count in endings.most_common())
  read = f"reading all files of {config.path}: {kinds}"
  unread = f"not read, as hidden, links to folders, or beside tables: {few(files.unread)}"
  splits = sorted(collections.Counter(named_splits(files).values()).items())
  named = ", ".join(f"{split} {count:,}" for split, count in splits)
  by_name = f"the files' names say the split: {named}; what they do not say is split by hash"
  return (read, *[unread] * bool(files.unread), *[by_name] * bool(splits))


def _look(config: Data, path: pathlib.Path) -> tuple[int, int]:
  """Returns the size and the time of change of a regular file."""
  if _UNPRINTED.search(str(path)):
    raise _refusal(config, path, "has a name that is not UTF-8 or does not print", "rename it")
  try:
    about = path.stat()
  except OSError as error:
    raise _unread(config, path, error) from None
  if not stat.S_ISREG(about.st_mode):
    raise _refusal(config, path, "is no regular file but a pipe, socket or device", "remove it")
  return about.st_size, about.st_mtime_ns


def _refusal(config: Data, path: object, why: str, remedy: str = "mend or remove it") -> UserError:
  shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(path))
  return UserError(f"config.data.path={config.path!r}: {shown} {why}; {remedy}")


def _unread(config: Data, path: object, error: Exception) -> UserError:
  why = getattr(error, "strerror", "") or short(error)
  return _refusal(config, path, f"cannot be read ({why})")


def first_folders(names: Iterable[str]) -> tuple[str, ...]:
  """Returns the folders directly below the user's folder, which label the documents in them.

  Returns () if there are fewer than 2 or more than 32.
  """
  folders = sorted({name.split("/")[0] for name in names if "/" in name})
  return tuple(folders) if 2 <= len(folders) <= _MOST_DOMAINS else ()


def user_documents(
  config: Data, files: UserFiles, keep: Callable[[str], bool] = lambda name: True
) -> Iterator[Document]:
  """Yields the documents in the user's files; the text of some may be nothing but white space.

  Each line of a file of JSON lines, by its name or its first two lines, is a document, whose text
  is in the field config.column; so is each row of a table; any other file is one document. Of
  tables only the texts are read whose names `keep` accepts.

  Raises:
    UserError: a file cannot be read, is too large or not UTF-8, or has changed since it was listed;
      a line has no such text; or there is nothing but tables and other JSON.
  """
  markup = all(name.lower().endswith(_MARKUP) for name in files.seen)  # and no text beside it
  for name in files.seen:
    path = files.root / name
    _look(config, path)  # a pipe that has taken the file's place would wait for a writer
    try:
      with _opened(path) as file:
        if tables.is_table(name):
          yield from _rows(config, path, name, keep)
        elif _holds_lines(name, path):
          yield from _lines(config, path, name, file)
        elif markup:
          why = "is a table, or JSON without an object on each line"
          raise _refusal(config, path, why, "write its text to a .txt or a .jsonl file")
        else:
          yield name, _decode_text(config, file.read(_LARGEST + 1), path)
    except (OSError, EOFError, zlib.error) as error:  # the latter two of what is compressed
      raise _unread(config, path, error) from None
    if _look(config, path) != files.seen[name]:
      raise _refusal(config, path, "has changed while it was read", "start again when it is whole")


def _opened(path: pathlib.Path) -> Any:
  """Opens a file to read its bytes, decompressed where its name says that they are compressed."""
  if path.suffix.lower() == ".gz":
    return gzip.open(path)
  if path.suffix.lower() == ".zst":
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
  return open(path, "rb")


def document_names(config: Data, files: UserFiles) -> Iterator[str]:
  """Yields the names of the documents in tables, of whose texts nothing is read."""
  for name in files.seen:
    path = files.root / name
    try:
      count = tables.num_rows(path, config.column)
    except OSError as error:
      raise _unread(config, path, error) from None
    yield from (f"{name}:{row}" for row in range(count))


def _rows(
  config: Data, path: pathlib.Path, name: str, keep: Callable[[str], bool]
) -> Iterator[Document]:
  for row, text in tables.texts(path, config.column, lambda row: keep(f"{name}:{row}")):
    if isinstance(text, bytes):
      text = _decode_text(config, text, f"{path}, row {row},")
    yield f"{name}:{row}", text


def _holds_lines(name: str, path: pathlib.Path) -> bool:
  """Returns whether a file has a document on each line."""
  with _opened(path) as file:
    lines = iter(lambda: file.readline(_LARGEST_NAMED), b"")
    first = list(itertools.islice(filter(bytes.strip, lines), 2))
  name = name.lower().removesuffix(".gz").removesuffix(".zst")
  if name.endswith((".jsonl", ".ndjson")):
    return bool(first)  # an empty one is a document without text
  try:
    return len(first) == 2 and all(isinstance(json.loads(line), dict) for line in first)
  except (ValueError, RecursionError):
    return False


def _lines(config: Data, path: pathlib.Path, name: str, file: BinaryIO) -> Iterator[Document]:
  field = config.column
  lines = iter(lambda: file.readline(_LARGEST + 1), b"")
  for number, line in enumerate(lines, 1):
    where = f"{path}:{number}"
    text = _decode_text(config, line, where)
    if number == 1:
      text = text.removeprefix("\ufeff")  # a byte order mark
    if not text.strip():
      continue
    try:
      example = json.loads(text)
    except (ValueError, RecursionError) as error:  # a number may have too many digits
      raise _refusal(config, where, f"is not JSON: {error}") from None
    fields = example if isinstance(example, dict) else {}
    document = fields.get(field)
    if not isinstance(document, str):
      texts = [key for key, value in fields.items() if isinstance(value, str)]
      names = ", ".join(key if key.isprintable() else ascii(key) for key in texts[:9])
      raise UserError(
        f"config.data.column={field!r}: {where} has no such text; its text fields: "
        f"{names or 'none'}"
      )
    # JSON may contain half of a surrogate pair, which UTF-8 cannot encode.
    yield f"{name}:{number}", document.encode(errors="replace").decode()


def _decode_text(config: Data, data: bytes, where: object) -> str:
  if len(data) > _LARGEST:
    remedy = "cut it into several files, or into lines of a .jsonl file"
    raise _refusal(config, where, "is over 1 GiB", remedy)
  text = decode(data)
  if text is None:
    raise _refusal(config, where, "is not UTF-8 text", "convert it or remove it")
  return text


def decode(data: bytes) -> str | None:
  """Returns the text of these bytes, each of them kept; None where they are no UTF-8 text."""
  try:
    return None if b"\0" in data else data.decode()
  except UnicodeDecodeError:
    return None


def lines(text: str) -> list[str]:
  """Returns the lines of a text: they end with LF or CR LF, and not with U+2028 or a form feed."""
  return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]


def read_text(flag: str, name: str) -> str:
  """Returns the text of a file that a flag names, as its bytes have it; of stdin for "-".

  Raises:
    UserError: it cannot be read, is too large, or is not UTF-8 text.
  """
  try:
    with open(0 if name == "-" else name, "rb", closefd=name != "-") as file:
      data = file.read(_LARGEST_NAMED + 1)  # a pipe may have no end
  except OSError as error:
    raise UserError(f"{flag}={name}: {error.strerror}") from None
  if len(data) > _LARGEST_NAMED:
    raise UserError(f"{flag}={name}: over {_LARGEST_NAMED:,} bytes; give a shorter text")
  text = decode(data)
  if text is None:
    raise UserError(f"{flag}={name}: this is not UTF-8 text; convert it")
  return text
