"""Generation: the cache against the full forward pass, sampling, meshes, and what is read."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax import config as config_lib
from moe_jax.config import Dispatch, Router, Score, UserError
from moe_jax.data import tokenizers
from moe_jax.inference import decoding, generate, sampling
from moe_jax.kernels import per_expert
from moe_jax.kernels.activation import gated
from moe_jax.model import transformer
from tests.support.toys import build, mesh_of, slow_unless, toy_config

MODELS = {
  "topk": {},
  "switch": dict(router=Router.SWITCH, top_k=1, renormalize=False),
  "deepseek": dict(
    score=Score.SIGMOID, shared_experts=1, num_experts=8, top_k=3, gate_scale=1.5,
    bias_update_rate=1e-3, expert_groups=4, top_groups=2,
  ),
  "noisy": dict(router=Router.NOISY_TOPK),
  "sinkhorn": dict(router=Router.SINKHORN),
  "hash": dict(router=Router.HASH, top_k=1, renormalize=False),
  "pattern": dict(first_dense=0, every=2),
  "first_dense": dict(first_dense=1, num_experts=5, top_k=5),
  "dense": dict(num_experts=0),
}  # fmt: skip
MESHES = {
  "expert4": dict(expert=4),
  "expert2-data2": dict(expert=2, data=2),
  "fsdp2-tensor2": dict(fsdp=2, tensor=2),
  "expert2-tensor2": dict(expert=2, tensor=2),
}


class Letters(tokenizers.Tokenizer):
  """24 ids: letters, and the separator."""

  def __init__(self):
    super().__init__([bytes([97 + i]) for i in range(23)] + [b""], 23, "letters")

  def encode(self, text):
    return np.frombuffer(text.encode(), np.uint8) - 97


def model_of(name="topk", mesh=None, **changes):
  """A generate.Model of random weights with uneven routers, and its (graph, params, bias_ZE)."""
  model = dataclasses.replace(toy_config(**MODELS[name]).model, **changes)
  config = dataclasses.replace(toy_config(), model=model)
  graph, params = build(config, 0)
  bias_ZE = 0.1 * jax.random.normal(jax.random.key(1), transformer.bias_shape(model))
  mesh = mesh or mesh_of()
  with jax.set_mesh(mesh):
    ours = decoding.for_inference(model)
    weights = decoding.weights(ours, params, bias_ZE)
  return generate.Model(ours, weights, mesh, Letters()), (graph, params, bias_ZE)


def full_forward(model, trained, rows):
  """Transformer's own logits [L, V] of each row by itself, without drops.

  Rows are padded at their end to one length, which a causal model does not see.
  """
  _, params, bias_ZE = trained

  @jax.jit
  def logits(params, bias_ZE, tokens_BL):
    positions_BL = jnp.arange(tokens_BL.shape[1], dtype=jnp.int32)[None]
    segments_BL = jnp.ones_like(tokens_BL)
    key = jax.random.key(0)
    tokens = transformer.Tokens(tokens_BL, segments_BL, positions_BL)
    return transformer.forward(model, params, bias_ZE, tokens, key, train=False).logits_BLV

  longest = max(map(len, rows))
  found = []
  with jax.set_mesh(mesh_of()):
    for row in rows:
      tokens_BL = np.zeros((1, longest), np.int32)
      tokens_BL[0, : len(row)] = row
      found.append(np.asarray(logits(params, bias_ZE, tokens_BL))[0, : len(row)])
  return found


def empty_cache(model, start_B, slots):
  make = functools.partial(decoding.empty_cache, model, slots=slots)
  return jax.jit(make)(start_B=jnp.asarray(start_B, jnp.int32))


def rows_of(lengths, seed=0):
  rng = np.random.default_rng(seed)
  return [rng.integers(0, 24, length) for length in lengths]


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
    pytest.param(Dispatch.GROUPED, 1.0, marks=pytest.mark.slow),
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


def greedy(ours, prompts, **options):
  return [c.tokens for c in ours.generate(prompts, temperature=0, **options)]


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


def chances(logits, **options):
  """How often each id is drawn, of 20,000 rows."""
  n = 20_000
  options = dict(temperature=1.0, top_k=0, top_p=1.0) | options
  known = options.pop("known", 24)
  draw, kind = sampling.options(**options, vocab_size=len(logits))
  rows = jnp.tile(jnp.asarray(logits)[None], (n, 1))
  drawn = sampling.sample(rows, 0, 0, draw, kind, known)
  return np.bincount(drawn, minlength=len(logits)) / n


def test_sampling_by_hand():
  logits = np.log([0.4, 0.3, 0.2, 0.1])
  near = functools.partial(np.testing.assert_allclose, atol=0.015)
  near(chances(logits), [0.4, 0.3, 0.2, 0.1])
  squares = np.array([16, 9, 4, 1]) / 30
  near(chances(logits, temperature=0.5), squares)
  near(chances(logits, top_k=2), [4 / 7, 3 / 7, 0, 0])
  near(chances(logits, top_p=0.65), [4 / 7, 3 / 7, 0, 0])
  near(chances(logits, top_p=0.75), [4 / 9, 3 / 9, 2 / 9, 0])
  near(chances(logits, top_p=1e-6), [1, 0, 0, 0])
  near(chances(logits, top_k=3, top_p=0.5), [4 / 7, 3 / 7, 0, 0])  # 4/9, 3/9, 2/9 before top_p
  near(chances(logits, known=2), [4 / 7, 3 / 7, 0, 0])  # ids past the tokenizer's


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


@pytest.mark.parametrize("rows", [3, 8, 13, 40, 300])  # each pair of block sizes
def test_experts_of_their_own_arrays_by_hand(rows):
  rng = np.random.default_rng(rows)
  E, D, F = 5, 6, 4
  x_ND = rng.normal(size=(rows, D))
  gate, up, down = (rng.normal(size=(E, *shape)) for shape in ((F, D), (F, D), (D, F)))
  for share in ([0.7, 0, 0.2, 0.05, 0.05], [0, 0, 0, 0, 1], [0.2] * 5):
    sizes_E = np.floor(rows * np.array(share)).astype(int)
    sizes_E[np.argmax(share)] += rows - sizes_E.sum()
    expert_N = np.repeat(np.arange(E), sizes_E)
    want = np.stack([
      down[e] @ ((g := gate[e] @ x) / (1 + np.exp(-g)) * (up[e] @ x))
      for e, x in zip(expert_N, x_ND, strict=True)
    ])  # fmt: skip
    weights = per_expert.PerExpert(*(tuple(np.float32(w)) for w in (gate, up, down)))
    experts = jax.jit(per_expert.experts, static_argnums=3)
    got = experts(np.float32(x_ND), weights, np.int32(sizes_E), gated)
    # float32, sums of 6 terms, values up to some tens
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


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
