"""Every attention kernel computes the reference, and says which sizes it cannot take."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import sharding
from moe_jax.config import Attention
from moe_jax.kernels import attention, attention_cudnn, attention_splash, context
from moe_jax.kernels.mask import CAUSAL, Mask
from tests.support.toys import mesh_of, slow_unless

# What a kernel is on a CPU: the library's own code where it is interpreted, and for cuDNN
# everything but cuDNN itself.
KERNELS = {
  "blocks": attention.ATTENTION_KERNELS[Attention.BLOCKS].function,
  "splash": functools.partial(attention_splash.splash_attention, interpret=True),
  "cudnn": functools.partial(attention_cudnn.cudnn_attention, implementation="xla"),
}
# float32: sums in another order. bfloat16 keeps 8 bits, and a kernel rounds the weights before or
# after it normalises them: 2^-8 of the largest values, which are near 4.
TOLERANCE = {"float32": 2e-5, "bfloat16": 3e-2}
SIZES = {
  "grouped": (2, 128, 4, 2, 16),
  "one_kv_head": (2, 128, 3, 1, 8),
  "a_head_each": (1, 640, 2, 2, 24),
  "odd": (3, 37, 6, 2, 10),
}  # B, L, H, G, A; 640 tokens are five blocks of splash


def inputs_of(sizes, dtype, seed=0):
  """q, k, v, dy and the segments: documents of uneven lengths, padding last, one row without."""
  B, L, H, G, A = sizes
  random = np.random.default_rng(seed)
  q, k, v, dy = (jnp.asarray(random.normal(size=(B, L, heads, A)), dtype) for heads in (H, G, G, H))
  segments = np.zeros((B, L), np.int32)
  for row in range(B):
    real = L if row == 0 else L - L // 5
    starts = np.zeros(real, bool)
    starts[[0, *random.choice(real, 5 + row, replace=False)]] = True
    segments[row, :real] = np.cumsum(starts)
  return (q, k, v), dy, jnp.asarray(segments)


def by_hand(q, k, v, segments, window=10**6, sinks=None, cap=1e9):
  """NumPy, float64, one query after another."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  y = np.zeros_like(q)
  for row, query, h in itertools.product(*map(range, q.shape[:3])):
    head = h // (q.shape[2] // k.shape[2])
    seen = np.flatnonzero(segments[row, : query + 1] == segments[row, query])
    seen = seen[seen > query - window]
    scores = k[row, seen, head] @ q[row, query, h] / np.sqrt(q.shape[3])
    weights = np.exp(cap * np.tanh(scores / cap))
    total = weights.sum() + (0 if sinks is None else np.exp(sinks[h]))
    y[row, query, h] = weights @ v[row, seen, head] / total
  return y


def values_and_gradients(attend, qkv, dy, segments, mask=CAUSAL):
  """Of y, q, k, v, and of the sinks if there are some."""
  if mask.sinks_H is None:
    y, pull = jax.vjp(lambda q, k, v: attend(q, k, v, segments, mask), *qkv)
  else:
    with_sinks = lambda q, k, v, s: attend(q, k, v, segments, mask._replace(sinks_H=s))  # noqa: E731
    y, pull = jax.vjp(with_sinks, *qkv, mask.sinks_H)
  return y, *pull(dy)


def run(attend, sizes, dtype, mask, sinks):
  qkv, dy, segments = inputs_of(sizes, dtype)
  mask = mask._replace(sinks_H=jnp.linspace(-1.0, 3.0, sizes[2]) if sinks else None)
  return jax.jit(lambda *arrays: values_and_gradients(attend, *arrays, mask))(qkv, dy, segments)


@functools.cache
def of_reference(*case):
  """Once for all kernels."""
  return jax.device_get(run(attention.reference_attention, *case))


def check_equal(attend, sizes, dtype, mask=CAUSAL, sinks=False):
  expected = of_reference(sizes, dtype, mask, sinks)
  actual = run(attend, sizes, dtype, mask, sinks)
  for name, a, e in zip(("y", "dq", "dk", "dv", "dsinks"), actual, expected, strict=False):
    assert a.dtype == e.dtype == (jnp.float32 if name == "dsinks" else dtype)
    a, e = np.asarray(a, np.float32), np.asarray(e, np.float32)
    assert np.max(np.abs(a - e)) <= TOLERANCE[dtype] * np.max(np.abs(e)), name


def test_reference_is_attention():
  qkv, _, segments = inputs_of(SIZES["odd"], "float32")
  y = attention.reference_attention(*qkv, segments)
  np.testing.assert_allclose(y, by_hand(*qkv, np.asarray(segments)), atol=1e-5)  # float32
  sinks = np.linspace(-2, 2, 6)
  y = attention.reference_attention(*qkv, segments, Mask(5, 0.5, jnp.asarray(sinks)))
  np.testing.assert_allclose(y, by_hand(*qkv, np.asarray(segments), 5, sinks, 0.5), atol=1e-5)


CASES = [(name, sizes, "float32") for name in KERNELS for sizes in SIZES]
CASES.remove(("splash", "odd", "float32"))  # it refuses 37 tokens: test_refuses


@pytest.mark.parametrize(
  ("name", "sizes", "dtype"), [*CASES, *((name, "grouped", "bfloat16") for name in KERNELS)]
)
def test_kernel_equals_reference(name, sizes, dtype):
  check_equal(KERNELS[name], SIZES[sizes], dtype)


@pytest.mark.parametrize("window", slow_unless([7], [2, 7, 100]))
@pytest.mark.parametrize("name", KERNELS)
def test_a_window_equals_reference(name, window):
  """Shorter than a block of queries, and longer than one."""
  check_equal(KERNELS[name], SIZES["grouped"], "float32", Mask(window), sinks=name != "cudnn")


