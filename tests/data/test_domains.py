"""Labelled domains: code, prose and bytecode of Python's sources; folders of the user's files."""

import collections
import dataclasses
import pathlib
import time

import numpy as np
import pytest

from moe_jax.config import Data
from moe_jax.data import domains, pipeline, text_files
from moe_jax.data.text_files import split_of
from tests.support.texts import S, load

SOURCE = '''#!/usr/bin/env python
"""Module doc:
  indented."""
import os  # the system

# A first line,
# and a second.
def f(x):
  r"""One \\d line."""
  text = "# not a comment"
  b"bytes"
  return [text,
    "in a list"]  # why


class C:
  "doc of C"
# --- 1 ---
'''
CODE = """import os

def f(x):
  text = "# not a comment"
  b"bytes"
  return [text,
    "in a list"]


class C:
"""
SAID = r"""!/usr/bin/env python

Module doc:
indented.

the system

A first line,
and a second.

One \d line.

why

doc of C
"""


def test_code_and_prose_of_a_source():
  assert domains.separate(SOURCE) == (CODE, SAID)
  topics = '"""doc"""\ntopics = {"if": "The if" " statement"}'
  assert domains.topics(topics) == {"if": "The if statement"}


def test_pages_hold_whole_lines_up_to_2000_characters():
  lines = [f"{i:03} " + "x" * 95 + "\n" for i in range(100)]
  pages = list(domains.pages("".join(lines), 4_200))
  assert "".join(pages) == "".join(lines)[:4_200]
  assert [len(page) for page in pages] == [2000, 2000, 200]
  # A longer line is a page, and an empty page is left out.
  assert list(domains.pages("y" * 5000 + "\n \n", 9_000)) == ["y" * 5000 + "\n"]


BYTECODE = """def f(x):
  'doc'
  if x in {'e', 'a', 'd', 'b', 'c'}: return lambda: x
class C: y = 1
"""


def test_a_listing_shows_code_without_addresses_and_docstrings():
  compiled = compile(BYTECODE, "s", "exec", optimize=2)
  listing = domains.listing(compiled, 10_000)
  for part in (
    "<module>:\n",
    "\nf:\n",
    "f.<locals>.<lambda>:\n",
    "\nC:\n",
    "<code f>",
    "CONTAINS_OP",
    "LOAD_CONST {'a', 'b', 'c', 'd', 'e'}\n",  # sorted: its order depends on the process
  ):
    assert part in listing
  assert " at 0x" not in listing and "doc" not in listing
  assert domains.listing(compiled, 1).count(":\n") == 1  # it stops after the first function


def test_documents_of_most_files_have_all_domains_and_one_split():
  root, names = domains.sources()
  kinds = collections.defaultdict(set)  # domains of each file in the validation split
  some = tuple(n for n in names if split_of(n) == "validation" or n.endswith("topics.py"))
  for label, _ in domains.documents(root, some):
    kind, path = label.split("/", 1)
    if domains.split_of(label) == "validation":
      kinds[path.rpartition(":")[0]].add(kind)
  assert {split_of(file) for file in kinds} == {"validation"}
  files = {file: found for file, found in kinds.items() if "topics.py:" not in file}
  assert all(found == {"prose"} for file, found in kinds.items() if file not in files)  # of help
  whole = [file for file, found in files.items() if found == set(domains.DOMAINS)]
  assert len(whole) > 0.8 * len(files) > 15
  for file in kinds:  # tests and tables of encodings are left out
    assert not {"test", "tests", "encodings"} & set(file.split("/"))


@pytest.mark.slow
def test_python_domains_are_of_like_size(own_cache, capfd):
  start = time.monotonic()
  rows = load(Data(name="python_domains"))
  assert time.monotonic() - start < 300
  assert capfd.readouterr().err.count("tokenized python_domains ") == 3
  sizes = np.zeros(3, int)
  for split in rows.values():
    assert split.domains == ("code", "prose", "bytecode")
    domain_BL = split.domains_BL(range(len(split)))
    sizes += np.bincount(domain_BL[domain_BL >= 0], minlength=3)
    assert np.bincount(domain_BL[domain_BL >= 0], minlength=3).min() > 50_000
    assert isinstance(split.starts_M, np.memmap) and split.starts_M.flags.c_contiguous
  assert sizes.sum() > 8_000_000 and sizes.max() < 2 * sizes.min()


def test_folders_are_domains(text, tmp_path):
  """By hand: where each document stands in the stream, and whose it is."""
  root = pathlib.Path(text.path)
  written = {
    "news/a.txt": "aaaa",
    "news/more/b.txt": "bb",
    "web/c.jsonl": '{"text": "c"}\n' * 40,
    "d.txt": "ddd",
  }
  for name, content in written.items():
    (root / name).parent.mkdir(exist_ok=True, parents=True)
    (root / name).write_text(content)
  seen = collections.Counter()
  for rows in load(dataclasses.replace(text, seq_len=3)).values():
    assert rows.domains == ("news", "web")
    domain_N = rows.domains_BL(range(len(rows))).ravel()
    tokens_N = rows.batch(range(len(rows))).tokens_BL.ravel()
    whose = {97: 0, 98: 0, 99: 1, 100: -1}
    document_N = np.cumsum(tokens_N == S)  # each begins with the separator
    for n in range(rows.num_targets):
      letter = max(tokens_N[document_N == document_N[n]] % S)
      assert domain_N[n] == whose[letter], n
      seen[int(domain_N[n])] += 1
    assert (domain_N[rows.num_targets :] == -1).all()
    assert (rows.domains_BL([-1]) == -1).all()
  assert seen == {0: 5 + 3, 1: 2 * 40, -1: 4}


def test_one_folder_is_no_domain(text):
  root = pathlib.Path(text.path)
  (root / "only").mkdir()
  for i in range(4):
    (root / "only" / f"{i}.txt").write_text(f"{i}")
  rows = pipeline.load_rows(text, "train")
  assert rows.domains == () and (rows.domain_M == -1).all()
  assert (rows.domains_BL([0]) == -1).all()


def test_no_labels_and_too_many_folders_to_compare_are_no_domains(stdlib):
  assert pipeline.load_rows(stdlib, "validation").domains == ()
  assert text_files.first_folders([f"{i}/a" for i in range(40)]) == ()
