"""Prefill and decoding through the cache against the full forward pass."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.config import Dispatch, MoE, QKNorm
from moe_jax.inference import decoding
from tests.support.generation import (
  MODELS,
  empty_cache,
  full_forward,
  greedy,
  model_of,
  rows_of,
)
from tests.support.toys import mesh_of, slow_unless, toy_config

PROMPTS, STEPS = (3, 8, 5), 6  # tokens of three rows, and how many more follow one by one


@pytest.mark.parametrize("name", slow_unless(("deepseek", "dense"), MODELS))
def test_prefill_and_each_decoded_token_equal_the_full_forward(name, one_device):
  """Prompts of different lengths in one batch, then token after token through the cache."""
  # The dense model's norms are scaled by hand, as it has no router to be uneven.
  qk_norm = QKNorm.HEAD if name in ("deepseek", "dense") else QKNorm.NONE
  ours, trained = model_of(name, qk_norm=qk_norm, tied_head=name == "switch")
  rows = rows_of((9, 14, 11))
  full = full_forward(trained, rows)
  tokens_BL = np.zeros((4, 8), np.int32)
  start_B = np.array([5, 0, 3, 10_000], np.int32)  # the last row is padding
  for b, length in enumerate(PROMPTS):
    tokens_BL[b, 8 - length :] = rows[b][:length]
  forward = jax.jit(
    functools.partial(decoding.forward_with_cache, model=ours.model), static_argnames="all_logits"
  )
  cache = empty_cache(ours.model, start_B, 32)
  out = forward(ours.weights, cache=cache, tokens_BL=jnp.asarray(tokens_BL), all_logits=True)
  for b, length in enumerate(PROMPTS):
    got_LV, want_LV = out.logits_BLV[b, 8 - length :], full[b][:length]
    np.testing.assert_allclose(got_LV, want_LV, rtol=2e-4, atol=2e-4)
  for step in range(STEPS):
    token_B1 = [[rows[b][length + step]] for b, length in enumerate(PROMPTS)] + [[0]]
    out = forward(
      ours.weights, cache=out.cache, tokens_BL=jnp.asarray(token_B1, jnp.int32), all_logits=False
    )
    for b, length in enumerate(PROMPTS):
      got_V, want_V = out.logits_BLV[b, 0], full[b][length + step]
      np.testing.assert_allclose(got_V, want_V, rtol=2e-4, atol=2e-4)
  assert np.isfinite(out.logits_BLV).all()  # of the row of padding, too


@pytest.fixture(scope="module")
def windows():
  return model_of("options")


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 2, 7])
def test_a_layer_with_a_window_keeps_its_tokens_alone(length, windows, one_device):
  """The prompt is shorter or longer than the window of 4, which moves on three times."""
  ours, trained = windows
  (row,) = rows_of((length + 12,))
  (full_LV,) = full_forward(trained, [row])
  forward = jax.jit(
    functools.partial(decoding.forward_with_cache, model=ours.model, all_logits=False)
  )
  cache, tokens = empty_cache(ours.model, [0], 32), row[:length]
  assert [layer.keys.shape[-2] for layer in cache.layers] == [4, 32]
  for last in range(length - 1, len(row) - 1):
    out = forward(ours.weights, cache=cache, tokens_BL=jnp.asarray([tokens], jnp.int32))
    np.testing.assert_allclose(out.logits_BLV[0, 0], full_LV[last], rtol=2e-4, atol=2e-4)
    cache, tokens = out.cache, row[last + 1 : last + 2]


@pytest.mark.parametrize(
  ("dispatch", "factor"),
  [
    (Dispatch.GATHER, 0.25),
    pytest.param(Dispatch.EINSUM, 1.0, marks=pytest.mark.slow),
    pytest.param(Dispatch.GROUPED, 1.0, marks=pytest.mark.slow),
  ],
)
def test_nothing_drops_whatever_the_training_did(dispatch, factor):
  moe = MoE(
    num_experts=4,
    top_k=2,
    expert_dim=18,
    dispatch=dispatch,
    capacity_factor=factor,
    eval_capacity_factor=factor,
  )
  limited, trained = model_of(moe=moe)
  (row,) = rows_of((12,))
  (want,) = full_forward(trained, [row])
  np.testing.assert_allclose(limited.logits(row), want, rtol=2e-4, atol=2e-4)


class Answer(NamedTuple):
  tokens: list[list[int]]
  logits_LV: np.ndarray


def with_nan(params, expert):
  """Every weight of an expert is NaN."""
  flat = [
    (
      path,
      v.replace(v[...].at[:, expert].set(jnp.nan)) if str(path[-1]).endswith(("EDF", "EFD")) else v,
    )
    for path, v in nnx.to_flat_state(params)
  ]
  return nnx.from_flat_state(flat)


@pytest.fixture(scope="module")
def answer():
  """A function of the expert that is NaN, or of -1; experts 0 and 1 are chosen for every token."""
  moe = dataclasses.replace(toy_config().model.moe, bias_update_rate=1e-3)
  ours, trained = model_of(moe=moe)
  bias_ZE = jnp.tile(jnp.array([[9.0, 9.0, 0.0, 0.0]]), (2, 1))  # it decides alone

  def answer_of(expert):
    with jax.set_mesh(mesh_of()):
      params = trained.params if expert < 0 else with_nan(trained.params, expert)
      ours.weights = decoding.weights(ours.model, params, bias_ZE)
      return Answer(greedy(ours, ["abc", "de"], max_new_tokens=8), ours.logits([1, 2, 3]))

  return answer_of


@pytest.mark.parametrize("expert", [2, 3])
def test_an_expert_that_no_token_chooses_is_not_read(expert, answer):
  """In prefill and in decoding: its NaN would show."""
  got, want = answer(expert), answer(-1)
  assert got.tokens == want.tokens
  np.testing.assert_array_equal(got.logits_LV, want.logits_LV)


def test_an_expert_that_every_token_chooses_is_read(answer):
  assert not np.isfinite(answer(1).logits_LV).any()
