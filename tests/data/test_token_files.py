"""Stored tokens: what is damaged is named, and made again, or ends the run in one line."""

import os
import subprocess
import sys

import numpy as np
import pytest

from moe_jax.config import Data
from moe_jax.data import cache, pipeline, token_files
from moe_jax.errors import DamagedError
from tests.support.texts import everything
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
  *((name, how) for name in ("tokens.bin", "documents.npy", "checksums.npy", "about.json",
                             "checksums.json") for how in (flip, cut, empty, os.remove)),
  ("tokens.bin", grow), ("about.json", garbage), ("checksums.json", garbage),
  ("about.json", another_dtype),
]  # fmt: skip


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


@pytest.fixture
def large(stored, monkeypatch):
  """Files of any size count as large."""
  monkeypatch.setattr(cache, "_LARGE", 0)
  return stored


def test_a_large_file_is_not_read_whole_at_the_start(large, capfd):
  config, folder = large
  flip(folder / "tokens.bin")
  rows = pipeline.load_rows(config, "train")
  assert bytes(rows.batch([0]).targets_BL[0].astype(np.uint8)).startswith(b"line 0 of docume")
  assert capfd.readouterr().err == ""
  os.truncate(folder / "tokens.bin", 1000)  # but its size is seen
  assert len(pipeline.load_rows(config, "train")) == len(rows)
  assert f"{folder / 'tokens.bin'} is damaged: it has 1,000 bytes" in capfd.readouterr().err


@pytest.mark.parametrize("damage", [flip, cut])
def test_damage_of_a_large_file_ends_a_run_where_it_is_read(damage, large, capfd):
  """The file is cut while it is open; a memory map would end the process without a word."""
  config, folder = large
  rows = pipeline.load_rows(config, "train")
  batches = pipeline.train_iterator(rows, config)
  good = next(batches)
  damage(folder / "tokens.bin")
  with pytest.raises(DamagedError, match=r"tokens.bin is damaged.*makes it again") as caught:
    for _ in range(2 * len(rows) // 512 + 9):  # some are read already
      next(batches)
  assert "\n" not in str(caught.value)
  again = pipeline.load_rows(config, "train")
  assert f"{folder / 'tokens.bin'} is damaged" in capfd.readouterr().err
  fresh = pipeline.train_iterator(again, config)
  np.testing.assert_array_equal(next(fresh).tokens_BL, good.tokens_BL)


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
      [sys.executable, "-c", _CHILD, config.path], env=os.environ | {"PYTHONPATH": str(ROOT)},
      text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )
    for _ in range(2)
  ]  # fmt: skip
  for child in children:
    assert child.stdout.readline() == "ready\n"
  results = [child.communicate("go\n", timeout=600) for child in children]
  assert [out for out, _ in results] == [digest + "\n"] * 2, results
  said = "".join(err for _, err in results)
  assert said.count("is damaged") == said.count("tokenized") == 1 and said.count("\n") == 2


def test_pieces_of_a_stream_of_several_parts(tmp_path):
  tokens_N = np.random.default_rng(0).integers(0, 2**16, 3 * token_files._PART + 5, np.uint16)
  with token_files.Writer(tmp_path, np.dtype("uint16")) as writer:
    for piece in np.split(tokens_N, [3, 3, 9000, 20_000]):
      writer.add(piece)
    writer.finish(np.zeros((3, 1), np.int64), {})
  stream_N = token_files.read(tmp_path).stream_N
  assert len(stream_N) == len(tokens_N)
  P = token_files._PART
  for places in [(0, 1), (P - 1, P + 1), (P, 2 * P), (5, 3 * P + 2), (3 * P, 3 * P + 99), (7, 7),
                 (9, 3), (-3, None), (None, None)]:  # fmt: skip
    np.testing.assert_array_equal(stream_N[slice(*places)], tokens_N[slice(*places)])
