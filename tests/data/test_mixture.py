"""Mixtures: exact shares, epochs by source, and rows that belong to one source."""

import collections
import dataclasses
import itertools
import json
import re
import string

import numpy as np
import pytest

from moe_jax.config import Config, Data, checks, override
from moe_jax.config.mixture import sources
from moe_jax.data import mixture, pipeline
from moe_jax.errors import UserError
from tests.support.scripts import evaluate, train
from tests.support.texts import error_of, everything

FAR = 10**12  # a row's place after a long training


def parts_of(*weights, rows=100):
  ranges = (range(rows * n, rows * (n + 1)) for n in range(len(weights)))
  named = zip(string.ascii_letters, weights, ranges, strict=False)
  return [mixture.Part(label, weight, where) for label, weight, where in named]


@pytest.mark.parametrize(
  "weights", [(1.0,), (0.5, 0.5), (0.7, 0.2, 0.1), (0.001, 0.999), (1e-6, 1)]
)
@pytest.mark.parametrize("first", [0, FAR])
def test_shares_are_exact_at_every_row(weights, first):
  parts = parts_of(*weights)
  before = mixture.drawn(parts, first)
  for count in range(first + 1, first + 200):
    now = mixture.drawn(parts, count)
    assert sum(now) == count
    assert sorted(b - a for a, b in zip(before, now, strict=True)) == [0] * (len(parts) - 1) + [1]
    for share, rows in zip(weights, now, strict=True):
      assert abs(rows - count * share / sum(weights)) < 2
    before = now


def test_small_shares_do_not_drive_out_a_large_one():
  """In batches of 8, of which 82% is 6.6 rows."""
  parts = parts_of(*[0.02] * 3, 0.82, *[0.02] * 6)
  rows = [mixture.drawn(parts, 8 * n)[3] for n in range(500)]
  assert set(np.diff(rows)) <= {5, 6, 7, 8}
  rng = np.random.default_rng(0)
  for _ in range(100):
    weights = rng.dirichlet([0.5] * int(rng.integers(2, 20)))
    parts, count = parts_of(*weights), int(rng.integers(10**6))
    wrong = np.array(mixture.drawn(parts, count)) - count * weights
    assert np.abs(wrong).max() < 2


def test_each_source_has_epochs_of_its_own():
  """The rows of an epoch are the source's, each once; of the next they come in another order."""
  parts = parts_of(0.75, 0.25, rows=12)
  order = mixture.order(parts, seed=3)
  rows = [int(order[place]) for place in range(96)]
  for part, epochs in zip(parts, (6, 2), strict=True):
    mine = [row for row in rows if row in part.rows]
    split = [tuple(mine[i : i + 12]) for i in range(0, len(mine), 12)]
    assert len(split) == epochs and len(set(split)) == epochs
    assert all(sorted(epoch) == list(part.rows) for epoch in split)
  assert mixture.metrics(parts, 48) == {
    "share/a": 0.75, "epochs/a": 3.0, "share/b": 0.25, "epochs/b": 1.0,
  }  # fmt: skip
  assert mixture.describe(parts, 6)[1].endswith(" 25% b: 12 rows, an epoch each 8.0 steps")


@pytest.mark.parametrize("sizes", [(5,), (1, 1), (7, 1, 9), (2, 30, 3)])
def test_joined_streams_are_one_stream(sizes):
  """As if the documents of all had been written one after another."""
  streams = [np.array([9, *range(size), 9], np.uint16) for size in sizes]
  whole = np.concatenate([streams[0], *(stream[1:] for stream in streams[1:])])
  joined = mixture.Joined(streams)
  assert len(joined) == len(whole)
  for first, last in itertools.combinations_with_replacement(range(-2, len(whole) + 3), 2):
    np.testing.assert_array_equal(joined[first:last], whole[first:last])
    assert joined[first:last].dtype == np.uint16


@pytest.fixture
def mixed(tmp_path, own_cache):
  """A config of three sources: letters, digits, and the column of a table."""
  for name, letters in (("letters", "abcdefg"), ("digits", "1234567")):
    (tmp_path / name).mkdir()
    for n in range(60):
      (tmp_path / name / f"{n}.txt").write_text("".join(letters[n % 7 :] * (9 + n % 4)))
  lines = [json.dumps({"body": "+-*/" * (5 + n % 6)}) for n in range(50)]
  (tmp_path / "signs.jsonl").write_text("\n".join(lines))
  text = (
    f"letters=2:text:{tmp_path}/letters, digits=1:text:{tmp_path}/digits,"
    f"signs=1:text:{tmp_path}/signs.jsonl#body"
  )
  return Data(mixture=text, seq_len=16, batch_size=4)


def test_each_row_of_a_batch_is_of_one_source(mixed):
  rows = pipeline.load_rows(mixed, "train")
  assert rows.domains == ("letters", "digits", "signs")
  counts = collections.Counter()
  for number in range(50):
    for row in pipeline.batch_rows(rows, mixed, number):
      (domain,) = set(rows.domains_BL([row])[0].tolist())
      counts[rows.domains[domain]] += 1
      alphabet = ("abcdefg", "1234567", "+-*/")[domain]
      batch = rows.batch([row])
      inputs = [i for i in batch.tokens_BL[0].tolist() if i != rows.tokenizer.separator]
      assert set(map(chr, inputs)) <= set(alphabet)
  assert counts == {"letters": 100, "digits": 50, "signs": 50}
  names = [rows.name(int(m)) for m in rows.source_M]
  assert len(names) == rows.num_documents == len(set(names)) and len(everything(rows)) == len(names)
  assert {name.split("/")[0] for name in names} == set(rows.domains)
  assert any(name.startswith("signs/signs.jsonl:") for name in names)


