"""Decoding and prefill of an MoE, of the dense model of its active size, and of its total size.

Random weights, random tokens: routing is near uniform, so that the expected number of different
experts that a step of B tokens reads, E (1 - (1 - K/E)^B), gives a curve to compare with.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.results import progress
from moe_jax import config as config_lib
from moe_jax import sharding
from moe_jax.data import tokenizers
from moe_jax.inference import decoding, generate
from moe_jax.model import transformer
from moe_jax.model.feedforward import FFNWeights
from moe_jax.sweep import matching
from moe_jax.training import timing

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
PREFILL = (128, 512)  # tokens of one prompt
_PROMPT, _STEPS = 16, 4
_SLOTS = 128  # of the cache, all of which a step reads
TWINS = {"dense, active size": "active_params", "dense, total size": "total_params"}
MOE = "MoE"
_READ = "plain read"


class Machine(NamedTuple):
  read: float  # bytes/s of one large matrix times a vector
  copy: float  # bytes/s read and written
  flops: float  # FLOP/s of a matmul of 1024 rows


def models(config: config_lib.Config) -> dict[str, config_lib.Config]:
  """{name: config}: the MoE and its two dense twins, in a dtype that suits the device."""
  dtype = config_lib.Dtype.FLOAT32
  if jax.default_backend() != "cpu":
    dtype = config_lib.Dtype.BFLOAT16
  model = dataclasses.replace(config.model, compute_dtype=dtype)
  config = dataclasses.replace(config, model=model, mesh=config_lib.Mesh(data=1))
  twins = {name: matching.match("dense", by=by)(config) for name, by in TWINS.items()}
  return {MOE: config} | twins


def parameters(config: config_lib.Config, seed: int, never: int = -1) -> tuple[Any, jax.Array]:
  """(random parameters of this config's model, zero balancing biases), on the mesh in force.

  With `never`, no greedy decoding draws that token, so that no row ends before its time.
  """
  model = config.model
  params = jax.jit(lambda key: nnx.state(transformer.Transformer(model, nnx.Rngs(key)), nnx.Param))(
    jax.random.key(seed)
  )
  if never >= 0:  # the others' logits have a positive maximum; a tied head is the embedding too
    params["head_DV"] = params["head_DV"].replace(params["head_DV"][...].at[:, never].set(0))
  return params, jnp.zeros(transformer.bias_shape(model))


def build(
  config: config_lib.Config, seed: int = 0, tokenizer: tokenizers.Tokenizer | None = None,
  never: int = -1,
) -> generate.TextGenerator:  # fmt: skip
  """`parameters` on one device, ready to generate; tokens are bytes if no tokenizer is given."""
  mesh = sharding.make_mesh(config_lib.Mesh(data=1))
  with jax.set_mesh(mesh):
    model = decoding.for_inference(config.model)
    weights = decoding.weights(model, *parameters(config, seed, never))
    jax.block_until_ready(weights)
  return generate.TextGenerator(model, weights, mesh, tokenizer or tokenizers.Bytes())


class Decoder:
  """A model in the middle of decoding `batch` rows, at random tokens."""

  def __init__(self, model: generate.TextGenerator, batch: int, seed: int = 0):
    self._model = model.model
    self._weights, self._mesh = model.weights, model.mesh
    rng = np.random.default_rng(seed)
    self._tokens_BL = rng.integers(0, self._model.vocab_size, (batch, _PROMPT), dtype=np.int32)
    self._steps = jax.jit(self._decode, donate_argnums=1)
    start_B = jnp.zeros((batch,), jnp.int32)
    with jax.set_mesh(self._mesh):
      prefill = jax.jit(self._prefill)
      self._cache = prefill(self._weights, start_B, self._tokens_BL)
    self()

  def _prefill(self, weights, start_B, tokens_BL):
    cache = decoding.empty_cache(self._model, start_B, _SLOTS)
    return decoding.forward_with_cache(
      weights, self._model, cache, tokens_BL, all_logits=False
    ).cache

  def _decode(self, weights, cache, token_B, key):
    """Tokens are drawn at random, so that rows do not run into the same words."""

    def step(number, carry):
      cache, token_B, total = carry
      cache = cache._replace(length=jnp.full((), _PROMPT, jnp.int32) + number)
      logits_BLV, cache, _ = decoding.forward_with_cache(
        weights, self._model, cache, token_B[:, None], all_logits=False
      )
      key_number = jax.random.fold_in(key, number)
      token_B = jax.random.randint(key_number, token_B.shape, 0, self._model.vocab_size)
      return cache, token_B, total + jnp.sum(logits_BLV)

    return jax.lax.fori_loop(0, _STEPS, step, (cache, token_B, jnp.zeros(())))

  def __call__(self) -> jax.Array:
    """_STEPS steps."""
    with jax.set_mesh(self._mesh):
      key = jax.random.key(0)
      self._cache, _, total = self._steps(
        self._weights, self._cache, jnp.asarray(self._tokens_BL[:, -1]), key
      )
    return total

  def distinct_experts(self) -> float:
    """Different experts that one step of random tokens chooses, mean over layers and 8 draws."""
    trace = jax.jit(
      lambda weights, cache, tokens_B1: (
        decoding.forward_with_cache(
          weights, self._model, cache, tokens_B1, all_logits=False, trace=True
        ).choices
      )
    )
    counts = []
    rng = np.random.default_rng(1)
    with jax.set_mesh(self._mesh):
      for _ in range(8):
        tokens_B1 = rng.integers(0, self._model.vocab_size, (len(self._tokens_BL), 1))
        for choices in trace(self._weights, self._cache, tokens_B1.astype(np.int32)):
          counts.append(int(np.any(np.asarray(choices.routed_BLE), axis=(0, 1)).sum()))
    return float(np.mean(counts))


class Reader:
  """Reads a matrix of 512 MB, beyond any cache: its product with a vector."""

  def __init__(self):
    self._matrix, self._vector = jnp.ones((16384, 8192), jnp.float32), jnp.ones((8192,))
    self._product = jax.jit(jnp.matmul)
    self.bytes = self._matrix.nbytes
    jax.block_until_ready((self(), self.copy()))

  def __call__(self) -> jax.Array:
    return self._product(self._matrix, self._vector)

  def copy(self) -> jax.Array:
    return self._matrix + 1


def machine(reader: Reader, seconds: float, rounds: int = 3) -> Machine:
  """What this device's memory and matmuls reach, the best of some rounds."""
  square, rows = jnp.ones((2048, 2048), jnp.float32), jnp.ones((1024, 2048))
  product = jax.jit(jnp.matmul)
  jax.block_until_ready(product(rows, square))
  thunks = {"read": reader, "copy": reader.copy, "flops": lambda: product(rows, square)}
  best = {name: min(s) for name, s in timing.in_turns(thunks, rounds, seconds).items()}
  return Machine(
    read=reader.bytes / best["read"], copy=2 * reader.bytes / best["copy"],
    flops=2 * 1024 * 2048 * 2048 / best["flops"],
  )  # fmt: skip


def expected_experts(num_experts: int, top_k: int, batch: int) -> float:
  """Different experts that B tokens choose under uniform routing: E (1 - (1 - K/E)^B)."""
  return num_experts * (1 - (1 - top_k / num_experts) ** batch)


class Work(NamedTuple):
  bytes: float
  flops: float


def work(weights: decoding.Weights, model: config_lib.Model, batch: int, experts: float) -> Work:
  """What a decode step of `batch` rows reads and computes, `experts` read in each MoE layer."""

  def size(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))

  of_experts = [w.ffn.moe.experts for w in weights.layers if not isinstance(w.ffn, FFNWeights)]
  one = size(of_experts[0]) / model.moe.num_experts if of_experts else 0.0
  # A tied head is read whole; of an embedding that is only looked up, B rows.
  always = size(weights.layers) - size(of_experts) + size((weights.final_norm_D, weights.head_DV))
  item = weights.embed_VD.dtype.itemsize
  slots = batch * _SLOTS * 2 * model.num_kv_heads * model.head_dim * model.num_layers
  used = always + len(of_experts) * one * model.moe.top_k
  return Work(always + len(of_experts) * one * experts + slots * item, 2 * batch * used / item)


