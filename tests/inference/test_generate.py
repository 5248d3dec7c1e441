"""Generation: greedy and drawn tokens, batches, meshes, compiled programs, and what is refused."""

import dataclasses
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest

from moe_jax import sharding
from moe_jax.config import Router
from moe_jax.errors import UserError
from moe_jax.inference import decoding, sampling
from moe_jax.kernels import per_expert, platform
from moe_jax.model import cost
from tests.support.generation import empty_cache, full_forward, greedy, model_of, rows_of
from tests.support.toys import mesh_of, slow_unless, toy_config


@pytest.fixture(scope="module")
def made():
  """One model for the tests that change nothing of it, so that its programs compile once."""
  return model_of()


def test_logits_equal_the_full_forward(made):
  rows = rows_of((5, 5, 5))
  full, got_BLV = full_forward(made.trained, rows), made.model.logits(rows)
  np.testing.assert_allclose(got_BLV, full, rtol=2e-4, atol=2e-4)
  assert got_BLV.dtype == np.float32
  got_LV = made.model.logits(rows[1].tolist())
  np.testing.assert_allclose(got_LV, full[1], rtol=2e-4, atol=2e-4)
  assert made.model.logits(rows[0]).shape == (5, 24)


@pytest.mark.parametrize("wrong", [[], [0.5], [[[1]]], [24], [-1]], ids=str)
def test_logits_refuse_what_are_no_ids(wrong, made):
  with pytest.raises(UserError, match=r"give integers|ids are from 0 to 23"):
    made.model.logits(wrong)


def test_greedy_is_the_argmax_of_the_full_forward(made):
  ours, trained = made
  (found,) = greedy(ours, "abc", max_new_tokens=12)
  row = [23, 0, 1, 2, *found]
  (logits,) = full_forward(trained, [row])
  assert np.argmax(logits[3:-1], axis=1).tolist() == found and len(found) == 12


def programs(ours):
  return ours._prefill._cache_size(), ours._decode._cache_size()


def test_prompts_of_one_bucket_share_one_program(made):
  ours = made.model
  ours.generate("a", max_new_tokens=4)
  prefills, decodes = programs(ours)
  for prompt in ("a", "abcdefghij", "abc"):
    ours.generate(prompt, max_new_tokens=4)
    ours.generate(prompt, max_new_tokens=9, temperature=0.5, seed=1)
  assert programs(ours) == (prefills, decodes)
  ours.generate("a" * 40, max_new_tokens=4)  # no other test has a prompt this long
  assert programs(ours) == (prefills + 1, decodes + 1)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("model", "axes", "temperature"),
  [
    ("topk", dict(expert=2, data=2), 0.8),
    ("options", dict(expert=2, tensor=2), 0.8),
    ("delta", dict(fsdp=2, tensor=2), 0.0),
  ],
)
def test_every_mesh_has_the_same_tokens_and_logits(model, axes, temperature):
  prompts = ["abc", "defghij", "k"]
  one, _ = model_of(model)
  other, _ = model_of(model, mesh=mesh_of(**axes))
  assert isinstance(one.weights.layers[0].ffn.moe.experts, per_expert.PerExpert)
  assert other.weights.layers[0].ffn.moe.experts.gate_EDF.ndim == 3
  options = dict(max_new_tokens=10, seed=3, temperature=temperature)
  drawn = [[c.tokens for c in m.generate(prompts, **options)] for m in (one, other)]
  assert drawn[0] == drawn[1] and len({token for row in drawn[0] for token in row}) > 5
  logits = [m.logits([[1, 2, 3, 4, 5]] * 2) for m in (one, other)]
  np.testing.assert_allclose(*logits, rtol=2e-4, atol=2e-4)


@pytest.mark.slow
def test_a_row_depends_on_its_prompt_and_its_seed_alone(made):
  options = dict(max_new_tokens=20, seed=5)
  (alone,) = made.model.generate(["abc"], **options)
  among = made.model.generate(["abc", "defghijklmnopqrst", "u"], **options)
  assert among[0] == alone and among[0].tokens != among[2].tokens
  samples = made.model.generate(["abc"], **options, num_samples=3)
  assert samples[0] == alone and len({c.text for c in samples}) == 3
  assert made.model.generate(["abc"], **options | dict(seed=6))[0] != alone


@pytest.mark.slow
def test_tokens_are_drawn_from_the_full_forward_up_to_the_separator_or_the_limit(made):
  ours, trained = made
  prompts = ["abc", "d", "efgh", "ijkl"]
  drawn = ours.generate(prompts, max_new_tokens=16, seed=1)
  assert {c.finished for c in drawn} == {True, False}  # 1 of 24 ids: seed 1 has both
  assert all(len(c.tokens) == 16 or c.finished for c in drawn)
  assert all(c.text == "".join(chr(97 + i) for i in c.tokens) for c in drawn)
  rows = [[23, *ours.tokenizer.encode(c.prompt), *c.tokens] + [23] * c.finished for c in drawn]
  draw, kind = sampling.options(1.0, 24, 1.0, 24)
  full = full_forward(trained, rows)
  for b, (row, logits_LV) in enumerate(zip(rows, full, strict=True)):
    begin = 1 + len(prompts[b])
    for number, token in enumerate(row[begin:]):
      logits_BV = jnp.tile(jnp.asarray(logits_LV[begin + number - 1])[None], (4, 1))
      sampled_B = sampling.sample(logits_BV, 1, number, draw, kind._replace(filtered=False), 24)
      assert sampled_B[b] == token