@pytest.mark.parametrize("window", [0, 7])
@pytest.mark.parametrize("name", ["blocks", "splash"])
def test_a_soft_cap_equals_reference(name, window):
  """Small enough that most scores are near it."""
  check_equal(KERNELS[name], SIZES["grouped"], "float32", Mask(window, soft_cap=0.5))


@pytest.mark.parametrize("name", ["splash", "cudnn"])
def test_on_a_mesh(name):
  """Each device its own sequences and heads; the values and gradients of one device."""
  with jax.set_mesh(mesh_of(data=2, expert=2, tensor=2)):
    check_equal(KERNELS[name], (4, 128, 4, 2, 16), "float32", sinks=name == "splash")

    qkv, _, segments = inputs_of((4, 128, 4, 2, 16), "float32")
    placed = [sharding.constrain(x, "BLHA") for x in qkv]
    hlo = jax.jit(KERNELS[name]).lower(*placed, segments).compile().as_text()
    assert not any(op in hlo for op in ("all-gather", "all-to-all", "all-reduce")), name


@pytest.mark.parametrize("name", ["reference", "splash"])
@pytest.mark.parametrize("mask", [CAUSAL, Mask(200, soft_cap=0.5)])
def test_parts_of_sequences_equal_reference(name, mask):
  """A part's two pieces are two and a half blocks of splash each, a window is longer than one."""
  kernel = KERNELS.get(name, attention.reference_attention)

  def attend(q, k, v, segments, mask):
    rows = context.split((q, k, v, segments))
    return context.join(context.over_sequences(kernel)(*rows, mask))

  with jax.set_mesh(mesh_of(context=2, tensor=2)):
    check_equal(attend, (1, 1280, 4, 2, 8), "float32", mask, sinks=True)


@pytest.mark.parametrize("name", ["splash", "cudnn"])
def test_another_document_is_not_seen(name):
  """Not even with the greatest scores that bfloat16 models reach: equality, not a tolerance."""
  (q, k, v), dy, segments = inputs_of((1, 128, 2, 2, 16), "bfloat16")
  first = np.asarray(segments)[0] == 1
  other = first[None, :, None, None]
  attend = jax.jit(functools.partial(values_and_gradients, KERNELS[name]))
  quiet = attend((q, k, v), dy, segments)
  loud = attend((q, jnp.where(other, 300 * k, k), jnp.where(other, -v, v)), dy, segments)
  for a, b in zip(quiet, loud, strict=True):
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    np.testing.assert_array_equal(a[:, ~first], b[:, ~first])
  assert not np.array_equal(np.asarray(quiet[0])[:, first], np.asarray(loud[0])[:, first])


def test_many_documents_differ():
  """As many as a row has tokens, which the code of a document must tell apart."""
  (q, k, v), _, _ = inputs_of((1, 300, 2, 1, 8), "float32")
  segments = jnp.arange(1, 301, dtype=jnp.int32)[None]
  y = KERNELS["cudnn"](q, k, v, segments)
  np.testing.assert_array_equal(y, jnp.repeat(v, 2, axis=2))  # each token sees itself


def test_refuses():
  refusal = {name: kernel.refuses for name, kernel in attention.ATTENTION_KERNELS.items()}
  q, k = (2, 256, 8, 64), (2, 256, 4, 64)
  for name in attention.ATTENTION_KERNELS:
    assert refusal[name](q, k, jnp.bfloat16, CAUSAL) == "", name
  assert "37 tokens" in refusal[Attention.SPLASH](
    (2, 37, 8, 64), (2, 37, 4, 64), jnp.bfloat16, CAUSAL
  )
  assert "float32" in refusal[Attention.CUDNN](q, k, jnp.float32, CAUSAL)
  for name in (Attention.CUDNN, Attention.SPLASH):
    assert refusal[name](q, k, jnp.bfloat16, Mask(128)) == ""
  sinks = Mask(sinks_H=jnp.zeros(8))
  assert "sinks" in refusal[Attention.CUDNN](q, k, jnp.bfloat16, sinks)
  assert refusal[Attention.SPLASH](q, k, jnp.bfloat16, sinks) == ""
  assert "soft_cap" in refusal[Attention.CUDNN](q, k, jnp.bfloat16, Mask(soft_cap=50.0))
  assert "head_dim=60" in refusal[Attention.CUDNN](
    (2, 256, 8, 60), (2, 256, 4, 60), jnp.bfloat16, CAUSAL
  )
  assert "head_dim=256" in refusal[Attention.CUDNN](
    (2, 256, 8, 256), (2, 256, 4, 256), jnp.bfloat16, CAUSAL
  )


@pytest.mark.parametrize(
  ("platform", "length", "dtype", "name", "says"),
  [
    ("cpu", 37, jnp.float32, Attention.BLOCKS, "blocks"),
    ("tpu", 256, jnp.bfloat16, Attention.SPLASH, "splash"),
    ("tpu", 37, jnp.bfloat16, Attention.REFERENCE, "splash refuses a sequence of 37 tokens"),
    ("gpu", 256, jnp.bfloat16, Attention.CUDNN, "cudnn"),
    ("gpu", 256, jnp.float32, Attention.REFERENCE, "cudnn refuses float32"),
    ("abacus", 256, jnp.float32, Attention.REFERENCE, "no kernel is made for abacus"),
  ],
)
def test_choose(platform, length, dtype, name, says):
  shapes = (2, length, 8, 64), (2, length, 4, 64)
  chosen, line = attention.choose_attention(platform, *shapes, dtype, CAUSAL)
  assert chosen == name
  assert says in line and "\n" not in line
