"""The data package: TFDS builders, tokenizers, packing, order, resuming, and its error messages."""

import collections
import dataclasses
import gzip
import itertools
import json
import os
import pathlib
import subprocess
import sys
import time

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorflow_datasets as tfds

from moe_jax.config import Data, UserError
from moe_jax.data import builders, cache, domains, pipeline, text_files, tokenizers
from moe_jax.data.text_files import split_of
from tests.support.toys import ROOT

S = 256  # the bytes tokenizer's separator
SPLITS = ("train", "validation", "test")
PROSE = "".join(f"Line {i}: the quick brown fox, naïve café, 日本 {i * i}\n" for i in range(300))


@pytest.fixture(scope="session")
def stdlib(tmp_path_factory):
  """python_stdlib, prepared once."""
  return Data(cache_dir=str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def text(tmp_path):
  """A config for the test's own files in tmp_path / "files"."""
  (tmp_path / "files").mkdir()
  return Data(name="text", path=str(tmp_path / "files"), cache_dir=str(tmp_path / "cache"))


def load(config):
  return {split: pipeline.load_rows(config, split) for split in SPLITS}


def documents_of(texts):
  return builders.Documents([{"text": text} for text in texts], "text", "")


def everything(rows):
  return [text for _, text in rows.texts(range(len(rows)))]


def joined(lists):
  return list(itertools.chain.from_iterable(lists))


def numbered_rows(num_rows, seq_len=4):
  """Rows whose first token divided by seq_len is the row's number."""
  stream_N = 1000 + np.arange(num_rows * seq_len + 1)
  about = dict(num_documents=1, num_bytes=1, digest="")
  return rows_of(stream_N, [0], seq_len, about)


def rows_of(stream_N, starts, seq_len, about):
  return pipeline.Rows(
    stream_N=stream_N, seq_len=seq_len, tokenizer=tokenizers.Bytes(), starts_M=np.array(starts),
    domain_M=np.full(len(starts), -1), source_M=np.arange(len(starts)), **about,
  )  # fmt: skip


def numbers(batch):
  return ((batch.tokens_BL[:, 0] - 1000) // batch.tokens_BL.shape[1]).tolist()


def assert_equal(first, second):
  for a, b, name in zip(first, second, pipeline.Batch._fields, strict=True):
    np.testing.assert_array_equal(a, b, err_msg=name)
    assert a.dtype == b.dtype == np.int32, name


# Preparing.


def test_python_stdlib_holds_each_file_in_the_split_of_its_hash(stdlib):
  root, names = text_files.stdlib()
  expected = collections.defaultdict(list)
  for name in names:
    content = (root / name).read_bytes()
    try:
      content.decode()
    except UnicodeDecodeError:
      continue
    if content:
      expected[split_of(name)].append(content)
  for split in SPLITS:
    documents = builders.prepare(stdlib, split)
    found = [documents[i] for i in range(len(documents))]
    assert sorted(found) == sorted(expected[split]), split
  assert len(expected["train"]) > 400
  assert len(expected["validation"]) >= 10 and len(expected["test"]) >= 10
  assert not any("site-packages" in name for name in names)


def test_split_hash_is_fixed():
  # `printf abc.py | sha256sum` begins with c4e9f202e25a. Another hash would move documents
  # between the splits of published runs.
  assert text_files.hash_of("abc.py") == pytest.approx(0xC4E9F202E25A / 2**48)
  counts = collections.Counter(split_of(f"{i}.py") for i in range(10_000))
  assert abs(counts["train"] - 9000) < 100  # 3 sigma is 90
  assert abs(counts["validation"] - 500) < 70 and abs(counts["test"] - 500) < 70


_CHILD = """
import sys
from moe_jax.data import pipeline
from moe_jax.config import Data
rows = pipeline.load_rows(Data(cache_dir=sys.argv[1]), "train")
print(rows.digest, len(rows))
assert "tensorflow" not in sys.modules
"""


def test_two_processes_prepare_at_once_without_tensorflow(stdlib, tmp_path):
  command = [sys.executable, "-W", "error", "-c", _CHILD, str(tmp_path)]
  env = os.environ | {"PYTHONPATH": str(ROOT)}
  children = [
    subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for _ in range(2)
  ]
  results = [child.communicate(timeout=120) for child in children]
  assert [child.returncode for child in children] == [0, 0], results
  rows = pipeline.load_rows(stdlib, "train")
  assert [out for out, _ in results] == [f"{rows.digest} {len(rows)}\n"] * 2
  # The work was done once, and these two lines are all that reached the terminal.
  said = "".join(err for _, err in results).splitlines()
  assert sorted(line.split()[0] for line in said) == ["prepared", "tokenized"]
  assert not list(tmp_path.glob("*/*.partial"))


def test_a_failed_build_leaves_nothing(tmp_path):
  def fail(folder):
    (folder / "half").write_text("x")
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    cache.build_once(tmp_path / "made", fail)
  assert [path.name for path in tmp_path.iterdir()] == ["made.lock"]


def test_sub_splits_of_almost_one_name(text):
  lines = "\n".join(json.dumps({"text": f"{i}"}) for i in range(300))
  (pathlib.Path(text.path) / "a.jsonl").write_text(lines)
  for split, expected in {"train[:1%]": 3, "train[:1]": 1}.items():
    rows = pipeline.load_rows(dataclasses.replace(text, train_split=split), "train")
    assert rows.num_documents == expected


def test_second_load_is_silent_and_the_same(stdlib, capfd):
  first = pipeline.load_rows(stdlib, "validation")
  capfd.readouterr()
  second = pipeline.load_rows(stdlib, "validation")
  assert capfd.readouterr() == ("", "")
  assert first.digest == second.digest


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


def test_jsonl_lines_and_the_key_that_sees_an_edit(text):
  text.text_field = "body"
  file = pathlib.Path(text.path) / "a.jsonl"
  lines = [json.dumps({"body": f"line {i} é", "id": i}) for i in range(200)]
  file.write_text("\n\n".join(lines) + "\n" + json.dumps({"body": ""}))
  rows = load(text)
  found = [everything(rows[split]) for split in SPLITS]
  assert sorted(joined(found)) == sorted(f"line {i} é".encode() for i in range(200))
  expected = [split_of(f"a.jsonl:{2 * i + 1}") for i in range(200)]
  assert [len(f) for f in found] == [expected.count(split) for split in SPLITS]
  old = file.stat()
  file.write_text(file.read_text().replace("line 7 ", "LINE 7 "))  # the same size
  os.utime(file, ns=(old.st_atime_ns, old.st_mtime_ns + 1))
  again = load(text)
  assert b"LINE 7 \xc3\xa9" in joined(everything(again[split]) for split in SPLITS)


# Labelled domains.

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
  assert rows.domains == () and (rows.domain_M == -1).all()
  assert (rows.domains_BL([0]) == -1).all()
  assert pipeline.load_rows(stdlib, "validation").domains == ()
  assert text_files.first_folders([f"{i}/a" for i in range(40)]) == ()  # too many to compare


def test_a_data_set_is_one_record(tmp_path, monkeypatch):
  def documents(split):
    yield from ((f"{word}/{i}", f"{word} {split} {i}") for i in range(3) for word in "ab")

  def read(config):
    return builders.Corpus("counting", lambda: documents, ("a", "b"))

  monkeypatch.setitem(builders.DATASETS, "counting", builders.Dataset(read, "2.1.0", "", "text"))
  rows = load(Data(name="counting", cache_dir=str(tmp_path)))
  for split in SPLITS:
    want = [f"{word} {split} {i}".encode() for i in range(3) for word in "ab"]
    assert sorted(everything(rows[split])) == sorted(want)
    assert rows[split].domains == ("a", "b") and sorted(rows[split].domain_M) == [0] * 3 + [1] * 3
  assert "near: counting" in error_of(Data(name="countin", cache_dir=str(tmp_path)))


def test_the_guide_shows_every_data_set():
  guide = (ROOT / "docs/guide.md").read_text()
  for name, record in builders.DATASETS.items():
    assert f"| `{name}` | {record.about} |" in guide


@pytest.fixture
def catalog(tmp_path, monkeypatch):
  """$TFDS_DATA_DIR with TFDS's own tiny_shakespeare, prepared from a text of ours."""
  cls = tfds.builder_cls("tiny_shakespeare")
  splits = {"train": PROSE, "validation": "To be\n", "test": "or not\n"}
  with monkeypatch.context() as patch, builders._quiet():
    patch.setattr(
      cls, "_split_generators", lambda self, _: {k: self._generate_examples(k, v)
                                                 for k, v in splits.items()}
    )  # fmt: skip
    builder = cls(data_dir=tmp_path / "tfds")
    builder.download_and_prepare(file_format="array_record")
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
  return Data(name="tiny_shakespeare", cache_dir=str(tmp_path / "cache"))


def test_prepared_catalog_set_by_name_and_split(catalog, capfd):
  rows = load(catalog)
  assert [everything(rows[s]) for s in SPLITS] == [[PROSE.encode()], [b"To be\n"], [b"or not\n"]]
  said = capfd.readouterr()
  assert said.out == "" and len(said.err.splitlines()) == 3
  catalog.train_split = "test+validation"
  assert sorted(everything(pipeline.load_rows(catalog, "train"))) == [b"To be\n", b"or not\n"]


# Errors: one line, soon, naming the field and what to do.


def error_of(config, split="train", seconds=20):
  start = time.monotonic()
  with pytest.raises(UserError) as caught:
    pipeline.load_rows(config, split)
  assert time.monotonic() - start < seconds
  message = str(caught.value)
  assert "\n" not in message
  return message


def test_catalog_errors(catalog, monkeypatch, tmp_path):
  catalog.test_split = "tset"
  message = error_of(catalog, "test")
  assert "config.data.test_split='tset'" in message and "train, validation, test" in message
  catalog.test_split = "test[:0%]"
  assert "config.data.test_split='test[:0%]'" in error_of(catalog, "test")
  catalog.text_field = "body"
  message = error_of(catalog)
  assert "config.data.text_field='body'" in message and "has: text" in message
  catalog.text_field = "text"
  info = tmp_path / "tfds/tiny_shakespeare/1.0.0/dataset_info.json"
  info.write_text(info.read_text().replace("array_record", "tfrecord"))
  message = error_of(catalog)
  assert "prepared as tfrecord" in message and "array_record" in message


@pytest.mark.parametrize("name, hint", [
  ("tiny_shakespear", "near: tiny_shakespeare"),
  ("pyton_stdlib", "near: python_stdlib"),
  ("my data", "Parsing"),
  ("lm1b:9.9.9", "1.1.0"),
  ("huggingface:foo", "community"),
])  # fmt: skip
def test_unknown_names(name, hint, tmp_path, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  message = error_of(Data(name=name, cache_dir=str(tmp_path)))
  assert f"config.data.name={name!r}" in message and hint in message


@pytest.mark.parametrize("name", ["tiny_shakespeare", "lm1b", "c4/en", "wikipedia/20230601.en"])
def test_known_name_without_network(name, tmp_path, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  for scheme in ("HTTP_PROXY", "HTTPS_PROXY", "https_proxy", "http_proxy"):
    monkeypatch.setenv(scheme, "http://127.0.0.1:9")  # nobody listens there
  message = error_of(Data(name=name, cache_dir=str(tmp_path)))
  for part in (f"config.data.name={name!r}", "no network", "python_stdlib", str(tmp_path)):
    assert part in message


def test_lookup_that_hangs_counts_as_offline():
  start = time.monotonic()
  assert not builders._online(lambda *_, **__: time.sleep(3), seconds=0.2)
  assert time.monotonic() - start < 2
  assert builders._online(lambda *_, **__: None)


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
def test_text_errors(files, parts, text):
  for name, content in files.items():
    (pathlib.Path(text.path) / name).write_bytes(content)
  message = error_of(text)
  assert all(part in message for part in parts), message


def test_path_and_tokenizer_errors(text, tmp_path):
  assert "no such file" in error_of(dataclasses.replace(text, path=str(tmp_path / "none")))
  assert "needs config.data.path" in error_of(dataclasses.replace(text, path=""))
  (tmp_path / "bad.json").write_text("{}")
  (tmp_path / "bad.model").write_text("x")
  for name, why in [("gpt2", "neither"), ("none.json", "no such file")] + [
    (str(tmp_path / name), "is not a") for name in ("bad.json", "bad.model")
  ]:
    message = error_of(dataclasses.replace(text, tokenizer=name))
    assert f"config.data.tokenizer={name!r}" in message
    assert why in message or "pip install" in message


def test_missing_package_says_what_to_install(tmp_path, monkeypatch):
  (tmp_path / "t.json").write_text("{}")
  monkeypatch.setitem(sys.modules, "tokenizers", None)
  with pytest.raises(UserError, match="pip install tokenizers"):
    tokenizers.load(Data(tokenizer=str(tmp_path / "t.json")))


def test_cache_that_cannot_be_written(tmp_path):
  (tmp_path / "file").write_text("")
  assert "config.data.cache_dir" in error_of(Data(cache_dir=str(tmp_path / "file")))


# Tokenizers.


def train_bpe(path, special=()):
  hf = pytest.importorskip("tokenizers", reason="the tokenizers extra is not installed")
  model = hf.Tokenizer(hf.models.BPE())
  model.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
  model.decoder = hf.decoders.ByteLevel()
  model.enable_truncation(4)  # as some published files do; load must undo it
  alphabet = hf.pre_tokenizers.ByteLevel.alphabet()
  model.train_from_iterator([PROSE], hf.trainers.BpeTrainer(
    vocab_size=400, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
  ))  # fmt: skip
  if "<s>" in special:  # many files add it to each text; the separator stands there already
    model.post_processor = hf.processors.TemplateProcessing(
      single="<s> $A", special_tokens=[("<s>", model.token_to_id("<s>"))]
    )
  model.save(str(path))
  return tokenizers.load(Data(tokenizer=str(path)))


def train_sentencepiece(path, **options):
  spm = pytest.importorskip("sentencepiece", reason="the tokenizers extra is not installed")
  with open(path, "wb") as file:
    spm.SentencePieceTrainer.train(
      sentence_iterator=iter(PROSE.splitlines()), model_writer=file, vocab_size=400,
      byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
      allow_whitespace_only_pieces=True, hard_vocab_limit=False, minloglevel=2, **options,
    )  # fmt: skip
  return tokenizers.load(Data(tokenizer=str(path)))


HARD = "def f(x):\n\treturn 'é日本'  # <s> <|endoftext|> 🙂\n\n  end"


def test_bytes():
  bytes_ = tokenizers.load(Data())
  assert (bytes_.vocab_size, bytes_.separator) == (257, 256)
  ids = bytes_.encode("é")
  assert ids.tolist() == [0xC3, 0xA9] == bytes_.encode("é".encode()).tolist()
  assert bytes_.bytes_V.tolist() == [1] * 256 + [0]
  assert bytes_.decode([*ids, S, 65, 263]) == "éA"  # 263: padding of the model's vocabulary


def test_byte_level_bpe(tmp_path):
  bpe = train_bpe(tmp_path / "t.json", ["<pad>", "<|endoftext|>", "<s>"])
  assert bpe.separator == 2 and bpe.vocab_size == 400  # <s> comes before <|endoftext|>
  for text in (PROSE, HARD):
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert bpe.bytes_V[ids].sum() == len(text.encode())
    assert bpe.decode_bytes(ids[:-1]) == text.encode()[: bpe.bytes_V[ids[:-1]].sum()]
    assert not np.isin(ids, [0, 1, 2]).any()  # special tokens in the text are text
  assert len(bpe.encode(PROSE)) < len(PROSE) / 2
  assert bpe.bytes_V[:3].tolist() == [0, 0, 0]


def test_byte_level_bpe_without_special_tokens(tmp_path):
  bpe = train_bpe(tmp_path / "t.json")
  assert (bpe.separator, bpe.vocab_size) == (400, 401) == (len(bpe.bytes_V) - 1, 401)
  other = train_bpe(tmp_path / "u.json", ["<s>"])
  assert bpe.fingerprint != other.fingerprint


def test_sentencepiece(tmp_path):
  model = train_sentencepiece(tmp_path / "t.model")
  assert model.separator == 1  # <s>
  assert model.bytes_V[1:3].tolist() == [0, 0]  # <s>, </s>
  for text in (PROSE, HARD):
    ids = model.encode(text)
    assert model.decode(ids) == text
    assert model.bytes_V[ids].sum() == len(text.encode()) + 1  # the space before each document
    assert model.separator not in ids
  assert model.decode_bytes(model.encode("a é")) == " a é".encode()


def test_sentencepiece_without_bos_and_eos(tmp_path):
  model = train_sentencepiece(tmp_path / "t.model", bos_id=-1, eos_id=-1)
  assert model.separator == model.vocab_size - 1 == len(model.bytes_V) - 1
  assert model.bytes_V[model.separator] == 0
  assert model.decode([model.separator, *model.encode("fox")]) == "fox"


def test_rows_with_another_tokenizer(text, tmp_path):
  (pathlib.Path(text.path) / "a.txt").write_text(PROSE)
  plain = pipeline.load_rows(text, "train")
  text.tokenizer = str(tmp_path / "t.json")
  bpe = train_bpe(tmp_path / "t.json", ["<s>"])
  rows = pipeline.load_rows(text, "train")
  assert rows.tokenizer.fingerprint == bpe.fingerprint
  assert rows.digest != plain.digest and rows.num_targets < plain.num_targets / 2
  assert everything(rows) == everything(plain)
  targets_BL = rows.batch([0]).targets_BL
  cut = b"".join(text for _, text in rows.texts([0]))
  assert cut and len(cut) == rows.tokenizer.bytes_V[targets_BL].sum()
  assert everything(plain)[0].startswith(cut)


def test_ids_above_16_bits(tmp_path, monkeypatch):
  wide = tokenizers.Tokenizer([b""] * 70_001, 70_000, "wide")
  wide.encode = lambda text: np.array([65_536 + byte for byte in text])
  pipeline._tokenize(documents_of([b"ab"]), wide, "x", tmp_path)
  about = json.loads((tmp_path / "about.json").read_text())
  stream = np.fromfile(tmp_path / "tokens.bin", about["dtype"])
  assert stream.tolist() == [70_000, 65_536 + 97, 65_536 + 98, 70_000]


# Packing.


def test_packing_by_hand(tmp_path):
  texts = documents_of([b"ab", b"", b"c", b"defg"])
  pipeline._tokenize(texts, tokenizers.Bytes(), "x", tmp_path)
  about = json.loads((tmp_path / "about.json").read_text())
  stream_N = np.fromfile(tmp_path / "tokens.bin", about.pop("dtype"))
  a, b, c, d, e, f, g = b"abcdefg"
  assert stream_N.dtype == np.uint16
  assert stream_N.tolist() == [S, a, b, S, c, S, d, e, f, g, S]
  starts_M, domain_M, source_M = np.load(tmp_path / "documents.npy")
  assert starts_M.tolist() == [0, 3, 5] and domain_M.tolist() == [-1] * 3
  assert source_M.tolist() == [0, 2, 3]  # the empty document is left out
  rows = rows_of(stream_N, starts_M, 4, about)
  assert (len(rows), rows.num_full, rows.num_documents, rows.num_bytes) == (3, 2, 3, 7)
  expected = pipeline.Batch(
    tokens_BL=[[S, a, b, S], [c, S, d, e], [f, g, 0, 0], [0, 0, 0, 0]],
    targets_BL=[[a, b, S, c], [S, d, e, f], [g, S, 0, 0], [0, 0, 0, 0]],
    segments_BL=[[1, 1, 1, 2], [1, 2, 2, 2], [1, 1, 0, 0], [0, 0, 0, 0]],
    positions_BL=[[0, 1, 2, 0], [0, 0, 1, 2], [0, 1, 0, 0], [0, 0, 0, 0]],
  )
  assert_equal(
    rows.batch([0, 1, 2, -1]), pipeline.Batch(*(np.array(x, np.int32) for x in expected))
  )
  with pytest.raises(IndexError):
    rows.batch([3])
  assert list(rows.texts([0])) == [(b"", b"ab"), (b"", b"c")]
  assert list(rows.texts([0, 1])) == [(b"", b"ab"), (b"", b"c"), (b"", b"def")]
  assert list(rows.texts([0, 1, 2])) == [(b"", b"ab"), (b"", b"c"), (b"", b"defg")]
  assert list(rows.texts([0, 2])) == [(b"", b"ab"), (b"", b"c"), (b"def", b"g")]
  assert rows.documents_BL([0, 1, 2, -1]).tolist() == [
    [0, 0, 0, 1], [1, 2, 2, 2], [2, 2, -1, -1], [-1, -1, -1, -1],
  ]  # fmt: skip


def test_every_target_appears_once(stdlib):
  rows = pipeline.load_rows(dataclasses.replace(stdlib, seq_len=1000), "test")
  documents = builders.prepare(stdlib, "test")
  expected = []
  for index in range(len(documents)):
    expected += [S, *documents[index]]
  targets, inputs = [], []
  for rows_B in pipeline.eval_batches(pipeline.eval_rows(rows, 7, 0), 7):
    batch = rows.batch(rows_B)
    real_BL = batch.segments_BL > 0
    targets += batch.targets_BL[real_BL].tolist()
    inputs += batch.tokens_BL[real_BL].tolist()
  assert inputs == expected
  assert targets == [*expected[1:], S]
  assert rows.num_bytes == sum(map(len, everything(rows)))
  assert everything(rows) == [documents[i] for i in range(len(documents))]


# Order, processes, resuming.


def test_each_epoch_has_every_row_once_in_a_new_order():
  rows = numbered_rows(20)
  batches = pipeline.train_iterator(rows, Data(batch_size=4, seq_len=4))
  epochs = [joined(numbers(next(batches)) for _ in range(5)) for _ in range(3)]
  assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
  assert len({tuple(epoch) for epoch in epochs} | {tuple(range(20))}) == 4
  other = pipeline.train_iterator(rows, Data(batch_size=4, seq_len=4, seed=1))
  assert joined(numbers(next(other)) for _ in range(5)) != epochs[0]


def test_training_leaves_out_the_padded_row():
  rows = numbered_rows(6)
  rows = dataclasses.replace(rows, stream_N=rows.stream_N[:-1])
  batches = pipeline.train_iterator(rows, Data(batch_size=5, seq_len=4))
  assert sorted(numbers(next(batches))) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_assemble_the_same_batches(processes):
  rows = numbered_rows(21)
  config = Data(batch_size=8, seq_len=4)
  whole = pipeline.train_iterator(rows, config)
  parts = [pipeline.train_iterator(rows, config, p, processes) for p in range(processes)]
  for _ in range(8):  # three epochs; batches cross their borders
    assembled = [np.concatenate(fields) for fields in zip(*map(next, parts), strict=True)]
    assert_equal(pipeline.Batch(*assembled), next(whole))
  whole = list(pipeline.eval_batches(range(21), 8))
  parts = [list(pipeline.eval_batches(range(21), 8, p, processes)) for p in range(processes)]
  assert len(whole) == 3
  for n, rows_B in enumerate(whole):
    assert np.concatenate([part[n] for part in parts]).tolist() == rows_B.tolist()


def test_evaluation_rows_are_spread_evenly_over_the_split():
  rows = numbered_rows(100)
  assert pipeline.eval_rows(rows, 2, 2).tolist() == [12, 37, 62, 87]
  assert pipeline.eval_rows(rows, 7, 0).tolist() == list(range(100))
  assert pipeline.eval_rows(rows, 7, 1000).tolist() == list(range(100))
  for count in range(1, 101):  # as many of each half, and none twice
    chosen = pipeline.spread(100, count)
    assert len(set(chosen.tolist())) == count
    assert abs(np.sum(chosen < 50) - count / 2) <= 0.5


def test_the_last_evaluation_batch_ends_in_padding():
  batches = [rows_B.tolist() for rows_B in pipeline.eval_batches([3, 5, 8], 2)]
  assert batches == [[3, 5], [8, -1]]


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_resume_is_exact(stdlib, threads):
  config = dataclasses.replace(stdlib, batch_size=3, threads=threads)
  rows = pipeline.load_rows(config, "validation")
  batches = pipeline.train_iterator(rows, config)
  for _ in range(5):
    next(batches)
  state = json.loads(json.dumps(batches.get_state()))
  expected = [next(batches) for _ in range(5)]
  fresh = pipeline.train_iterator(rows, config)
  next(fresh)
  fresh.set_state(state)
  for batch in expected:
    assert_equal(next(fresh), batch)


def test_resume_through_orbax(stdlib, tmp_path):
  rows = pipeline.load_rows(stdlib, "validation")
  batches = pipeline.train_iterator(rows, stdlib)
  for _ in range(5):
    next(batches)
  with ocp.CheckpointManager(tmp_path) as manager:
    manager.save(5, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(batches)))
    manager.wait_until_finished()
  expected = [next(batches) for _ in range(5)]
  fresh = pipeline.train_iterator(rows, stdlib)
  with ocp.CheckpointManager(tmp_path) as manager:
    manager.restore(5, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(fresh)))
  for batch in expected:
    assert_equal(next(fresh), batch)


def test_too_few_rows():
  with pytest.raises(UserError) as caught:
    pipeline.train_iterator(numbered_rows(7), Data(batch_size=8, seq_len=4))
  for part in ("config.data.batch_size=8", "config.data.seq_len=4", "7 rows"):
    assert part in str(caught.value)
  with pytest.raises(UserError, match="batch_size=8 does not split over 3 processes"):
    pipeline.train_iterator(numbered_rows(9), Data(batch_size=8, seq_len=4), 0, 3)


def test_gzip_baseline_of_a_whole_split_is_that_of_its_files(tmp_path):
  documents = [PROSE.encode(), b"short"]
  rows = tokenized(documents, tmp_path, seq_len=50)
  size = sum(len(gzip.compress(d, 9)) for d in documents)
  bits = pipeline.gzip_bits_per_byte(rows, range(len(rows)))
  assert bits == 8 * size / (len(PROSE.encode()) + 5)


def test_gzip_baseline_of_single_rows_sums_to_that_of_the_file(tmp_path):
  """Each row costs what it adds; a repeated text costs little, because its context is known."""
  noise = bytes(np.random.default_rng(0).integers(33, 120, 4000).astype(np.uint8))
  rows = tokenized([noise + noise], tmp_path, seq_len=100)
  num_bytes = [sum(len(text) for _, text in rows.texts([r])) for r in range(len(rows))]
  each = [pipeline.gzip_bits_per_byte(rows, [r]) for r in range(len(rows))]
  assert np.dot(each, num_bytes) == pytest.approx(8 * len(gzip.compress(noise * 2, 9)))
  assert np.mean(each[:39]) > 6 and np.mean(each[41:]) < 1
  early, late = pipeline.gzip_bits_per_byte(rows, [5, 6]), pipeline.gzip_bits_per_byte(rows, [60])
  both = pipeline.gzip_bits_per_byte(rows, [5, 6, 60])
  assert both == pytest.approx((2 * early + late) / 3)


def tokenized(texts, folder, seq_len):
  pipeline._tokenize(documents_of(texts), tokenizers.Bytes(), "x", folder)
  about = json.loads((folder / "about.json").read_text())
  stream_N = np.fromfile(folder / "tokens.bin", about.pop("dtype"))
  return rows_of(stream_N, np.load(folder / "documents.npy")[0], seq_len, about)
