"""Rows: packing, the order of an epoch, the parts of each process, resuming."""

import dataclasses
import gzip
import json

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest

from moe_jax.config import Data, UserError
from moe_jax.data import builders, pipeline, tokenizers
from tests.support.texts import PROSE, S, documents_of, everything, joined


def numbered_rows(num_rows, seq_len=4):
  """Rows whose first token divided by seq_len is the row's number."""
  stream_N = 1000 + np.arange(num_rows * seq_len + 1)
  about = dict(num_documents=1, num_bytes=1, digest="")
  return pipeline.Rows(stream_N=stream_N, seq_len=seq_len, tokenizer=tokenizers.Bytes(), **about)


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
  about = json.loads((tmp_path / "about.json").read_text())
  stream = np.fromfile(tmp_path / "tokens.bin", about["dtype"])
  assert stream.tolist() == [70_000, 65_536 + 97, 65_536 + 98, 70_000]


@pytest.fixture
def packed(tmp_path):
  """Rows of 4 of the documents ab, nothing, c and defg."""
  texts = documents_of([b"ab", b"", b"c", b"defg"])
  pipeline._tokenize(texts, tokenizers.Bytes(), "x", tmp_path)
  about = json.loads((tmp_path / "about.json").read_text())
  stream_N = np.fromfile(tmp_path / "tokens.bin", about.pop("dtype"))
  return pipeline.Rows(stream_N=stream_N, seq_len=4, tokenizer=tokenizers.Bytes(), **about)


def test_a_separator_stands_before_each_document_and_at_the_end(packed):
  assert packed.stream_N.dtype == np.uint16
  assert packed.stream_N.tolist() == [S, *b"ab", S, *b"c", S, *b"defg", S]


def test_rows_documents_and_bytes_are_counted(packed):
  assert (len(packed), packed.num_full, packed.num_documents, packed.num_bytes) == (3, 2, 3, 7)


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


def test_a_row_past_the_last_is_an_error(packed):
  with pytest.raises(IndexError):
    packed.batch([3])


@pytest.mark.parametrize(("rows", "documents"), [
  (1, [b"ab", b"c"]), (2, [b"ab", b"c", b"def"]), (9, [b"ab", b"c", b"defg"]),
])  # fmt: skip
def test_the_documents_of_the_first_rows(rows, documents, packed):
  assert packed.documents(rows) == documents


def test_every_target_appears_once(stdlib):
  rows = pipeline.load_rows(dataclasses.replace(stdlib, seq_len=1000), "test")
  documents = builders.prepare(stdlib, "test")
  expected = []
  for index in range(len(documents)):
    expected += [S, *documents[index]]
  targets, inputs = [], []
  for batch in pipeline.eval_batches(rows, batch_size=7, num_batches=0):
    real_BL = batch.segments_BL > 0
    targets += batch.targets_BL[real_BL].tolist()
    inputs += batch.tokens_BL[real_BL].tolist()
  assert inputs == expected
  assert targets == [*expected[1:], S]
  assert rows.num_bytes == sum(map(len, everything(rows)))
  assert everything(rows) == [documents[i] for i in range(len(documents))]


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
  whole = list(pipeline.eval_batches(rows, 8, 0))
  parts = [list(pipeline.eval_batches(rows, 8, 0, p, processes)) for p in range(processes)]
  assert len(whole) == 3
  for n, batch in enumerate(whole):
    assembled = [np.concatenate(f) for f in zip(*(part[n] for part in parts), strict=True)]
    assert_equal(pipeline.Batch(*assembled), batch)


def test_eval_batches_begin_at_the_start_and_end_in_padding():
  rows = numbered_rows(5)
  batches = list(pipeline.eval_batches(rows, 2, 0))
  assert [numbers(batch) for batch in batches[:2]] == [[0, 1], [2, 3]]
  assert numbers(batches[2])[0] == 4 and not batches[2].segments_BL[1].any()
  assert len(list(pipeline.eval_batches(rows, 2, 1))) == 1
  assert len(list(pipeline.eval_batches(rows, 2, 9))) == 3


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


def test_fewer_rows_than_a_batch_are_refused():
  with pytest.raises(UserError) as caught:
    pipeline.train_iterator(numbered_rows(7), Data(batch_size=8, seq_len=4))
  for part in ("config.data.batch_size=8", "config.data.seq_len=4", "7 rows"):
    assert part in str(caught.value)


def test_a_batch_that_does_not_split_over_the_processes_is_refused():
  with pytest.raises(UserError, match="batch_size=8 does not split over 3 processes"):
    pipeline.train_iterator(numbered_rows(9), Data(batch_size=8, seq_len=4), 0, 3)


def test_the_gzip_baseline_compresses_each_document_alone():
  documents = [PROSE.encode(), b"short"]
  size = sum(len(gzip.compress(d, 9)) for d in documents)
  assert pipeline.gzip_bits_per_byte(documents) == 8 * size / (len(PROSE.encode()) + 5)
