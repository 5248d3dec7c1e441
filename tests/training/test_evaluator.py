"""Evaluation: rows that stand for their split, sums of documents and domains, the bias."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.data import pipeline, tokenizers
from moe_jax.kernels.cross_entropy import token_nll
from moe_jax.training import evaluator
from tests.support.toy_text import S, read, toy_model, toy_rows
from tests.support.toys import biased_config, mesh_of, set_up, toy_batch, toy_config


def rows_of(documents: list[np.ndarray], seq_len: int = 9) -> pipeline.Rows:
  """Rows of documents whose ids stand for one byte each."""
  tokenizer = tokenizers.Tokenizer([bytes([65 + i]) for i in range(S)] + [b""], S, "toy")
  starts_M = np.cumsum([0, *(len(ids) + 1 for ids in documents[:-1])])
  return pipeline.Rows(
    stream_N=np.concatenate([*(x for ids in documents for x in ([S], ids)), [S]]),
    seq_len=seq_len,
    tokenizer=tokenizer,
    num_documents=len(documents),
    num_bytes=sum(map(len, documents)),
    digest="",
    starts_M=starts_M,
    domain_M=np.full(len(documents), -1),
    source_M=10 + np.arange(len(documents)),
  )


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
  # In rows that end with a document, which count a byte less than their inputs.
  some = evaluator.Evaluator(config, rows, mesh_of(), 0)
  targets_BL = rows.batch(range(len(rows))).targets_BL
  some.numbers = np.flatnonzero(targets_BL[:, -1] == S)
  num_bytes = some.total(state.params, state.bias_ZE).num_bytes
  assert num_bytes == np.count_nonzero(targets_BL[some.numbers] != S)


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
    "loss": pytest.approx(0.6),
    "bits_per_byte": pytest.approx(6 / np.log(2) / 9),
    "tokens": 10,
    "bytes": 9,
  }


def test_sums_are_wider_than_32_bits():
  """What 2.2e9 tokens would overflow as int32, and lose the last digits of as float32."""
  many = evaluator._wide(np.int32(2**31 - 1))
  assert many + many == 2**32 - 2
  nats = evaluator._wide(np.float32(2**30))
  assert nats + 1 - nats == 1
  assert json.dumps(float(nats)) == "1073741824.0"


def test_bias_is_used_and_not_moved_by_evaluation():
  config = biased_config()
  mesh, state, _ = set_up(config, {})
  batch, bytes_V = toy_batch(config), np.ones(24, np.int32)
  push_ZE = np.zeros((2, 4), np.float32)
  push_ZE[:, 1] = 10  # every token's first choice
  with jax.set_mesh(mesh):
    run = jax.jit(
      lambda bias: evaluator.eval_step(state.params, bias, batch, bytes_V, model=config.model)[0]
    )
    plain, pushed = run(state.bias_ZE), run(jnp.array(push_ZE))
  tokens_Z = np.asarray(plain.moe.tokens)
  assert (np.asarray(plain.moe.routed_E)[:, 1] < tokens_Z).all()
  np.testing.assert_array_equal(np.asarray(pushed.moe.routed_E)[:, 1], tokens_Z)


def test_loss_of_each_domain(one_device):
  """Against sums over documents in Python; a document of no domain is in the whole alone."""
  config = toy_config({"eval.batch_size": 4})
  mesh, rows = mesh_of(), toy_rows([20, 3, 9, 14], [0, 1, -1, 0], domains=("a", "b", "never"))
  model = toy_model(config)
  one = evaluator.Evaluator(config, rows, mesh, 0)
  total = one.total(model.params, model.bias_ZE, by_document=True)
  domains = one.by_domain(total.documents)
  assert list(domains) == ["a", "b"]
  # Nats of each target in the order of the stream; document d has lengths[d] + 1 of them.
  batch = rows.batch(range(len(rows)))
  logits_BLV = read(model, batch)[0]
  nll_N = np.asarray(token_nll(logits_BLV, batch.targets_BL)[0])[batch.segments_BL > 0]
  targets_N = rows.stream_N[1:]
  pieces = np.split(np.arange(len(targets_N)), np.cumsum([21, 4, 10]))
  for name, members in {"a": [0, 3], "b": [1]}.items():
    where = np.concatenate([pieces[d] for d in members])
    num_bytes = sum(int(i) % 3 if i != S else 0 for i in targets_N[where])
    found = domains[name]
    assert (found["tokens"], found["bytes"]) == (len(where), num_bytes)
    assert found["loss"] == pytest.approx(nll_N[where].mean(), rel=1e-5)
    bits = nll_N[where].sum() / np.log(2) / num_bytes
    assert found["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
  assert (
    total.sums.targets == len(targets_N) == domains["a"]["tokens"] + domains["b"]["tokens"] + 10
  )