def test_the_cache_is_donated_and_updated_in_place(made):
  ours = made.model
  with jax.set_mesh(mesh_of()):
    arrays = np.array([0], np.int32), np.array([False])
    start_B, done_B = sharding.place(arrays, ours.mesh)
    cache = empty_cache(ours.model, start_B, 96)
    draw, kind = sampling.options(0.0, 0, 1.0, 24)
    token_B = jnp.zeros((1,), jnp.int32)
    arguments = (ours.weights, cache, token_B, done_B, 0, 1, 1, draw)
    program = ours._decode.lower(*arguments, kind=kind).compile().as_text()
    after, *_ = ours._decode(*arguments, kind=kind)
  assert cache.layers[0].keys.is_deleted() and int(after.length) == 1
  assert re.search(r"f32\[2,96,6\]\S* dynamic-update-slice", program)
  assert not re.search(r"= f32\[(1,)?2,96,6\]\S* copy", program)


def test_a_router_that_needs_later_tokens_is_refused():
  moe = dataclasses.replace(toy_config().model.moe, router=Router.EXPERT_CHOICE)
  with pytest.raises(UserError, match="no later tokens yet"):
    decoding.for_inference(dataclasses.replace(toy_config().model, moe=moe))


@pytest.mark.parametrize(("name", "value"), [
  ("max_new_tokens", 0), ("temperature", -1.0), ("temperature", float("nan")), ("top_k", -1),
  ("top_p", 0.0), ("num_samples", 0), ("seed", -1), ("seed", 2**32), ("temperature", 1e-300),
  ("top_k", 2**31),
])  # fmt: skip
def test_an_option_out_of_range_is_refused(name, value, made):
  with pytest.raises(UserError, match=f"{name}={value}"):
    made.model.generate("a", **{name: value})


def test_no_prompt_is_refused(made):
  with pytest.raises(UserError, match="no prompt"):
    made.model.generate([])


def test_a_seed_of_32_bits_draws_a_text_of_its_own(made):
  """A Python integer from 2**31 on would be no int32, and one from 2**32 on another seed."""
  texts = {
    made.model.generate("a", max_new_tokens=16, seed=seed)[0].text
    for seed in (0, 2**31 - 1, 2**31, 2**32 - 1)
  }
  assert len(texts) == 4


TOO_LARGE = {
  "long": (["a" * 100_000], {}, "1 prompts of up to 100,001 tokens and 256 new ones need "),
  "endless": (["a"], {"max_new_tokens": 10**9}, "1,000,000,000 new ones need "),
  "no_size": (["a"], {"max_new_tokens": 2**31 - 1}, "are over 1,073,741,824 tokens in all"),
}


@pytest.mark.parametrize("case", slow_unless(["endless", "no_size"], TOO_LARGE))
def test_what_does_not_fit_into_memory_is_refused_before_anything_is_allocated(case, made):
  prompts, options, why = TOO_LARGE[case]
  before = psutil.Process().memory_info().rss
  with pytest.raises(UserError, match=re.escape(why)) as caught:
    made.model.generate(prompts, **options)
  assert "give fewer or shorter ones" in str(caught.value)
  assert psutil.Process().memory_info().rss < before + 3e9  # what the compiler takes


def test_the_limit_of_the_job_holds_for_generation_as_for_training(made, tmp_path, monkeypatch):
  """That of a group around this process's own, in place of the machine's."""
  (tmp_path / "proc/self").mkdir(parents=True)
  (tmp_path / "proc/self/cgroup").write_text("0::/job/step\n")
  (tmp_path / "sys/fs/cgroup/job").mkdir(parents=True)
  (tmp_path / "sys/fs/cgroup/job/memory.max").write_text("8000\n")
  monkeypatch.setattr(platform, "_ROOT", tmp_path)
  assert made.model.mesh.size == 1 and jax.local_device_count() == 8
  assert (platform.memory_bytes(sharing=1), platform.memory_bytes()) == (8000, 1000)
  with pytest.raises(UserError, match=r"need 0.0 GB of memory on each device, which has 0.0; give"):
    made.model.generate("ab" * 90)  # no other test has a prompt this long
  with pytest.raises(UserError, match=r"weights: at least 10.0 MiB on each device, which has"):
    cost.refuse_over_memory(10 * 2**20, "weights", "take more")


@pytest.mark.slow
def test_a_program_is_compiled_once_though_its_memory_is_looked_at_first(made):
  with jax.log_compiles(), pytest.MonkeyPatch.context() as patch:
    compiled = []
    logger = logging.getLogger("jax._src.interpreters.pxla")
    patch.setattr(logger, "handle", lambda record: compiled.append(record.getMessage()))
    made.model.generate("a" * 70, max_new_tokens=3)  # no other test has a prompt this long
  assert sum("Compiling jit(prefill)" in line for line in compiled) == 1, compiled


def test_the_memory_that_is_asked_for_is_that_of_the_program(made):
  """By hand: the cache, beside which the rest is small."""
  model = made.model.model
  slots = 10**9 // 32 * 32 + 32
  cache = 2 * model.num_layers * model.num_kv_heads * model.head_dim * 4 * slots
  with pytest.raises(UserError) as caught:
    made.model.generate("a", max_new_tokens=10**9)
  needed = float(re.search(r"need ([\d,.]+) GB", str(caught.value))[1].replace(",", ""))
  assert needed == pytest.approx(cache / 1e9, rel=0.01)
