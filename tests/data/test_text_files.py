"""The user's own files: how they are split, what is read of them, and what is refused."""

import collections
import dataclasses
import json
import os
import pathlib
import socket
import tempfile

import numpy as np
import pytest

from moe_jax.config import Data
from moe_jax.data import text_files
from moe_jax.data.text_files import split_of
from moe_jax.errors import UserError
from tests.support.texts import PROSE, SPLITS, error_of, everything, joined, load


def test_the_split_of_a_name_is_fixed():
  # `printf abc.py | sha256sum` begins with c4e9f202e25a. Another hash would move documents
  # between the splits of published runs.
  assert text_files.hash_of("abc.py") == pytest.approx(0xC4E9F202E25A / 2**48)
  counts = collections.Counter(split_of(f"{i}.py") for i in range(10_000))
  assert abs(counts["train"] - 9000) < 100  # 3 sigma is 90
  assert abs(counts["validation"] - 500) < 70 and abs(counts["test"] - 500) < 70


def test_one_text_file_is_cut_by_length_at_ends_of_lines(text):
  file = pathlib.Path(text.path) / "book.txt"
  file.write_text(PROSE)
  rows = load(dataclasses.replace(text, path=str(file)))
  parts = [everything(rows[split]) for split in SPLITS]
  assert b"".join(joined(parts)) == PROSE.encode()
  assert all(len(part) == 1 and part[0].endswith(b"\n") for part in parts)
  sizes = [len(part[0]) / len(PROSE.encode()) for part in parts]
  np.testing.assert_allclose(sizes, [0.9, 0.05, 0.05], atol=0.01)  # a line is 0.3%


def test_folder_of_few_files_fills_every_split(text):
  names = [name for name in map("part/{}.txt".format, range(9)) if split_of(name) == "train"][:5]
  written = {name: f"document {name}\n" * 9 for name in names} | {"empty.txt": ""}
  for name, content in written.items():
    path = pathlib.Path(text.path) / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
  rows = load(text)
  assert [rows[split].num_documents for split in SPLITS] == [3, 1, 1]
  found = joined(everything(rows[split]) for split in SPLITS)
  assert sorted(found) == sorted(c.encode() for c in written.values() if c)


@pytest.fixture
def bodies(text):
  """A config for documents under `body`."""
  return dataclasses.replace(text, column="body")


@pytest.fixture
def lines(text):
  """A JSONL file of 200 documents under `body`, with empty lines and an empty document."""
  file = pathlib.Path(text.path) / "a.jsonl"
  written = [json.dumps({"body": f"line {i} é", "id": i}) for i in range(200)]
  file.write_text("\n\n".join(written) + "\n" + json.dumps({"body": ""}))
  return file


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.JSONL", "a.json", "a"])
def test_each_line_of_json_is_a_document_in_the_split_of_its_hash(name, bodies, lines):
  lines.rename(lines.with_name(name))
  rows = load(bodies)
  found = [everything(rows[split]) for split in SPLITS]
  assert sorted(joined(found)) == sorted(f"line {i} é".encode() for i in range(200))
  expected = [split_of(f"{name}:{2 * i + 1}") for i in range(200)]
  assert [len(f) for f in found] == [expected.count(split) for split in SPLITS]


def test_an_edit_that_keeps_the_size_is_seen(bodies, lines):
  load(bodies)
  old = lines.stat()
  lines.write_text(lines.read_text().replace("line 7 ", "LINE 7 "))
  os.utime(lines, ns=(old.st_atime_ns, old.st_mtime_ns + 1))
  again = load(bodies)
  assert b"LINE 7 \xc3\xa9" in joined(everything(again[split]) for split in SPLITS)


@pytest.mark.parametrize(
  ("path", "why"), [("none", "no such file"), ("", "needs config.data.path")]
)
def test_a_path_that_is_missing_is_refused(path, why, text, tmp_path):
  path = str(tmp_path / path) if path else ""
  assert why in error_of(dataclasses.replace(text, path=path))


