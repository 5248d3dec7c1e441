"""Text from a trained model: load(workdir) -> Model with .logits and .generate.

Prompts are aligned at their ends and padded to a bucket of sizes, so that few programs are
compiled. Prefill reads the prompts in one pass; then a loop on the device draws a chunk of tokens
at a time, with the cache updated in place.
"""

import functools
import math
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import checkpoint, sharding, startup
from moe_jax import config as config_lib
from moe_jax import workdir as workdir_lib
from moe_jax.config import UserError
from moe_jax.data import tokenizers
from moe_jax.inference import decoding, sampling
from moe_jax.inference.decoding import Weights
from moe_jax.kernels import choose
from moe_jax.model import transformer

_SLOTS = 32  # caches are multiples of it
_CHUNK = 32  # tokens of a row that the device draws before it answers, at most
_CHUNK_SECONDS = 0.1  # what a reader waits for at most, where the device is that fast


class Completion(NamedTuple):
  prompt: str
  text: str  # what follows the prompt
  tokens: list[int]  # of the text
  finished: bool  # the model ended the document, before max_new_tokens


def load(workdir: str | pathlib.Path, step: int = 0) -> "Model":
  """The model of a run of train.py, ready to generate on this machine's devices.

  Args:
    workdir: of the run; the checkpoint and the tokenizer are all that is needed, no data.
    step: the checkpoint; 0 is the newest.

  Raises:
    UserError: no run or checkpoint there, or its router cannot generate.
  """
  path = pathlib.Path(workdir)
  config = workdir_lib.read_config(path)
  startup.start(config.data)
  model = choose.for_reading(config.model, workdir_lib.read_kernels(path))
  model = decoding.for_inference(model)
  reader = checkpoint.Checkpointer(path)
  try:
    step = reader.find(step)
    mesh = sharding.make_mesh(sharding.fit_mesh(config.mesh, batch_size=1))
    with jax.set_mesh(mesh):
      stored = reader.restore_part(step, transformer.abstract_weights(model), mesh)
      weights = decoding.weights(model, **stored)
  finally:
    reader.close()
  return Model(model, weights, mesh, tokenizers.load(config.data), step)


