"""How often each token is drawn."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.inference import sampling


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