def run(
  config: config_lib.Config, rounds: int, batches=BATCHES, seconds: float = 0.3
) -> dict[str, Any]:
  """Rows of decode and prefill; `seconds`, as min_seconds of timing.in_turns."""
  configs = models(config)
  built = {}
  for name, of in configs.items():
    progress(f"{name}: {matching.sizes(of)}")
    built[name] = build(of)
  reader = Reader()
  found = machine(reader, seconds)
  progress(f"memory reads {found.read / 1e9:.1f} GB/s, copies {found.copy / 1e9:.1f} GB/s; "
           f"matmuls {found.flops / 1e9:.0f} GFLOP/s")  # fmt: skip
  counts = {name: matching.cached_count(config) for name, config in configs.items()}
  rows = []
  for batch in batches:
    rows += _decode_rows(built, batch, rounds, seconds, found, reader)
  prefill = [row for length in PREFILL for row in _prefill_rows(built, length, rounds, seconds)]
  return {
    "machine": found._asdict(),
    "models": {
      n: {"parameters": c.total, "active": c.active, "dtype": configs[n].model.compute_dtype.value}
      for n, c in counts.items()
    },
    "decode": rows,
    "prefill": prefill,
  }


def _decode_rows(built, batch, rounds, seconds, found, reader):
  decoders = {name: Decoder(model, batch) for name, model in built.items()}
  times = timing.in_turns(decoders | {_READ: reader}, rounds, seconds)
  rows = []
  for name, model in built.items():
    moe = model.model.moe
    experts = expected_experts(moe.num_experts, moe.top_k, batch) if moe.num_experts else 0.0
    done = work(model.weights, model.model, batch, experts)
    took = timing.median(times, name) / _STEPS
    rows.append({
      "model": name, "batch": batch, "seconds": took, "tokens_per_s": batch / took,
      "speed_vs_moe": timing.ratio(times, MOE, name), "bytes": done.bytes, "flops": done.flops,
      "bytes_per_s": done.bytes / took,
      "of_plain_read": _STEPS * done.bytes / reader.bytes / timing.ratio(times, name, _READ),
      "roofline_s": max(done.bytes / found.read, done.flops / found.flops),
      "experts_expected": experts,
      "experts_read": decoders[name].distinct_experts() if moe.num_experts else 0.0,
    })  # fmt: skip
  shown = ", ".join(f"{r['model']} {r['tokens_per_s']:,.1f}" for r in rows)
  progress(f"decode, batch {batch}: {shown} tokens/s")
  return rows


def _prefill_rows(built, length, rounds, seconds):
  vocab_size = built[MOE].model.vocab_size  # the twins have the same
  tokens = np.random.default_rng(0).integers(0, vocab_size, (1, length), dtype=np.int32)
  thunks = {}
  for name, model in built.items():

    def prefill(weights, tokens_BL, model=model):
      cache = decoding.empty_cache(model.model, jnp.zeros((1,), jnp.int32), length)
      return decoding.forward_with_cache(
        weights, model.model, cache, tokens_BL, all_logits=False
      ).logits_BLV

    compiled = jax.jit(prefill)

    def call(compiled=compiled, model=model):
      with jax.set_mesh(model.mesh):
        return compiled(model.weights, tokens)

    jax.block_until_ready(call())
    thunks[name] = call
  times = timing.in_turns(thunks, rounds, seconds)
  return [
    {"model": n, "tokens": length, "seconds": timing.median(times, n),
     "tokens_per_s": length / timing.median(times, n)}
    for n in built
  ]  # fmt: skip
