"""The delta rule in chunks equals the rule token by token, in each document of a row by itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.kernels import delta_rule

B, O, I, X = 2, 3, 4, 5  # noqa: E741


@functools.cache
def inputs(L):
  """Keys of length 1, and rates of forgetting from nearly none to nearly all."""
  rng = np.random.default_rng(0)
  q, k = (rng.normal(size=(B, L, O, I)) for _ in range(2))
  k /= np.linalg.norm(k, axis=-1, keepdims=True)
  v, cotangent = (rng.normal(size=(B, L, O, X)) for _ in range(2))
  decay = -np.exp(rng.uniform(-6, 3, size=(B, L, O)))
  beta = rng.uniform(size=(B, L, O))
  tokens = delta_rule.DeltaInputs(*map(np.float32, (q, k, v, decay, beta)))
  return tokens, np.float32(cotangent), np.float32(rng.normal(size=(B, O, I, X)))


def oracle(tokens, segments_BL, memory):
  """The formula of the module's docstring, in float64."""
  q, k, v, decay, beta = (np.float64(x) for x in tokens)
  y, memory = np.zeros_like(v), np.float64(memory).copy()
  for b, t, o in np.ndindex(v.shape[:3]):
    if t and segments_BL[b, t] != segments_BL[b, t - 1]:
      memory[b, o] = 0
    S = np.exp(decay[b, t, o]) * memory[b, o]
    S = S + beta[b, t, o] * np.outer(k[b, t, o], v[b, t, o] - k[b, t, o] @ S)
    memory[b, o], y[b, t, o] = S, q[b, t, o] @ S
  return y, memory


def segments(L):
  """One row of a single document, one whose documents begin anywhere."""
  cuts = np.random.default_rng(1).choice(np.arange(1, L), min(4, L - 1), replace=False)
  return np.stack([np.ones(L, int), 1 + np.searchsorted(np.sort(cuts), np.arange(L), "right")])


@pytest.mark.parametrize("L", [2, 7, 64, 65, 150])
def test_chunks_equal_the_formula(L):
  (tokens, _, memory), segments_BL = inputs(L), segments(L)
  y_BLOX, after = delta_rule.chunked(tokens, jnp.asarray(segments_BL), memory)
  want_BLOX, want_after = oracle(tokens, segments_BL, memory)
  # A head that forgets much loses no digits of what it keeps.
  np.testing.assert_allclose(y_BLOX, want_BLOX, rtol=0, atol=5e-7 * np.abs(want_BLOX).max())
  np.testing.assert_allclose(after, want_after, rtol=0, atol=5e-7 * np.abs(want_after).max())


def test_the_gradients_are_those_of_the_steps():
  """Of one document, since `step` knows no other."""
  L = 70
  tokens, cotangent, memory = inputs(L)

  def by_chunks(tokens, memory):
    y, after = delta_rule.chunked(tokens, jnp.ones((B, L), jnp.int32), memory)
    return jnp.sum(y * cotangent) + jnp.sum(after)

  def by_steps(tokens, memory):
    y = []
    for t in range(L):
      of_t, memory = delta_rule.step(jax.tree.map(lambda x, t=t: x[:, t : t + 1], tokens), memory)
      y.append(of_t)
    return jnp.sum(jnp.concatenate(y, axis=1) * cotangent) + jnp.sum(memory)

  got, want = (jax.jit(jax.grad(f, (0, 1)))(tokens, memory) for f in (by_chunks, by_steps))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_a_document_has_the_gradients_that_it_has_alone():
  """And none from other documents."""
  L, cut = 80, 37
  tokens, cotangent, _ = inputs(L)
  nothing = jnp.zeros((B, O, I, X))
  both_BL = np.where(np.arange(L) < cut, 1, 2) * np.ones((B, 1), np.int32)

  def loss(tokens, segments_BL, cotangent):
    return jnp.sum(delta_rule.chunked(tokens, jnp.asarray(segments_BL), nothing)[0] * cotangent)

  def part(x):
    return x[:, cut:]

  late = np.arange(L)[None, :, None, None] >= cut
  got = jax.grad(loss)(tokens, both_BL, np.float32(late * cotangent))
  alone = jax.grad(loss)(jax.tree.map(part, tokens), part(both_BL), part(cotangent))
  for a, b in zip(got, alone, strict=True):
    np.testing.assert_allclose(a[:, :cut], 0, atol=1e-5)  # sums of decays that cancel
    np.testing.assert_allclose(part(a), b, rtol=1e-3, atol=1e-4)


def test_the_convolution_stays_in_its_document_and_goes_on():
  rng = np.random.default_rng(2)
  U, C, L = 6, 4, 11
  x, weight = np.float32(rng.normal(size=(B, L, U))), np.float32(rng.normal(size=(U, C)))
  segments_BL = np.stack([np.repeat([1, 2, 3], [5, 2, 4]), np.ones(L, int)])
  want = np.zeros_like(x)
  for b, t, tap in np.ndindex(B, L, C):
    source = t - (C - 1) + tap
    if source >= 0 and segments_BL[b, source] == segments_BL[b, t]:
      want[b, t] += x[b, source] * weight[:, tap]
  start = jnp.zeros((B, C - 1, U))
  whole, _ = delta_rule.convolve(x, weight, jnp.asarray(segments_BL), start)
  np.testing.assert_allclose(whole, want, rtol=1e-5, atol=1e-6)
  parts, recent = [], start
  for begin, end in ((0, 2), (2, 9), (9, 10), (10, 11)):
    piece, recent = delta_rule.convolve(
      x[:, begin:end], weight, jnp.asarray(segments_BL[:, begin:end]), recent
    )
    parts.append(piece)
  # A part's first token goes on with what came before, so the cuts lie inside of documents.
  np.testing.assert_allclose(np.concatenate(parts, axis=1), want, rtol=1e-5, atol=1e-6)
