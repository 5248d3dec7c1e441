"""Times decoding and prefill of an MoE and of dense models of its active and of its total size.

Weights and tokens are random, so routing is nearly uniform. Then a step of B tokens is expected to
read E (1 - (1 - K/E)^B) different experts, which predicts the times.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import timing
from benchmarks.results import progress
from moe_jax import sharding
from moe_jax.config import Config, Dtype, Mesh, Model
from moe_jax.data import tokenizers
from moe_jax.inference import decoding, generate
from moe_jax.model import cost, pattern, transformer
from moe_jax.model.feedforward import FFNWeights
from moe_jax.sweep import matching

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
PREFILL = (128, 512)  # tokens of one prompt
_PROMPT, _STEPS = 16, 4
_SLOTS = 128  # slots of the cache; a step reads all of them
TWINS = {"dense, active size": "active_params", "dense, total size": "total_params"}
MOE = "MoE"
_READ = "plain read"


class Machine(NamedTuple):
  """The measured speeds of the device."""

  read: float  # bytes/s of one large matrix times a vector
  copy: float  # bytes/s read and written
  flops: float  # FLOP/s of a matmul of 1024 rows


def models(config: Config) -> dict[str, Config]:
  """Returns {name: config} of the MoE and its two dense twins, in a dtype for this device."""
  dtype = Dtype.FLOAT32
  if jax.default_backend() != "cpu":
    dtype = Dtype.BFLOAT16
  model = dataclasses.replace(config.model, compute_dtype=dtype)
  config = dataclasses.replace(config, model=model, mesh=Mesh(data=1))
  twins = {name: matching.match("dense", by=by)(config) for name, by in TWINS.items()}
  return {MOE: config} | twins


def random_parameters(config: Config, seed: int, never: int = -1) -> tuple[Any, jax.Array]:
  """Returns random parameters of a config's model and balancing biases of 0, on the mesh in force.

  Greedy decoding never draws the token `never`. For the separator this means that no row ends
  early.
  """
  model = config.model
  params = jax.jit(lambda key: nnx.state(transformer.Transformer(model, nnx.Rngs(key)), nnx.Param))(
    jax.random.key(seed)
  )
  if never >= 0:  # a logit of 0 is never the largest; the head must not be tied to the embedding
    params["head_DV"] = params["head_DV"].replace(params["head_DV"][...].at[:, never].set(0))
  return params, jnp.zeros(pattern.bias_shape(model))


def build_generator(
  config: Config,
  seed: int = 0,
  tokenizer: tokenizers.Tokenizer | None = None,
  never: int = -1,
) -> generate.TextGenerator:
  """Returns a generator with `random_parameters` on one device.

  Its tokens are bytes if no tokenizer is given.
  """
  mesh = sharding.make_mesh(Mesh(data=1))
  with jax.set_mesh(mesh):
    model = decoding.for_inference(config.model)
    weights = decoding.weights(model, *random_parameters(config, seed, never))
    jax.block_until_ready(weights)
  return generate.TextGenerator(model, weights, mesh, tokenizer or tokenizers.Bytes())


class RandomDecoder:
  """A model that decodes `batch` rows of random tokens after a prompt; calling it decodes steps."""

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
    """Decodes _STEPS steps; the tokens are random, so that rows do not become alike."""

    def step(number, carry):
      cache, token_B, total = carry
      cache = cache._replace(length=jnp.full((), _PROMPT, jnp.int32) + number)
      out = decoding.forward_with_cache(
        weights, self._model, cache, token_B[:, None], all_logits=False
      )
      key_number = jax.random.fold_in(key, number)
      token_B = jax.random.randint(key_number, token_B.shape, 0, self._model.vocab_size)
      return out.cache, token_B, total + jnp.sum(out.logits_BLV)

    return jax.lax.fori_loop(0, _STEPS, step, (cache, token_B, jnp.zeros(())))

  def __call__(self) -> jax.Array:
    """Decodes _STEPS steps; returns a number that depends on all of them."""
    with jax.set_mesh(self._mesh):
      key = jax.random.key(0)
      self._cache, _, total = self._steps(
        self._weights, self._cache, jnp.asarray(self._tokens_BL[:, -1]), key
      )
    return total

  def distinct_experts(self) -> float:
    """Returns how many different experts one step chooses, mean over layers and 8 random steps."""
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
  """Reads a matrix of 512 MB, which no cache holds, by multiplying it with a vector."""

  def __init__(self):
    self._matrix, self._vector = jnp.ones((16384, 8192), jnp.float32), jnp.ones((8192,))
    self._product = jax.jit(jnp.matmul)
    self.bytes = self._matrix.nbytes
    jax.block_until_ready((self(), self.copy()))

  def __call__(self) -> jax.Array:
    return self._product(self._matrix, self._vector)

  def copy(self) -> jax.Array:
    """Reads the matrix and writes another one."""
    return self._matrix + 1


def machine(reader: Reader, seconds: float, rounds: int = 3) -> Machine:
  """Measures the speed of this device's memory and matmuls, the best of some rounds."""
  square, rows = jnp.ones((2048, 2048), jnp.float32), jnp.ones((1024, 2048))
  product = jax.jit(jnp.matmul)
  jax.block_until_ready(product(rows, square))
  thunks = {"read": reader, "copy": reader.copy, "flops": lambda: product(rows, square)}
  best = {name: min(s) for name, s in timing.in_turns(thunks, rounds, seconds).items()}
  return Machine(
    read=reader.bytes / best["read"],
    copy=2 * reader.bytes / best["copy"],
    flops=2 * 1024 * 2048 * 2048 / best["flops"],
  )