def test_weights_change_the_order_and_tokenize_nothing_again(mixed, capfd):
  rows = pipeline.load_rows(mixed, "train")
  assert capfd.readouterr().err.count("tokenized text train:") == 3
  other = dataclasses.replace(mixed, mixture=mixed.mixture.replace("letters=2", "letters=5"))
  again = pipeline.load_rows(other, "train")
  assert capfd.readouterr().err == "" and again.digest == rows.digest
  assert pipeline.batch_rows(again, other, 3) != pipeline.batch_rows(rows, mixed, 3)


def test_processes_share_the_batches_and_resume_exactly(mixed):
  rows = pipeline.load_rows(mixed, "train")
  want = [rows.batch(pipeline.batch_rows(rows, mixed, number)) for number in range(9)]
  parts = [pipeline.train_iterator(rows, mixed, index, 2) for index in range(2)]
  for batch in want[:4]:
    found = np.concatenate([next(part).tokens_BL for part in parts])
    np.testing.assert_array_equal(found, batch.tokens_BL)
  fresh = pipeline.train_iterator(rows, mixed)
  pipeline.skip_to(fresh, 6)
  np.testing.assert_array_equal(next(fresh).tokens_BL, want[6].tokens_BL)


@pytest.mark.parametrize(("text", "why"), [
  ("code", "'code' is not LABEL=WEIGHT:TEXT"),
  ("code=1:", "'code=1:' is not LABEL=WEIGHT:TEXT"),
  ("a=1:x,", "'' is not LABEL=WEIGHT:TEXT"),
  ("a b=1:x", "'a b=1:x' is not LABEL=WEIGHT:TEXT"),
  ("a=0:x", "the weight '0' of a is no number above 0"),
  ("a=nan:x", "the weight 'nan' of a is no number above 0"),
  ("a=inf:x", "the weight 'inf' of a is no number above 0"),
  ("a=one:x", "the weight 'one' of a is no number above 0"),
  ("a=1:x, a=2:y", "a label stands there twice"),
  ("a=1:x, b=1e9:y", "a weight is over 1,000,000 times another"),
])  # fmt: skip
def test_a_mixture_that_is_spelled_wrong_is_refused(text, why):
  with pytest.raises(UserError) as caught:
    checks.check(override(Config(), {"data.mixture": text}))
  assert str(caught.value).startswith(f"config.data.mixture={text!r}: {why}; write LABEL=WEIGHT")


def test_a_mixture_beside_a_path_is_refused():
  with pytest.raises(UserError, match="each source of a mixture has its own path"):
    checks.check(override(Config(), {"data.mixture": "a=1:python_stdlib", "data.path": "x"}))


def test_sources_are_data_of_their_own():
  found = sources(Data(mixture="a-1=1e0:c4/en:3.0.1#body , b=3:text:/x/*.parquet", column="text"))
  assert [s[:2] for s in found] == [("a-1", 0.25), ("b", 0.75)]
  assert [(s.data.name, s.data.path, s.data.column, s.data.mixture) for s in found] == [
    ("c4/en:3.0.1", "", "body", ""), ("text", "/x/*.parquet", "text", ""),
  ]  # fmt: skip


def test_a_source_without_a_row_is_refused(mixed):
  message = error_of(dataclasses.replace(mixed, seq_len=1500))
  assert "signs has no row of config.data.seq_len=1500; make it smaller or give" in message


@pytest.mark.slow
def test_a_mixture_trains_resumes_bit_for_bit_and_is_evaluated_by_source(mixed, tmp_path):
  words = [f"--config.data.mixture={mixed.mixture}", "--config.data.seq_len=16"]
  words += ["--config.data.batch_size=8", "--config.eval.batch_size=4"]
  cache = tmp_path / "cache"
  said = train(tmp_path / "whole", cache, *words, steps=8)
  assert "mixture            50% letters: " in said
  train(tmp_path / "parts", cache, *words, steps=6)
  train(tmp_path / "parts", cache, *words, steps=8)

  def lines_of(name):
    lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
    unsure = re.compile("seconds|per_s|mfu")
    kept = [{k: v for k, v in x.items() if not unsure.search(k)} for x in lines]
    return [x for x in kept if "train/loss" in x]

  whole = lines_of("whole")
  assert whole == lines_of("parts")
  last = whole[-1]
  assert (last["train/share/letters"], last["train/share/signs"]) == (0.5, 0.25)
  rows = {part.label: len(part.rows) for part in pipeline.load_rows(mixed, "train").parts}
  assert last["train/epochs/digits"] == pytest.approx(16 / rows["digits"])
  said, result = evaluate(tmp_path / "whole", f"--cache_dir={cache}")
  assert set(result["domains"]) == {"letters", "digits", "signs"} and "validation set of" in said
  path = tmp_path / "letters"
  said, _ = evaluate(tmp_path / "whole", f"--cache_dir={cache}", f"--data.path={path}")
  assert f"validation set of text {path}" in said