@pytest.mark.parametrize("files, parts", [
  ({}, ["config.data.path", "no files"]),
  ({"a.txt": b"good", "b.bin": b"\x80\x81"}, ["config.data.path", "b.bin", "not UTF-8"]),
  ({"a.txt": b"a\0b"}, ["a.txt", "not UTF-8"]),
  ({"a.txt": b"short"}, ["config.data.path", "a.txt is too short"]),
  ({"a.txt": b" \n"}, ["config.data.path", "no text"]),
  ({"a.jsonl": b'{"text": "x"}\n{"body": "y", "id": 3}'},
   ["config.data.column='text'", "a.jsonl:2", "its text fields: body"]),
  ({"a.jsonl": b'{"text": "x"}\n\n{"text": '}, ["a.jsonl:3", "not JSON"]),
  ({"a.jsonl": b"[1]"}, ["config.data.column='text'", "a.jsonl:1"]),
  ({"a.jsonl": b'{"text": "\xff"}'}, ["a.jsonl:1", "not UTF-8"]),
  ({"a.jsonl": b"[" * 100_000}, ["a.jsonl:1", "not JSON", "mend or remove"]),
  ({"a.jsonl": b'{"text": "x", "n": ' + b"1" * 10_000 + b"}"}, ["a.jsonl:1", "not JSON"]),
  ({"a.jsonl": b'{"a\\u001b[31m\\nb": "x"}'}, ["a.jsonl:1", r"fields: 'a\x1b[31m\nb'"]),
  ({"a.json": b'[{"text": "x"}]\n'}, ["a.json is a table, or JSON without", "a .jsonl file"]),
  ({"a.csv": b"text,id\nx,1\n", "b.json": b"{}"}, ["a.csv is a table, or JSON without"]),
  ({"a.txt": b'{"body": "x"}\n{"body": "y"}\n'}, ["config.data.column='text'", "a.txt:1"]),
  ({"a.txt": "text".encode("utf-16")}, ["a.txt", "not UTF-8"]),
  ({"a\nb.txt": b"text"}, [r"a\nb.txt", "does not print", "rename it"]),
  ({os.fsdecode(b"\xff.txt"): b"text"}, [r"\udcff.txt", "not UTF-8", "rename it"]),
])  # fmt: skip
def test_files_that_hold_no_text_are_refused(files, parts, text):
  for name, content in files.items():
    (pathlib.Path(text.path) / name).write_bytes(content)
  message = error_of(text)
  assert all(part in message for part in parts), message


def fifo(path):
  os.mkfifo(path)


def socket_file(path):
  with socket.socket(socket.AF_UNIX) as made:
    made.bind(str(path))


def link_to(target):
  return lambda path: path.symlink_to(target)


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl"])
@pytest.mark.parametrize(("make", "why"), [
  (fifo, "no regular file"), (link_to("/dev/zero"), "no regular file"),
  (link_to("x.txt"), "cannot be read"), (link_to("nowhere"), "cannot be read"),
  (socket_file, "no regular file"),
], ids=["pipe", "device", "loop", "dangling", "socket"])  # fmt: skip
def test_what_is_no_file_is_refused_at_once(make, why, name, text, tmp_path, monkeypatch):
  """A pipe would wait for a writer for ever, and /dev/zero would fill the memory."""
  monkeypatch.chdir(text.path)  # the path of a socket may not be long
  pathlib.Path("good.txt").write_text(PROSE)
  make(pathlib.Path(name))
  for path in (text.path, str(pathlib.Path(text.path) / name)):
    message = error_of(dataclasses.replace(text, path=path), seconds=100)
    assert f"{text.path}/{name} " in message and why in message and "remove it" in message


def test_a_pipe_that_takes_a_files_place_is_refused(text):
  (pathlib.Path(text.path) / "a.txt").write_text(PROSE)
  files = text_files.user_files(text)
  (pathlib.Path(text.path) / "a.txt").unlink()
  os.mkfifo(pathlib.Path(text.path) / "a.txt")
  with pytest.raises(UserError, match=r"a.txt is no regular file"):
    list(text_files.user_documents(text, files))


def grow(path):
  with open(path, "a") as file:
    file.write('{"text": "more"}\n')


@pytest.mark.parametrize(
  ("change", "why"),
  [(grow, "has changed while it was read"), (os.remove, "cannot be read (No such file")],
)
@pytest.mark.parametrize("name", ["b.txt", "b.jsonl"])
def test_a_file_that_changes_while_it_is_read_is_refused(change, why, name, text):
  """Every read looks again, since the documents are read once to check them and once to store."""
  for n in range(9):
    (pathlib.Path(text.path) / f"a{n}.txt").write_text(PROSE)
  path = pathlib.Path(text.path) / name
  path.write_text('{"text": "x"}\n' * 5)
  config = dataclasses.replace(text)
  files = text_files.user_files(config)
  assert list(text_files.user_documents(config, files))
  change(path)
  with pytest.raises(UserError) as caught:
    list(text_files.user_documents(config, files))
  assert f"{path} {why}" in str(caught.value)


