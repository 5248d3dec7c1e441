"""Labelled domains: code, prose and bytecode of Python's sources; folders of the user's files."""

import collections
import dataclasses
import itertools
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
  assert domains.topics('"""doc"""\ntopics = {"if": "The if" " statement"}') == {
    "if": "The if statement"
  }


def test_pages():
  lines = [f"{i:03} " + "x" * 95 + "\n" for i in range(100)]
  made = list(domains.pages("".join(lines), 4_200))
  assert "".join(made) == "".join(lines)[:4_200] and [len(p) for p in made] == [2000, 2000, 200]
  assert list(domains.pages("y" * 5000 + "\n \n", 9_000)) == ["y" * 5000 + "\n", " \n"][:1]


def test_bytecode_does_not_depend_on_the_process():
  """No addresses, and a frozenset, whose order does depend on it, sorted."""
  source = """def f(x):
  'doc'
  if x in {'e', 'a', 'd', 'b', 'c'}: return lambda: x
class C: y = 1
"""
  shown = domains.listing(compile(source, "s", "exec", optimize=2), 10_000)
  for part in ("<module>:\n", "\nf:\n", "f.<locals>.<lambda>:\n", "\nC:\n", "<code f>",
               "LOAD_CONST {'a', 'b', 'c', 'd', 'e'}\n", "CONTAINS_OP"):  # fmt: skip
    assert part in shown
  assert " at 0x" not in shown and "doc" not in shown
  assert domains.listing(compile(source, "s", "exec", optimize=2), 1).count(":\n") == 1


def test_python_domains_share_the_split_of_their_file():
  root, names = domains.sources()
  made = dict(domains.documents(root, names, "validation"))
  kinds = collections.defaultdict(set)
  for label in made:
    kind, path = label.split("/", 1)
    file, _, _ = path.rpartition(":")
    kinds[file].add(kind)
    assert split_of(file) == "validation"
  files = {file: found for file, found in kinds.items() if "topics.py:" not in file}
  whole = [file for file, found in files.items() if found == set(domains.DOMAINS)]
  assert len(whole) > 0.8 * len(files) > 15
  assert all(found == {"prose"} for file, found in kinds.items() if "topics.py:" in file)
  assert not any({"test", "tests", "encodings"} & set(file.split("/")) for file in files)
  train = itertools.islice(domains.documents(root, names, "train"), 500)
  assert not {label.split("/", 1)[1].rpartition(":")[0] for label, _ in train} & set(kinds)


@pytest.mark.slow
def test_python_domains_are_of_like_size(tmp_path, capfd):
  start = time.monotonic()
  rows = load(Data(name="python_domains", cache_dir=str(tmp_path)))
  assert time.monotonic() - start < 60
  assert len(capfd.readouterr().err.splitlines()) == 4  # one line prepared, three tokenized
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
  written = {"news/a.txt": "aaaa", "news/more/b.txt": "bb", "web/c.jsonl": '{"text": "c"}\n' * 40,
             "d.txt": "ddd"}  # fmt: skip
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


def test_one_folder_or_none_is_no_domain(text, stdlib):
  root = pathlib.Path(text.path)
  (root / "only").mkdir()
  for i in range(4):
    (root / "only" / f"{i}.txt").write_text(f"{i}")
  rows = pipeline.load_rows(text, "train")
  assert rows.domains == () and rows.starts_M is None
  assert (rows.domains_BL([0]) == -1).all()
  assert pipeline.load_rows(stdlib, "validation").domains == ()
  assert text_files.first_folders([f"{i}/a" for i in range(40)]) == ()  # too many to compare
