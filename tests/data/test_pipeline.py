"""Rows: packing, the order of an epoch, the parts of each process, resuming."""

import dataclasses
import gzip
import json

import numpy as np
import pytest

from moe_jax.config import Data
from moe_jax.data import builders, pipeline, token_files, tokenizers
from moe_jax.errors import UserError
from tests.support.texts import PROSE, S, documents_of, everything, joined, read


def numbered_rows(num_rows, seq_len=4):
  """Rows whose first token divided by seq_len is the row's number."""
  stream_N = 1000 + np.arange(num_rows * seq_len + 1)
  about = dict(num_documents=1, num_bytes=1, digest="")
  return rows_of(stream_N, [0], seq_len, about)


def rows_of(stream_N, starts, seq_len, about):
  return pipeline.Rows(
    stream_N=stream_N,
    seq_len=seq_len,
    tokenizer=tokenizers.Bytes(),
    starts_M=np.array(starts),
    domain_M=np.full(len(starts), -1),
    source_M=np.arange(len(starts)),
    **about,
  )


def numbers(batch):
  return ((batch.tokens_BL[:, 0] - 1000) // batch.tokens_BL.shape[1]).tolist()


def assert_equal(first, second):
  for a, b, name in zip(first, second, pipeline.Batch._fields, strict=True):
    np.testing.assert_array_equal(a, b, err_msg=name)
    assert a.dtype == b.dtype == np.int32, name


def test_ids_above_16_bits_are_stored_whole(tmp_path, monkeypatch):
  wide = tokenizers.Tokenizer([b""] * 70_001, 70_000, "wide")
  wide.encode = lambda text: np.array([65_536 + byte for byte in text])
  pipeline._tokenize(documents_of([b"ab"]), wide, "x", tmp_path)
  stored = token_files.read_tokens(tmp_path)
  assert stored["stream_N"].tolist() == [70_000, 65_536 + 97, 65_536 + 98, 70_000]


def tokenized(texts, folder, seq_len):
  pipeline._tokenize(documents_of(texts), tokenizers.Bytes(), "x", folder)
  stored = token_files.read_tokens(folder)
  about = dict(num_documents=stored["num_documents"], num_bytes=stored["num_bytes"], digest="")
  return rows_of(stored["stream_N"], stored["starts_M"], seq_len, about)


@pytest.fixture
def packed(tmp_path):
  """Rows of 4 of the documents ab, nothing, c and defg."""
  return tokenized([b"ab", b"", b"c", b"defg"], tmp_path, seq_len=4)


def test_a_separator_stands_before_each_document_and_at_the_end(packed, tmp_path):
  assert packed.stream_N[:].dtype == np.uint16
  assert packed.stream_N[:].tolist() == [S, *b"ab", S, *b"c", S, *b"defg", S]
  assert (len(packed), packed.num_full, packed.num_documents, packed.num_bytes) == (3, 2, 3, 7)
  starts_M, domain_M, source_M = np.load(tmp_path / "documents.npy")
  assert starts_M.tolist() == [0, 3, 5] and domain_M.tolist() == [-1] * 3
  assert source_M.tolist() == [0, 2, 3]  # the empty document is left out


def test_packing_by_hand(packed):
  """The last row is padded; row -1 is padding."""
  a, b, c, d, e, f, g = b"abcdefg"
  expected = pipeline.Batch(
    tokens_BL=[[S, a, b, S], [c, S, d, e], [f, g, 0, 0], [0, 0, 0, 0]],
    targets_BL=[[a, b, S, c], [S, d, e, f], [g, S, 0, 0], [0, 0, 0, 0]],
    segments_BL=[[1, 1, 1, 2], [1, 2, 2, 2], [1, 1, 0, 0], [0, 0, 0, 0]],
    positions_BL=[[0, 1, 2, 0], [0, 0, 1, 2], [0, 1, 0, 0], [0, 0, 0, 0]],
  )
  assert_equal(
    packed.batch([0, 1, 2, -1]), pipeline.Batch(*(np.array(x, np.int32) for x in expected))
  )
  with pytest.raises(IndexError):
    packed.batch([3])


@pytest.mark.parametrize(
  ("rows", "texts"),
  [
    ([0], [(b"", b"ab"), (b"", b"c")]),
    ([0, 1], [(b"", b"ab"), (b"", b"c"), (b"", b"def")]),
    ([0, 1, 2], [(b"", b"ab"), (b"", b"c"), (b"", b"defg")]),
    ([0, 2], [(b"", b"ab"), (b"", b"c"), (b"def", b"g")]),
  ],
)
def test_the_texts_of_rows_and_what_stands_before_them(rows, texts, packed):
  assert list(packed.texts(rows)) == texts


def test_each_target_knows_its_document(packed):
  assert packed.documents_BL([0, 1, 2, -1]).tolist() == [
    [0, 0, 0, 1],
    [1, 2, 2, 2],
    [2, 2, -1, -1],
    [-1, -1, -1, -1],
  ]


def test_every_target_appears_once(stdlib):
  rows = pipeline.load_rows(dataclasses.replace(stdlib, seq_len=1000), "test")
  documents = read(builders.prepare(stdlib, "test"))
  expected = joined([S, *document] for document in documents)
  targets, inputs = [], []
  for rows_B in pipeline.eval_batches(pipeline.eval_rows(rows, 7, 0), 7):
    batch = rows.batch(rows_B)
    real_BL = batch.segments_BL > 0
    targets += batch.targets_BL[real_BL].tolist()
    inputs += batch.tokens_BL[real_BL].tolist()
  assert inputs == expected
  assert targets == [*expected[1:], S]
  assert rows.num_bytes == sum(map(len, everything(rows)))
  assert everything(rows) == documents


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


@pytest.mark.parametrize(("batch_size", "processes"), [(8, 2), (8, 4), (8, 8), (1, 1)])
def test_processes_assemble_the_same_batches(batch_size, processes):
  """Also where each of them has one row of a batch."""
  rows = numbered_rows(21)
  config = Data(batch_size=batch_size, seq_len=4)
  whole = pipeline.train_iterator(rows, config)
  parts = [pipeline.train_iterator(rows, config, p, processes) for p in range(processes)]
  for _ in range(8):  # three epochs; batches cross their borders
    assembled = [np.concatenate(fields) for fields in zip(*map(next, parts), strict=True)]
    assert_equal(pipeline.Batch(*assembled), next(whole))


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


def test_batches_that_rows_or_processes_do_not_fill_are_refused():
  with pytest.raises(UserError) as caught:
    pipeline.train_iterator(numbered_rows(7), Data(batch_size=8, seq_len=4))
  for part in ("config.data.batch_size=8", "config.data.seq_len=4", "7 rows"):
    assert part in str(caught.value)
  with pytest.raises(UserError, match="batch_size=8 does not split over 3 processes"):
    pipeline.train_iterator(numbered_rows(9), Data(batch_size=8, seq_len=4), 0, 3)


def test_the_gzip_baseline_of_a_whole_split_is_that_of_its_files(tmp_path):
  documents = [PROSE.encode(), b"short"]
  rows = tokenized(documents, tmp_path, seq_len=50)
  size = sum(len(gzip.compress(d, 9)) for d in documents)
  bits = pipeline.gzip_bits_per_byte(rows, range(len(rows)))
  assert bits == 8 * size / (len(PROSE.encode()) + 5)


def test_the_gzip_baseline_of_single_rows_sums_to_that_of_the_file(tmp_path):
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
