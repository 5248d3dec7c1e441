"""How often each token is drawn."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.inference import sampling

TOP = np.array([-1.5, 0.25, 3.0, 2.999, -50.0, 3.5], np.float32)


def drawn(logits, number_of_rows, **options):
  draw, kind = sampling.options(vocab_size=len(logits), **dict(top_k=0, top_p=1.0) | options)
  rows = jnp.tile(jnp.asarray(logits)[None], (number_of_rows, 1))
  return np.asarray(sampling.sample(rows, 0, 0, draw, kind, 5))  # id 5 is not the tokenizer's


@pytest.mark.parametrize("temperature", [1e-45, 1e-39, 1e-38, 1e-30, 1e-6])
@pytest.mark.parametrize("filters", [{}, dict(top_k=3), dict(top_p=0.9), dict(top_k=4, top_p=0.5)])
def test_a_temperature_near_zero_takes_the_most_probable_token(temperature, filters):
  """As 0 does, also where float32 has no such number, or logits over it are none."""
  with np.errstate(all="raise"):
    got = drawn(TOP, 50, temperature=temperature, **filters)
  assert got.tolist() == [2] * 50 == drawn(TOP, 50, temperature=0.0, **filters).tolist()


@pytest.mark.parametrize("temperature", [1e30, 1e39, 1e300])
@pytest.mark.parametrize(
  ("filters", "ids"),
  [
    ({}, range(5)),
    (dict(top_k=3), [1, 2, 3]),
    (dict(top_p=0.5), [1, 2, 3]),
  ],
)
def test_a_huge_temperature_draws_every_token_alike(temperature, filters, ids):
  """Of the tokenizer's, and with filters of those that they keep."""
  with np.errstate(all="raise"):
    got = np.bincount(drawn(TOP, 2000, temperature=temperature, **filters), minlength=6)
  expected = [1 / len(ids) if i in ids else 0 for i in range(6)]
  np.testing.assert_allclose(got / 2000, expected, atol=0.05)


def chances(logits, **options):
  """How often each id is drawn, of 20,000 rows."""
  n = 20_000
  options = dict(temperature=1.0, top_k=0, top_p=1.0) | options
  known = options.pop("known", 24)
  draw, kind = sampling.options(**options, vocab_size=len(logits))
  rows = jnp.tile(jnp.asarray(logits)[None], (n, 1))
  drawn = sampling.sample(rows, 0, 0, draw, kind, known)
  return np.bincount(drawn, minlength=len(logits)) / n


@pytest.mark.parametrize(("options", "expected"), [
  ({}, [0.4, 0.3, 0.2, 0.1]),
  (dict(temperature=0.5), [16 / 30, 9 / 30, 4 / 30, 1 / 30]),  # squares
  (dict(top_k=2), [4 / 7, 3 / 7, 0, 0]),
  (dict(top_p=0.65), [4 / 7, 3 / 7, 0, 0]),
  (dict(top_p=0.75), [4 / 9, 3 / 9, 2 / 9, 0]),
  (dict(top_p=1e-6), [1, 0, 0, 0]),
  (dict(top_k=3, top_p=0.5), [4 / 7, 3 / 7, 0, 0]),  # 4/9, 3/9, 2/9 before top_p
  (dict(known=2), [4 / 7, 3 / 7, 0, 0]),  # ids past the tokenizer's
], ids=str)  # fmt: skip
def test_tokens_are_drawn_as_often_as_by_hand(options, expected):
  drawn = chances(np.log([0.4, 0.3, 0.2, 0.1]), **options)
  np.testing.assert_allclose(drawn, expected, atol=0.015)


@pytest.mark.parametrize(("seed", "number"), [(0, 1), (1, 0)])
def test_every_token_and_every_seed_draws_numbers_of_its_own(seed, number):
  """Two draws of two even tokens agree in half of the rows, give or take 3%."""
  draw, kind = sampling.options(1.0, 0, 1.0, 2)
  rows = jnp.zeros((1000, 2))
  first, other = (sampling.sample(rows, *of, draw, kind, 2) for of in ((0, 0), (seed, number)))
  assert 0.4 < np.mean(np.asarray(first == other)) < 0.6
