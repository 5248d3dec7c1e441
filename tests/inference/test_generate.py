"""Generation: greedy and drawn tokens, batches, meshes, compiled programs, and what is refused."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import Router, UserError
from moe_jax.inference import decoding, sampling
from moe_jax.kernels import per_expert
from tests.support.generation import (
  MESHES,
  empty_cache,
  full_forward,
  greedy,
  model_of,
  rows_of,
)
from tests.support.toys import mesh_of, toy_config


def test_logits_of_lists_and_batches():
  ours, trained = model_of()
  rows = rows_of((5, 5, 5))
  want = full_forward(ours.model, trained, rows)
  np.testing.assert_allclose(ours.logits(rows), want, rtol=2e-4, atol=2e-4)
  np.testing.assert_allclose(ours.logits(rows[1].tolist()), want[1], rtol=2e-4, atol=2e-4)
  assert ours.logits(rows).dtype == np.float32 and ours.logits(rows[0]).shape == (5, 24)
  for wrong in ([], [0.5], [[[1]]], [24], [-1]):
    with pytest.raises(UserError, match=r"give integers|ids are from 0 to 23"):
      ours.logits(wrong)


def test_greedy_is_the_argmax_of_the_full_forward():
  ours, trained = model_of()
  (found,) = greedy(ours, "abc", max_new_tokens=12)
  row = [23, 0, 1, 2, *found]
  (logits,) = full_forward(ours.model, trained, [row])
  assert np.argmax(logits[3:-1], axis=1).tolist() == found and len(found) == 12


ON_MESHES = [
  pytest.param("topk", "expert2-tensor2", marks=pytest.mark.slow),
  *(pytest.param("topk", name, marks=pytest.mark.slow) for name in list(MESHES)[:-1]),
  pytest.param("deepseek", "expert2-tensor2", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("model", "name"), ON_MESHES)
def test_every_mesh_draws_the_same_tokens(name, model):
  prompts = ["abc", "defghij", "k"]
  options = dict(max_new_tokens=10, seed=3, temperature=0.8)
  one, _ = model_of(model)
  other, _ = model_of(model, mesh=mesh_of(**MESHES[name]))
  assert isinstance(one.weights.layers[0].ffn.moe.experts, per_expert.PerExpert)
  assert other.weights.layers[0].ffn.moe.experts.gate_EDF.ndim == 3
  drawn = [[c.tokens for c in m.generate(prompts, **options)] for m in (one, other)]
  assert drawn[0] == drawn[1] and len({token for row in drawn[0] for token in row}) > 5


@pytest.mark.slow
def test_a_mesh_has_the_same_logits():
  one, _ = model_of()
  other, _ = model_of(mesh=mesh_of(**MESHES["expert2-tensor2"]))
  tokens = [[1, 2, 3, 4, 5]] * 2
  np.testing.assert_allclose(one.logits(tokens), other.logits(tokens), rtol=2e-4, atol=2e-4)
  prompts = ["abc", "defghij", "k"]
  assert greedy(one, prompts, max_new_tokens=10) == greedy(other, prompts, max_new_tokens=10)


@pytest.mark.slow
def test_a_row_does_not_depend_on_its_batch():
  ours, _ = model_of()
  options = dict(max_new_tokens=20, seed=5)
  alone = ours.generate(["abc"], **options)[0]
  among = ours.generate(["abc", "defghijklmnopqrst", "u"], **options)
  assert among[0] == alone and among[0].tokens != among[2].tokens
  again = ours.generate(["abc"], **options | dict(num_samples=3))
  assert again[0] == alone and len({c.text for c in again}) == 3
  assert ours.generate(["abc"], **options | dict(seed=6))[0] != alone


@pytest.mark.slow
def test_rows_end_at_the_separator_and_draw_from_the_full_forward():
  ours, trained = model_of()
  prompts = ["abc", "d", "efgh", "ijkl"]
  found = ours.generate(prompts, max_new_tokens=16, seed=1)
  rows = [[23, *ours.tokenizer.encode(c.prompt), *c.tokens] + [23] * c.finished for c in found]
  assert {c.finished for c in found} == {True, False}  # 1 of 24 ids: seed 1 has both
  draw, kind = sampling.options(1.0, 24, 1.0, 24)
  for b, (row, logits) in enumerate(
    zip(rows, full_forward(ours.model, trained, rows), strict=True)
  ):
    assert len(found[b].tokens) == 16 or found[b].finished
    assert found[b].text == "".join(chr(97 + i) for i in found[b].tokens)
    begin = 1 + len(prompts[b])
    for number, token in enumerate(row[begin:]):
      logits_BV = jnp.tile(jnp.asarray(logits[begin + number - 1])[None], (4, 1))
      drawn = sampling.sample(logits_BV, 1, number, draw, kind._replace(filtered=False), 24)
      assert drawn[b] == token


def test_one_program_for_a_bucket_and_a_cache_in_place():
  ours, _ = model_of()
  for prompt in ("a", "abcdefghij", "abc"):
    ours.generate(prompt, max_new_tokens=4)
    ours.generate(prompt, max_new_tokens=9, temperature=0.5, seed=1)
  assert ours._prefill._cache_size() == ours._decode._cache_size() == 1
  ours.generate("a" * 40, max_new_tokens=4)
  assert ours._prefill._cache_size() == ours._decode._cache_size() == 2
  with jax.set_mesh(mesh_of()):
    start, done = ours._put(np.array([0], np.int32), np.array([False]))
    cache = empty_cache(ours.model, start, 96)
    draw, kind = sampling.options(0.0, 0, 1.0, 24)
    token = jnp.zeros((1,), jnp.int32)
    arguments = (ours.weights, cache, token, done, 0, 1, 1, draw)
    program = ours._decode.lower(*arguments, kind=kind).compile().as_text()
    after, *_ = ours._decode(*arguments, kind=kind)
  assert cache.layers[0].keys.is_deleted() and int(after.length) == 1
  assert re.search(r"f32\[2,96,6\]\S* dynamic-update-slice", program)
  assert not re.search(r"= f32\[(1,)?2,96,6\]\S* copy", program)


def test_what_cannot_generate_says_why():
  moe = dataclasses.replace(toy_config().model.moe, router=Router.EXPERT_CHOICE)
  with pytest.raises(UserError, match="no later tokens yet"):
    decoding.for_inference(dataclasses.replace(toy_config().model, moe=moe))
  ours, _ = model_of()
  wrong = dict(max_new_tokens=0, temperature=-1.0, top_k=-1, top_p=0.0, num_samples=0)
  for name, value in wrong.items():
    with pytest.raises(UserError, match=f"{name}={value}"):
      ours.generate("a", **{name: value})
  with pytest.raises(UserError, match="temperature=nan"):
    ours.generate("a", temperature=float("nan"))
  with pytest.raises(UserError, match="no prompt"):
    ours.generate([])