def expected_experts(num_experts: int, top_k: int, batch: int) -> float:
  """Returns how many different experts B tokens choose if uniform: E (1 - (1 - K/E)^B)."""
  return num_experts * (1 - (1 - top_k / num_experts) ** batch)


class Work(NamedTuple):
  """The work of a decoding step."""

  bytes: float  # read
  flops: float


def work(weights: decoding.DecoderWeights, model: Model, batch: int, experts: float) -> Work:
  """Returns the work of a step of `batch` rows that reads `experts` experts in each MoE layer."""

  def size(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))

  experts_Z = [w.ffn.moe.experts for w in weights.layers if not isinstance(w.ffn, FFNWeights)]
  expert_bytes = size(experts_Z[0]) / model.moe.num_experts if experts_Z else 0.0
  # The head is read whole. The embedding, of which a step reads B rows, is left out.
  shared = size(weights.layers) - size(experts_Z) + size((weights.final_norm_D, weights.head_DV))
  item = weights.embed_VD.dtype.itemsize
  slots = batch * _SLOTS * 2 * model.num_kv_heads * model.head_dim * model.num_layers
  per_token = shared + len(experts_Z) * expert_bytes * model.moe.top_k
  return Work(
    bytes=shared + len(experts_Z) * expert_bytes * experts + slots * item,
    flops=2 * batch * per_token / item,
  )


def run(config: Config, rounds: int, batches=BATCHES, seconds: float = 0.3) -> dict[str, Any]:
  """Times decoding at each batch size, and prefill.

  Args:
    config: of the MoE.
    rounds: timed rounds, of which the median counts.
    batches: numbers of rows to decode together.
    seconds: the least time of one measurement, min_seconds of timing.in_turns.
  """
  configs = models(config)
  built = {}
  for name, model_config in configs.items():
    progress(f"{name}: {matching.sizes(model_config)}")
    built[name] = build_generator(model_config)
  reader = Reader()
  speeds = machine(reader, seconds)
  progress(
    f"memory reads {speeds.read / 1e9:.1f} GB/s, copies {speeds.copy / 1e9:.1f} GB/s; "
    f"matmuls {speeds.flops / 1e9:.0f} GFLOP/s"
  )
  counts = {name: cost.count(model_config) for name, model_config in configs.items()}
  rows = []
  for batch in batches:
    rows += _decode_rows(built, batch, rounds, seconds, speeds, reader)
  prefill = [row for length in PREFILL for row in _prefill_rows(built, length, rounds, seconds)]
  return {
    "machine": speeds._asdict(),
    "models": {
      n: {"parameters": c.total, "active": c.active, "dtype": configs[n].model.compute_dtype.value}
      for n, c in counts.items()
    },
    "decode": rows,
    "prefill": prefill,
  }


def _decode_rows(built, batch, rounds, seconds, speeds, reader):
  decoders = {name: RandomDecoder(model, batch) for name, model in built.items()}
  times = timing.in_turns(decoders | {_READ: reader}, rounds, seconds)
  rows = []
  for name, model in built.items():
    moe = model.model.moe
    experts = expected_experts(moe.num_experts, moe.top_k, batch) if moe.num_experts else 0.0
    step = work(model.weights, model.model, batch, experts)
    step_s = timing.median(times, name) / _STEPS
    rows.append(
      {
        "model": name,
        "batch": batch,
        "seconds": step_s,
        "tokens_per_s": batch / step_s,
        "speed_vs_moe": timing.ratio(times, MOE, name),
        "bytes": step.bytes,
        "flops": step.flops,
        "bytes_per_s": step.bytes / step_s,
        "of_plain_read": _STEPS * step.bytes / reader.bytes / timing.ratio(times, name, _READ),
        "roofline_s": max(step.bytes / speeds.read, step.flops / speeds.flops),
        "experts_expected": experts,
        "experts_read": decoders[name].distinct_experts() if moe.num_experts else 0.0,
      }
    )
  numbers = ", ".join(f"{r['model']} {r['tokens_per_s']:,.1f}" for r in rows)
  progress(f"decode, batch {batch}: {numbers} tokens/s")
  return rows


def _prefill_rows(built, length, rounds, seconds):
  vocab_size = built[MOE].model.vocab_size  # also that of the twins
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
    {
      "model": n,
      "tokens": length,
      "seconds": timing.median(times, n),
      "tokens_per_s": length / timing.median(times, n),
    }
    for n in built
  ]
