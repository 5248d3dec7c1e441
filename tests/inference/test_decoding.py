"""Prefill and decoding through the cache against the full forward pass."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax import config as config_lib
from moe_jax.config import Dispatch
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


@pytest.mark.parametrize("name", slow_unless(("deepseek", "dense"), MODELS))
def test_prefill_and_decode_equal_the_full_forward(name):
  """Prompts of different lengths in one batch, then token after token through the cache."""
  qk_norm = name == "deepseek"
  changes = dict(qk_norm=qk_norm, tied_head=name == "switch")
  if name == "dense":  # scaled by hand, as no router is
    changes["qk_norm"] = True
  ours, trained = model_of(name, **changes)
  rows, prompts = rows_of((9, 14, 11)), (3, 8, 5)
  want = full_forward(ours.model, trained, rows)
  tokens_BL = np.zeros((4, 8), np.int32)
  start_B = np.array([5, 0, 3, 10_000], np.int32)  # the last row is padding
  for b, length in enumerate(prompts):
    tokens_BL[b, 8 - length :] = rows[b][:length]
  forward = jax.jit(
    functools.partial(decoding.forward, model=ours.model), static_argnames="all_logits"
  )
  with jax.set_mesh(mesh_of()):
    cache = empty_cache(ours.model, start_B, 32)
    logits, cache, _ = forward(
      ours.weights, cache=cache, tokens_BL=jnp.asarray(tokens_BL), all_logits=True
    )
    for b, length in enumerate(prompts):
      np.testing.assert_allclose(logits[b, 8 - length :], want[b][:length], rtol=2e-4, atol=2e-4)
    for step in range(6):
      at = [length + step for length in prompts]
      token_B1 = [[rows[b][at[b]]] for b in range(3)] + [[0]]
      logits, cache, _ = forward(
        ours.weights, cache=cache, tokens_BL=jnp.asarray(token_B1, jnp.int32), all_logits=False
      )
      for b in range(3):
        np.testing.assert_allclose(logits[b, 0], want[b][at[b]], rtol=2e-4, atol=2e-4)
  assert np.isfinite(np.asarray(logits)).all()  # the padding too


@pytest.mark.parametrize(
  ("dispatch", "factor"),
  [
    (Dispatch.GATHER, 0.25),
    pytest.param(Dispatch.EINSUM, 1.0, marks=pytest.mark.slow),
    pytest.param(Dispatch.GROUPED, 0.0, marks=pytest.mark.slow),
  ],
)
def test_nothing_drops_whatever_the_training_did(dispatch, factor):
  moe = config_lib.MoE(
    num_experts=4, top_k=2, expert_dim=18, dispatch=dispatch, capacity_factor=factor,
    eval_capacity_factor=factor,
  )  # fmt: skip
  limited, trained = model_of(moe=moe)
  (row,) = rows_of((12,))
  (want,) = full_forward(limited.model, trained, [row])
  np.testing.assert_allclose(limited.logits(row), want, rtol=2e-4, atol=2e-4)


def test_only_the_chosen_experts_are_read():
  """An expert of NaN is not noticed while no token chooses it, in prefill and in decoding."""

  def poisoned(params, expert):
    flat = [
      (path, v.replace(v[...].at[:, expert].set(jnp.nan)) if str(path[-1]).endswith(("EDF", "EFD"))
       else v)
      for path, v in nnx.to_flat_state(params)
    ]  # fmt: skip
    return nnx.from_flat_state(flat)

  # A bias decides alone: experts 0 and 1 for every token.
  ours, (_, params, _) = model_of(moe=dataclasses.replace(
    toy_config().model.moe, bias_update_rate=1e-3))  # fmt: skip
  chosen = jnp.tile(jnp.array([[9.0, 9.0, 0.0, 0.0]]), (2, 1))
  found = []
  with jax.set_mesh(mesh_of()):
    for expert in (None, 2, 3, 1):
      changed = params if expert is None else poisoned(params, expert)
      ours.weights = decoding.weights(ours.model, changed, chosen)
      tokens = greedy(ours, ["abc", "de"], max_new_tokens=8)
      found.append((tokens, ours.logits([1, 2, 3])))
  for tokens, logits in found[1:3]:
    assert tokens == found[0][0]
    np.testing.assert_array_equal(logits, found[0][1])
  assert not np.isfinite(found[3][1]).any()
