"""Stored tokens: in what order they are, and what is damaged is named and made again."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from moe_jax.config import Data
from moe_jax.data import pipeline, token_files
from tests.support.texts import S, everything
from tests.support.toys import ROOT


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
  """A config of 12 documents, and the folder with its tokens. Each test leaves them whole."""
  base = tmp_path_factory.mktemp("stored")
  (base / "text").mkdir()
  for n in range(12):
    text = "".join(f"line {i} of document {n}\n" for i in range(600))
    (base / "text" / f"{n}.txt").write_text(text)
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("MOE_JAX_CACHE", str(base / "cache"))
    config = Data(name="text", path=str(base / "text"), seq_len=16, batch_size=512)
    pipeline.load_rows(config, "train")
    (folder,) = (base / "cache/tokens").glob("*/")
    yield config, folder


def flip(path):
  data = bytearray(path.read_bytes())
  data[len(data) * 2 // 3] ^= 16
  path.write_bytes(data)


def cut(path):
  os.truncate(path, path.stat().st_size * 2 // 3)


def grow(path):
  path.write_bytes(path.read_bytes() + b"\0")


def empty(path):
  path.write_bytes(b"")


def garbage(path):
  path.write_bytes(b"[" * 100_000)


def another_dtype(path):
  path.write_text(path.read_text().replace("uint16", "uint61"))


DAMAGE = [
  *(
    (name, how)
    for name in ("tokens.bin", "documents.npy", "names.txt", "about.json")
    for how in (flip, cut, empty, os.remove)
  ),
  ("tokens.bin", grow),
  ("about.json", garbage),
  ("about.json", another_dtype),
]


@pytest.mark.parametrize(("name", "damage"), DAMAGE)
def test_what_is_damaged_is_named_and_made_again(name, damage, stored, capfd):
  config, folder = stored
  before = pipeline.load_rows(config, "train")
  texts, batch = everything(before), before.batch([1, 2])
  damage(folder / name)
  capfd.readouterr()
  after = pipeline.load_rows(config, "train")
  said = capfd.readouterr().err.splitlines()
  assert len(said) == 2 and said[1].startswith("tokenized text train: ")
  assert said[0].startswith(f"{folder / name} is damaged") and "removed and made again" in said[0]
  assert everything(after) == texts and after.digest == before.digest
  for first, second in zip(after.batch([1, 2]), batch, strict=True):
    np.testing.assert_array_equal(first, second)
  pipeline.load_rows(config, "train")
  assert capfd.readouterr().err == ""


_CHILD = """
import sys
from moe_jax.data import pipeline
from moe_jax.config import Data
print("ready", flush=True)
sys.stdin.readline()
print(pipeline.load_rows(Data(name="text", path=sys.argv[1]), "train").digest)
"""


@pytest.mark.slow
def test_two_processes_that_find_damage_make_it_again_once(stored):
  config, folder = stored
  digest = pipeline.load_rows(config, "train").digest
  flip(folder / "documents.npy")
  children = [
    subprocess.Popen(
      [sys.executable, "-c", _CHILD, config.path],
      env=os.environ | {"PYTHONPATH": str(ROOT)},
      text=True,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
    )
    for _ in range(2)
  ]
  for child in children:
    assert child.stdout.readline() == "ready\n"
  results = [child.communicate("go\n", timeout=600) for child in children]
  assert [out for out, _ in results] == [digest + "\n"] * 2, results
  said = "".join(err for _, err in results)
  assert said.count("is damaged") == said.count("tokenized") == 1 and said.count("\n") == 3


def test_documents_are_stored_in_the_order_of_their_places(tmp_path):
  """And not in that in which they are read. One that a sum of parts has twice is there twice."""
  texts = {7: b"ab", 2: b"c", 5: b"def", 3: b"c"}
  documents = (
    token_files.Encoded(place, f"name {text}", place % 2, len(text), np.array([*text]))
    for place, text in texts.items()
  )
  with token_files.TokenWriter(tmp_path, "uint16", 256) as writer:
    for document in documents:
      writer.add(document)
    writer.finish()
  stored = token_files.read_tokens(tmp_path)
  assert stored["stream_N"].tolist() == [S, *b"c", S, *b"c", S, *b"def", S, *b"ab", S]
  assert stored["starts_M"].tolist() == [0, 2, 4, 8] and stored["domain_M"].tolist() == [0, 1, 1, 1]
  names = [stored["name"](number) for number in stored["source_M"]]
  assert names == [f"name {texts[place]}" for place in (2, 3, 5, 7)]
  assert {path.suffix for path in tmp_path.iterdir()} == {".bin", ".npy", ".txt", ".json"}


_SLOW = """
import sys, time
from moe_jax.config import Data
from moe_jax.data import pipeline, tokenizers
from moe_jax.start import progress
pipeline._SECONDS, pipeline._BATCH_DOCUMENTS, progress.SECONDS = 0, 10, 0.2
encode_all = tokenizers.Bytes.encode_all
def slowly(self, texts):
  time.sleep(0.02)
  return encode_all(self, texts)