class Model:
  """A decoder with its weights, on a mesh.

  Raises UserError for what a prompt or an option cannot be.
  """

  def __init__(
    self,
    model: config_lib.Model,
    weights: Weights,
    mesh: jax.sharding.Mesh,
    tokenizer: tokenizers.Tokenizer,
    step: int = 0,
  ):
    """model and weights: of `decoding.for_inference` and `decoding.weights`, on `mesh`."""
    self.model, self.tokenizer, self.step = model, tokenizer, step
    self.weights, self.mesh = weights, mesh
    self._rows = math.prod(mesh.shape[axis] for axis in sharding.BATCH_AXES)
    self._all_logits = jax.jit(functools.partial(_all_logits, model=model))
    known = min(tokenizer.vocab_size, model.vocab_size)
    options: dict[str, Any] = dict(model=model, known=known, end=tokenizer.separator)
    self._prefill = jax.jit(
      functools.partial(_prefill, **options), static_argnames=("slots", "kind")
    )
    self._decode = jax.jit(
      functools.partial(_decode, **options), static_argnames="kind", donate_argnames="cache"
    )
    self.seconds = {"prefill": 0.0, "decode": 0.0}  # of the last generation
    self.counts = {"prefill": 0, "decode": 0}  # and its tokens

  def logits(self, tokens: Any) -> np.ndarray:
    """Next-token logits after every token, float32 [L, V] or [B, L, V].

    Args:
      tokens: ids, [L] or [B, L]; a document begins with tokenizer.separator.
    """
    ids_BL = np.asarray(tokens)
    if ids_BL.ndim not in (1, 2) or not ids_BL.size or ids_BL.dtype.kind not in "iu":
      raise UserError(f"tokens of {ids_BL.dtype}{ids_BL.shape}: give integers, [L] or [B, L]")
    if ids_BL.min() < 0 or ids_BL.max() >= self.model.vocab_size:
      raise UserError(f"a token of {ids_BL.max()}: ids are from 0 to {self.model.vocab_size - 1}")
    rows = np.atleast_2d(ids_BL)
    tokens_BL, start_B = self._padded(list(rows))
    with jax.set_mesh(self.mesh):
      logits = np.asarray(self._all_logits(self.weights, *self._put(tokens_BL, start_B)))
    logits = logits[: len(rows), -rows.shape[1] :]
    return logits if ids_BL.ndim == 2 else logits[0]

  def generate(self, prompts: str | Sequence[str], **options: Any) -> list[Completion]:
    """The continuation of each prompt, and of each sample of it; options as of `stream`."""
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    samples = options.get("num_samples", 1)
    found: list[list[int]] = [[] for _ in range(len(prompts) * samples)]
    for chunk in self.stream(prompts, **options):
      for ids, new in zip(found, chunk, strict=True):
        ids.extend(new)
    return [self.completion(prompts[i // samples], ids) for i, ids in enumerate(found)]

  def completion(self, prompt: str, ids: list[int]) -> Completion:
    """What the ids drawn after a prompt say; the separator at their end is not part of it."""
    finished = bool(ids) and ids[-1] == self.tokenizer.separator
    ids = ids[:-1] if finished else ids
    return Completion(prompt, self.tokenizer.decode(ids), ids, finished)

  def stream(
    self,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    num_samples: int = 1,
  ) -> Iterator[list[list[int]]]:
    """Yields the new ids of every row, chunk by chunk; the last one of a finished row is the
    tokenizer's separator.

    Args:
      prompts: of any lengths; rows are prompt 0's samples, then prompt 1's, ...
      max_new_tokens: of each row.
      temperature: of the softmax that tokens are drawn from; 0 takes the most probable.
      top_k: draw from the k most probable only; 0 from all.
      top_p: draw from the fewest tokens that together have this probability (1904.09751).
      seed: the same draws again, whatever the mesh.
      num_samples: continuations of each prompt.
    """
    _check_prompts(prompts, max_new_tokens, num_samples)
    draw, kind = sampling.options(temperature, top_k, top_p, self.model.vocab_size)
    one = [np.concatenate([[self.tokenizer.separator], self.tokenizer.encode(p)]) for p in prompts]
    rows = [ids for ids in one for _ in range(num_samples)]
    padded_BL, first_B = self._padded(rows)
    B, L = padded_BL.shape
    slots = -(-(L + max_new_tokens) // _SLOTS) * _SLOTS
    done = np.arange(B) >= len(rows)
    with jax.set_mesh(self.mesh):
      started = time.perf_counter()
      tokens_BL, start_B, done_B = self._put(padded_BL, first_B, done)
      cache, token_B, done_B = self._prefill(
        self.weights, tokens_BL, start_B, done_B, seed, draw, kind=kind, slots=slots
      )
      first = np.asarray(token_B)[: len(rows), None].tolist()
      self.seconds = {"prefill": time.perf_counter() - started, "decode": 0.0}
      self.counts = {"prefill": sum(map(len, rows)), "decode": 0}
      yield first
      drawn, steps = 1, 1
      finished = np.asarray(done_B)
      while drawn < max_new_tokens and not finished.all():
        started = time.perf_counter()
        steps = min(steps, max_new_tokens - drawn)
        cache, token_B, done_B, out_BN, took = self._decode(
          self.weights, cache, token_B, done_B, seed, drawn, steps, draw, kind=kind
        )
        new = self._new(np.asarray(out_BN), finished, int(took), len(rows))
        finished, drawn = np.asarray(done_B), drawn + int(took)
        seconds = time.perf_counter() - started
        self.seconds["decode"] += seconds
        self.counts["decode"] += sum(map(len, new))
        yield new
        steps = min(max(int(_CHUNK_SECONDS / seconds * int(took)), 1), 2 * steps, _CHUNK)

  def speed(self) -> str:
    """Of the last generation, compilation included the first time."""
    rates = (
      f"{name} {count:,} tokens in {self.seconds[name]:.2f} s"
      + (f", {count / self.seconds[name]:,.1f} tokens/s" if count else "")
      for name, count in self.counts.items()
    )
    return "; ".join(rates)

  def _new(self, out_BN: np.ndarray, finished: np.ndarray, took: int, rows: int) -> list[list[int]]:
    """Each row's ids of a chunk, up to the separator and with it; none of a finished row."""
    found = []
    for ids, done in zip(out_BN[:rows, :took].tolist(), finished, strict=False):
      if self.tokenizer.separator in ids:
        ids = ids[: ids.index(self.tokenizer.separator) + 1]
      found.append([] if done else ids)
    return found

  def _padded(self, rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Rows aligned at their ends, in a bucket of sizes; padding rows start after their end."""
    length = max(16, 1 << (max(map(len, rows)) - 1).bit_length())
    batch = self._rows * (1 << (-(-len(rows) // self._rows) - 1).bit_length())
    tokens_BL = np.zeros((batch, length), np.int32)
    start_B = np.full(batch, np.iinfo(np.int32).max // 2, np.int32)
    for number, ids in enumerate(rows):
      tokens_BL[number, length - len(ids) :] = ids
      start_B[number] = length - len(ids)
    return tokens_BL, start_B

  def _put(self, *arrays: np.ndarray) -> tuple[jax.Array, ...]:
    return sharding.to_global(arrays, self.mesh)


def _check_prompts(prompts: Sequence[str], max_new_tokens: int, num_samples: int) -> None:
  if not prompts:
    raise UserError("no prompt: give at least one, which may be empty")
  sampling.check_least("max_new_tokens", max_new_tokens, 1)
  sampling.check_least("num_samples", num_samples, 1)


def _all_logits(
  weights: Weights, tokens_BL: jax.Array, start_B: jax.Array, *, model: config_lib.Model
) -> jax.Array:
  cache = decoding.empty_cache(model, start_B, tokens_BL.shape[1])
  return decoding.forward(weights, model, cache, tokens_BL, all_logits=True).logits_BLV


def _prefill(
  weights: Weights,
  tokens_BL: jax.Array,
  start_B: jax.Array,
  done_B: jax.Array,
  seed: jax.Array,
  draw: sampling.Sampling,
  *,
  model: config_lib.Model,
  known: int,
  end: int,
  slots: int,
  kind: sampling.Kind,
) -> tuple[decoding.Cache, jax.Array, jax.Array]:
  """(the cache of the prompts, the first token drawn of each row, whether it ended the row)."""
  cache = decoding.empty_cache(model, start_B, slots)
  out = decoding.forward(weights, model, cache, tokens_BL, all_logits=False)
  token_B = sampling.sample(out.logits_BLV[:, 0], seed, 0, draw, kind, known)
  return out.cache, token_B, done_B | (token_B == end)


def _decode(
  weights: Weights,
  cache: decoding.Cache,
  token_B: jax.Array,
  done_B: jax.Array,
  seed: jax.Array,
  drawn: jax.Array,
  steps: jax.Array,
  draw: sampling.Sampling,
  *,
  model: config_lib.Model,
  known: int,
  end: int,
  kind: sampling.Kind,
) -> tuple[decoding.Cache, jax.Array, jax.Array, jax.Array, jax.Array]:
  """(cache, last token_B, done_B, out_BN, how many of its columns): up to `steps` more tokens."""
  out_BN = jnp.full((token_B.shape[0], _CHUNK), end, jnp.int32)
  never = jnp.iinfo(jnp.int32).max // 2

  def unfinished(carry: Any) -> jax.Array:
    number, _, _, done_B, _ = carry
    return (number < steps) & ~jnp.all(done_B)

  def step(carry: Any) -> Any:
    number, cache, token_B, done_B, out_BN = carry
    # A finished row is padding from here on: no expert is read for it.
    cache = cache._replace(start_B=jnp.where(done_B, never, cache.start_B))
    out = decoding.forward(weights, model, cache, token_B[:, None], all_logits=False)
    drawn_B = sampling.sample(out.logits_BLV[:, 0], seed, drawn + number, draw, kind, known)
    token_B = jnp.where(done_B, end, drawn_B)
    out_BN = jax.lax.dynamic_update_slice(out_BN, token_B[:, None], (0, number))
    return number + 1, out.cache, token_B, done_B | (token_B == end), out_BN

  carry = (jnp.zeros((), jnp.int32), cache, token_B, done_B, out_BN)
  number, cache, token_B, done_B, out_BN = jax.lax.while_loop(unfinished, step, carry)
  return cache, token_B, done_B, out_BN, number
