"""Validation stands for its split, and its error bars for its documents."""

import json

import jax
import numpy as np
import pytest

from moe_jax.data import pipeline, tokenizers
from moe_jax.training import evaluator
from tests.support.toys import mesh_of, set_up, toy_batch, toy_config

S = 23  # the separator; the other ids stand for one byte each


def rows_of(documents: list[np.ndarray], seq_len: int = 9) -> pipeline.Rows:
  tokenizer = tokenizers.Tokenizer([bytes([65 + i]) for i in range(S)] + [b""], S, "toy")
  starts_M = np.cumsum([0, *(len(ids) + 1 for ids in documents[:-1])])
  return pipeline.Rows(
    stream_N=np.concatenate([*(x for ids in documents for x in ([S], ids)), [S]]),
    seq_len=seq_len, tokenizer=tokenizer, num_documents=len(documents),
    num_bytes=sum(map(len, documents)), digest="", starts_M=starts_M,
    domain_M=np.full(len(documents), -1), source_M=10 + np.arange(len(documents)),
  )  # fmt: skip


@pytest.fixture(scope="module")
def trained():
  """(config, state) of a model that knows the token 5 follows the token 5, and little else."""
  config = toy_config()
  mesh, state, step = set_up(config, {})
  easy = toy_batch(config)
  easy = easy._replace(
    tokens_BL=np.full((8, 9), 5, np.int32), targets_BL=np.full((8, 9), 5, np.int32)
  )
  with jax.set_mesh(mesh):
    for _ in range(20):
      state, _ = step(state, easy)
  return config, state


def split_of_halves() -> pipeline.Rows:
  rng = np.random.default_rng(0)
  easy = [np.full(int(n), 5) for n in rng.integers(50, 150, 20)]
  hard = [rng.integers(0, S, int(n)) for n in rng.integers(50, 150, 20)]
  return rows_of(easy + hard)


def test_a_few_rows_give_the_loss_of_a_split_with_an_easy_and_a_hard_half(trained, one_device):
  config, state = trained
  rows = split_of_halves()

  def loss(numbers):
    some = evaluator.Evaluator(config, rows, mesh_of(), 0)
    some.numbers = numbers
    return some(state.params, state.bias_ZE)["bits_per_byte"]

  whole = loss(range(len(rows)))
  chosen = evaluator.Evaluator(config, rows, mesh_of(), 8)
  assert len(chosen.numbers) == 64 < len(rows) / 6
  assert chosen(state.params, state.bias_ZE)["bits_per_byte"] == pytest.approx(whole, rel=0.03)
  # The first rows, which were read before, are of the easy half alone.
  assert loss(range(64)) < 0.85 * whole


def test_gzip_is_measured_on_the_rows_of_the_evaluation(trained, one_device):
  config, state = trained
  rows = split_of_halves()
  chosen = evaluator.Evaluator(config, rows, mesh_of(), 4)
  result = chosen(state.params, state.bias_ZE)
  assert result["gzip_bits_per_byte"] == pipeline.gzip_bits_per_byte(rows, chosen.numbers)
  assert result["gzip_bits_per_byte"] != pipeline.gzip_bits_per_byte(rows, range(len(rows)))


def test_document_sums_add_up_to_the_whole(trained, one_device):
  config, state = trained
  rows = split_of_halves()
  total = evaluator.Evaluator(config, rows, mesh_of(), 0).total(
    state.params, state.bias_ZE, by_document=True
  )
  documents = total.documents
  assert documents.nll_M.sum() == pytest.approx(total.sums.nll, rel=1e-6)
  assert documents.targets_M.sum() == total.sums.targets == len(rows.stream_N) - 1
  assert documents.bytes_M.sum() == total.num_bytes == rows.num_bytes


def test_standard_error_is_that_of_drawing_other_documents():
  """Against a bootstrap: how the ratio varies when documents are drawn again."""
  rng = np.random.default_rng(0)
  bytes_M = rng.integers(100, 3000, 200)
  nll_M = bytes_M * rng.gamma(4.0, 0.3, 200)
  documents = evaluator.DocumentSums(nll_M, bytes_M + 1, bytes_M)
  draws = rng.integers(0, 200, (4000, 200))
  ratios = nll_M[draws].sum(axis=1) / np.log(2) / bytes_M[draws].sum(axis=1)
  assert evaluator.standard_error(documents) == pytest.approx(ratios.std(), rel=0.05)
  # Documents that no row touches change nothing.
  padded = evaluator.DocumentSums(*(np.concatenate([x, [0, 0]]) for x in documents))
  assert evaluator.standard_error(padded) == evaluator.standard_error(documents)


def test_largest_documents_are_named_by_their_number_in_the_split():
  rows = rows_of([np.full(n, 1) for n in (3, 9, 5)])
  documents = evaluator.DocumentSums(
    *(np.array(x) for x in ([2.0, 6.0, 4.0], [4, 10, 6], [3, 9, 5]))
  )
  (first, loss), (second, _) = evaluator.largest(rows, documents, 2)
  assert (first, second) == (11, 12)
  assert loss == {
    "loss": pytest.approx(0.6), "bits_per_byte": pytest.approx(6 / np.log(2) / 9),
    "tokens": 10, "bytes": 9,
  }  # fmt: skip


def test_sums_are_wider_than_32_bits():
  """What 2.2e9 tokens would overflow as int32, and lose the last digits of as float32."""
  many = evaluator._wide(np.int32(2**31 - 1))
  assert many + many == 2**32 - 2
  nats = evaluator._wide(np.float32(2**30))
  assert nats + 1 - nats == 1
  assert json.dumps(float(nats)) == "1073741824.0"
