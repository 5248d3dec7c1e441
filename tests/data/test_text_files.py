"""The user's own files: how they are split, what is read of them, and what is refused."""

import collections
import dataclasses
import json
import os
import pathlib

import numpy as np
import pytest

from moe_jax.data import text_files
from moe_jax.data.text_files import split_of
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
def lines(text):
  """A JSONL file of 200 documents under `body`, with empty lines and an empty document."""
  text.text_field = "body"
  file = pathlib.Path(text.path) / "a.jsonl"
  written = [json.dumps({"body": f"line {i} é", "id": i}) for i in range(200)]
  file.write_text("\n\n".join(written) + "\n" + json.dumps({"body": ""}))
  return file


def test_each_line_of_jsonl_is_a_document_in_the_split_of_its_hash(text, lines):
  rows = load(text)
  found = [everything(rows[split]) for split in SPLITS]
  assert sorted(joined(found)) == sorted(f"line {i} é".encode() for i in range(200))
  expected = [split_of(f"a.jsonl:{2 * i + 1}") for i in range(200)]
  assert [len(f) for f in found] == [expected.count(split) for split in SPLITS]


def test_an_edit_that_keeps_the_size_is_seen(text, lines):
  load(text)
  old = lines.stat()
  lines.write_text(lines.read_text().replace("line 7 ", "LINE 7 "))
  os.utime(lines, ns=(old.st_atime_ns, old.st_mtime_ns + 1))
  again = load(text)
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
   ["config.data.text_field='text'", "a.jsonl:2", "its text fields: body"]),
  ({"a.jsonl": b'{"text": "x"}\n\n{"text": '}, ["a.jsonl:3", "not JSON"]),
  ({"a.jsonl": b"[1]"}, ["config.data.text_field='text'", "a.jsonl:1"]),
  ({"a.jsonl": b'{"text": "\xff"}'}, ["a.jsonl:1", "not UTF-8"]),
])  # fmt: skip
def test_files_that_hold_no_text_are_refused(files, parts, text):
  for name, content in files.items():
    (pathlib.Path(text.path) / name).write_bytes(content)
  message = error_of(text)
  assert all(part in message for part in parts), message