def test_a_file_that_grows_under_the_reader_is_refused(text):
  path = pathlib.Path(text.path) / "a.jsonl"
  path.write_text('{"text": "x"}\n' * 5)
  documents = text_files.user_documents(text, text_files.user_files(text))
  next(documents)
  grow(path)
  with pytest.raises(UserError, match="has changed while it was read"):
    list(documents)


def test_documents_without_text_are_named(text, capfd):
  """Of blanks alone, too, in a line as in a file; and a file of lines without any."""
  root = pathlib.Path(text.path)
  (root / "a.jsonl").write_text('{"text": "x"}\n\n{"text": " \\n\\t"}\n{"text": "y"}\n{"text": ""}')
  (root / "b.txt").write_text("z")
  (root / "c.txt").write_text(" \n\t")
  (root / "d.jsonl").write_text("")
  (root / "e.jsonl").write_text("\n\n")
  rows = load(text)
  assert sorted(joined(map(everything, rows.values()))) == [b"x", b"y", b"z"]
  said = capfd.readouterr().err
  without = "without text: a.jsonl:3, a.jsonl:5, c.txt and 2 more"
  assert f"left out 5 documents of {text.path} {without}\n" in said


def test_carriage_returns_byte_order_marks_and_nul_characters(text):
  root = pathlib.Path(text.path)
  (root / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one\\r\\n"}\r\n{"text": "a\\u0000b"}\r\n')
  (root / "b.txt").write_bytes(b"two\r\n")
  found = joined(map(everything, load(text).values()))
  assert sorted(found) == [b"a\0b", b"one\r\n", b"two\r\n"]


def test_what_is_read_of_a_folder_is_said_and_what_is_not(text, capfd):
  """Of every file that is not hidden all bytes; folders behind links are not looked into."""
  root = pathlib.Path(text.path)
  (root / "sub/.git").mkdir(parents=True)
  (root / "sub" / "back").symlink_to(root)
  written = {"a.txt": "a", "b.md": "# b\n", "sub/c.json": '["c"]', "d.csv": "d,e\n", "f": "f"}
  for name, content in (written | {"sub/.git/g": "g", ".h\a": "h"}).items():
    (root / name).write_text(content)
  rows = load(text).values()
  assert sorted(joined(map(everything, rows))) == sorted(c.encode() for c in written.values())
  said = capfd.readouterr().err
  assert f"reading all files of {text.path}: 1 .txt, 1 .md, 1 .csv, 1 others, 1 .json\n" in said
  assert (
    "not read, as hidden, links to folders, or beside tables: .h\\x07, sub/.git, sub/back\n" in said
  )
  load(text)
  assert not capfd.readouterr().err


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_folder_that_cannot_be_read_is_refused():
  with tempfile.TemporaryDirectory() as folder:
    os.chmod(folder, 0o755)
    (pathlib.Path(folder) / "a.txt").write_text("text")
    (pathlib.Path(folder) / "closed").mkdir(mode=0o700)
    os.seteuid(65534)  # a user who is not root
    try:
      with pytest.raises(UserError, match=r"closed cannot be read \(Permission denied\)"):
        text_files.user_files(Data(name="text", path=folder))
    finally:
      os.seteuid(0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["x.txt", "x.jsonl"])
def test_a_document_over_a_gibibyte_is_refused(name, text):
  path = pathlib.Path(text.path) / name
  path.touch()
  os.truncate(path, 2**30 + 1)  # it takes no place on the disk
  message = error_of(text, seconds=100)
  assert "is over 1 GiB" in message and "cut it" in message


def test_a_named_text_is_what_its_bytes_are(tmp_path):
  text = "a\r\nb\x85\u2028c\x0cd\n\ne\n"
  (tmp_path / "text").write_bytes(text.encode())
  assert text_files.read_text("--text", str(tmp_path / "text")) == text
  assert text_files.lines(text) == ["a", "b\x85\u2028c\x0cd", "", "e"]
  for wrong in (b"a\xff", b"a\0"):
    (tmp_path / "text").write_bytes(wrong)
    with pytest.raises(UserError, match=r"--text=.*text: this is not UTF-8 text; convert it"):
      text_files.read_text("--text", str(tmp_path / "text"))