tokenizers.Bytes.encode_all = slowly
pipeline.load_rows(Data(name="text", path=sys.argv[1]), "train")
"""


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_tokenizing_that_is_stopped_goes_on_where_it_was(signal_number, text, own_cache, capfd):
  """With the same tokens, bit for bit, though the documents are not read in their order."""
  lines = [json.dumps({"text": f"document {n}, " + "naïve " * (n % 9)}) for n in range(1000)]
  (pathlib.Path(text.path) / "x.jsonl").write_text("\n".join(lines))
  command = [sys.executable, "-c", _SLOW, text.path]
  child = subprocess.Popen(
    command, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True, stderr=subprocess.PIPE
  )
  said = [next(line for line in child.stderr if "tokenizing" in line) for _ in range(3)]
  assert re.fullmatch(
    r"tokenizing text train: \d+ of [89]\d\d documents, 0\.\d MB/s, \d+ documents/s, "
    r"ETA 0:00:0\d\n",
    said[-1],
  ), said
  child.send_signal(signal_number)
  child.communicate()
  (left,) = own_cache.glob("tokens/*.partial")
  done = int(json.loads((left / "state.json").read_text())["sums"]["read"])
  rows = pipeline.load_rows(text, "train")
  assert done > 20 and f"text train: goes on after {done} of {rows.num_documents} documents" in (
    capfd.readouterr().err
  )
  assert not list(own_cache.glob("tokens/*.partial"))
  (folder,) = own_cache.glob("tokens/*/")
  assert {path.suffix for path in folder.iterdir()} == {".bin", ".npy", ".txt", ".json"}
  whole, names = everything(rows), [rows.name(m) for m in rows.source_M]
  shutil.rmtree(own_cache)
  again = pipeline.load_rows(text, "train")
  assert again.digest == rows.digest and everything(again) == whole
  assert [again.name(m) for m in again.source_M] == names
  np.testing.assert_array_equal(again.starts_M, rows.starts_M)


def test_two_kills_while_the_files_are_finished_lose_and_add_nothing(text, own_cache, monkeypatch):
  """Of a table, whose stream is not written again in another order."""
  table = pyarrow.table({"text": [f"abc {i}" for i in range(50)]})
  parquet.write_table(table, pathlib.Path(text.path) / "x.parquet")

  def stop(*_, **__):
    raise KeyboardInterrupt

  for _ in range(2):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
      patch.setattr(np, "argsort", stop)
      pipeline.load_rows(text, "train")
  rows = pipeline.load_rows(text, "train")
  shutil.rmtree(own_cache)
  again = pipeline.load_rows(text, "train")
  assert rows.digest == again.digest and len(rows.stream_N) == len(again.stream_N)
