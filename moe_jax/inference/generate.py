"""Text from a trained model: a TextGenerator has .logits and .generate; moe_jax.load returns one.

Prompts are aligned at their ends and padded to a bucket of sizes, so that few programs are
compiled. Prefill reads the prompts in one pass; then a loop on the device draws a chunk of tokens
at a time, with the cache updated in place.
"""

import functools
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import sharding
from moe_jax.config import Model
from moe_jax.data import tokenizers
from moe_jax.errors import UserError
from moe_jax.inference import decoding, memory, padding, sampling
from moe_jax.inference.decoding import DecoderWeights
from moe_jax.inference.options import check_generation

_SLOT_MULTIPLE = 32  # the number of slots of a cache is a multiple of this
_CHUNK = 32  # the most tokens of a row that the device draws before it returns them
_CHUNK_SECONDS = 0.1  # the time of a chunk that `stream` aims at


Prompt = str | Sequence[int]  # a text, which begins a document; or ids, which are taken as they are


class Completion(NamedTuple):
  """The continuation of one prompt."""

  prompt: Prompt
  text: str  # the text after the prompt
  tokens: list[int]  # of the text
  finished: bool  # the model ended the document before max_new_tokens


class TextGenerator:
  """A decoder with its weights, on a mesh.

  Its methods raise UserError for a prompt or an option that is not allowed.
  """

  def __init__(
    self,
    model: Model,
    weights: DecoderWeights,
    mesh: jax.sharding.Mesh,
    tokenizer: tokenizers.Tokenizer,
    step: int = 0,
    imported: bool = False,
  ):
    """Keeps the results of `decoding.for_inference` and, on `mesh`, of `decoding.weights`.

    Texts of a model that is `imported`, or trained from such, begin and end as its files say: often
    nothing stands before a prompt. Those of others begin and end with the tokenizer's separator.
    """
    self.model, self.tokenizer, self.step = model, tokenizer, step
    self.weights, self.mesh = weights, mesh
    self.rows = math.prod(mesh.shape[axis] for axis in sharding.BATCH_AXES)
    self._all_logits = jax.jit(functools.partial(decoding.logits_of_rows, model=model))
    num_ids = min(tokenizer.vocab_size, model.vocab_size)
    self.imported = imported
    self.before = tokenizer.before if imported else [tokenizer.separator]
    self._ends = tuple(tokenizer.ends if imported else ()) or (tokenizer.separator,)
    options: dict[str, Any] = dict(model=model, num_ids=num_ids, ends=self._ends)
    self._prefill = jax.jit(
      functools.partial(prefill, **options), static_argnames=("slots", "kind")
    )
    self._decode = jax.jit(
      functools.partial(decode, **options), static_argnames="kind", donate_argnames="cache"
    )
    self._memory = memory.Memory(mesh)
    self.seconds = {"prefill": 0.0, "decode": 0.0}  # of the last generation
    self.counts = {"prefill": 0, "decode": 0}  # tokens of the last generation

  def encode(self, text: str) -> np.ndarray:
    """Returns the ids of a text that begins a document, int64 [T], the ids `before` it included."""
    begun = [*self.before, *self.tokenizer.encode(text)]
    return np.asarray(begun or [self.tokenizer.prefix])

  def logits(self, tokens: Any) -> np.ndarray:
    """Returns next-token logits after every token, float32 [L, V] or [B, L, V].

    `tokens` are ids, [L] or [B, L]; a document begins with the ids `before`.

    Raises:
      UserError: the array is not of integers in this shape, or an id is not in the vocabulary.
    """
    ids_BL = np.asarray(tokens)
    if ids_BL.ndim not in (1, 2) or not ids_BL.size or ids_BL.dtype.kind not in "iu":
      raise UserError(f"tokens of {ids_BL.dtype}{ids_BL.shape}: give integers, [L] or [B, L]")
    if ids_BL.min() < 0 or ids_BL.max() >= self.model.vocab_size:
      raise UserError(f"a token of {ids_BL.max()}: ids are from 0 to {self.model.vocab_size - 1}")
    rows = np.atleast_2d(ids_BL)
    what = f"{len(rows):,} rows of {rows.shape[1]:,} tokens"
    B, L = padding.padded_sizes(len(rows), rows.shape[1], self.rows)
    memory.check_count(what, B * L)
    with jax.set_mesh(self.mesh), memory.one_line(what):
      arguments = self.weights, *sharding.place(padding.padded(list(rows), self.rows), self.mesh)
      self._memory.check(what, self._all_logits, *arguments)
      logits = sharding.whole(self._all_logits(*arguments))
    logits = logits[: len(rows), -rows.shape[1] :]
    return logits if ids_BL.ndim == 2 else logits[0]

  def generate(self, prompts: str | Sequence[Prompt], **options: Any) -> list[Completion]:
    """Returns `num_samples` continuations of each prompt; the options are those of `stream`."""
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    samples = options.get("num_samples", 1)
    rows: list[list[int]] = [[] for _ in range(len(prompts) * samples)]
    for chunk in self.stream(prompts, **options):
      for ids, new in zip(rows, chunk, strict=True):
        ids.extend(new)
    return [self.completion(prompts[i // samples], ids) for i, ids in enumerate(rows)]

  def completion(self, prompt: Prompt, ids: list[int]) -> Completion:
    """Decodes the ids drawn after a prompt, without the one that ends the document."""
    finished = bool(ids) and ids[-1] in self._ends
    ids = ids[:-1] if finished else ids
    text = self.tokenizer.decode(ids)
    return Completion(prompt=prompt, text=text, tokens=ids, finished=finished)

  def stream(
    self,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    num_samples: int = 1,
  ) -> Iterator[list[list[int]]]:
    """Yields the new ids of every row, chunk by chunk.

    The last id of a finished row is one that ends a document.

    Args:
      prompts: of any lengths; rows are the samples of prompt 0, then those of prompt 1, ...
      max_new_tokens: the most tokens that each row gets.
      temperature: of the softmax that tokens are drawn from; 0 takes the most probable token.
      top_k: how many of the most probable tokens can be drawn; 0 for all.
      top_p: draws from the fewest tokens that together have this probability (1904.09751).
      seed: the same seed draws the same tokens on every mesh.
      num_samples: continuations of each prompt.
    """
    if not prompts:
      raise UserError("no prompt: give at least one, which may be empty")
    check_generation(
      {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
        "num_samples": num_samples,
      }
    )
    draw, kind = sampling.options(temperature, top_k, top_p, self.model.vocab_size)
    seed_of_draws = np.uint32(seed)  # as a Python int it would have to be an int32
    encoded = [self._ids(prompt) for prompt in prompts]
    longest, count = max(map(len, encoded)), len(encoded) * num_samples
    B, L = padding.padded_sizes(count, longest, self.rows)
    slots = -(-(L + max_new_tokens) // _SLOT_MULTIPLE) * _SLOT_MULTIPLE
    what = f"{count:,} prompts of up to {longest:,} tokens and {max_new_tokens:,} new ones"
    memory.check_count(what, B * slots)
    rows = [ids for ids in encoded for _ in range(num_samples)]
    done = np.arange(B) >= len(rows)
    with jax.set_mesh(self.mesh), memory.one_line(what):
      placed = sharding.place((*padding.padded(rows, self.rows), done), self.mesh)
      arguments = self.weights, *placed, seed_of_draws, draw
      self._memory.check(what, self._prefill, *arguments, kind=kind, slots=slots)
      start = time.perf_counter()
      cache, token_B, done_B = self._prefill(*arguments, kind=kind, slots=slots)
      first_B, finished = sharding.whole((token_B, done_B))
      self.seconds = {"prefill": time.perf_counter() - start, "decode": 0.0}
      self.counts = {"prefill": sum(map(len, rows)), "decode": 0}
      yield first_B[: len(rows), None].tolist()
      length, steps = 1, 1  # tokens of a row so far; tokens of the next chunk
      while length < max_new_tokens and not finished.all():
        start = time.perf_counter()
        steps = min(steps, max_new_tokens - length)
        cache, token_B, done_B, *drawn = self._decode(
          self.weights, cache, token_B, done_B, seed_of_draws, length, steps, draw, kind=kind
        )
        before, (finished, out_BN, columns) = finished, sharding.whole((done_B, *drawn))
        new = self._new(out_BN, before, int(columns), len(rows))
        length += int(columns)
        seconds = time.perf_counter() - start
        self.seconds["decode"] += seconds
        self.counts["decode"] += sum(map(len, new))
        yield new
        steps = min(2 * steps, _CHUNK)
        if jax.process_count() == 1:  # of several, each has another clock
          steps = min(steps, max(int(_CHUNK_SECONDS / seconds * int(columns)), 1))

  def _ids(self, prompt: Prompt) -> np.ndarray:
    if isinstance(prompt, str):
      return self.encode(prompt)
    ids = np.asarray(prompt, np.int64)
    if not ids.size or ids.min() < 0 or ids.max() >= self.model.vocab_size:
      raise UserError(f"a prompt of ids: give some, from 0 to {self.model.vocab_size - 1}")
    return ids

  def speed(self) -> str:
    """Describes the speed of the last generation; a first generation includes compilation."""
    rates = (
      f"{name} {count:,} tokens in {self.seconds[name]:.2f} s"
      + (f", {count / self.seconds[name]:,.1f} tokens/s" if count else "")
      for name, count in self.counts.items()
    )
    return "; ".join(rates)

  def _new(
    self, out_BN: np.ndarray, finished: np.ndarray, columns: int, rows: int
  ) -> list[list[int]]:
    """Returns each row's ids of a chunk up to one that ends it; a finished row has none."""
    new = []
    for ids, done in zip(out_BN[:rows, :columns].tolist(), finished, strict=False):
      last = next((place for place, i in enumerate(ids) if i in self._ends), len(ids))
      new.append([] if done else ids[: last + 1])
    return new


def prefill(
  weights: DecoderWeights,
  tokens_BL: jax.Array,
  start_B: jax.Array,
  done_B: jax.Array,
  seed: jax.Array,
  draw: sampling.Sampling,
  *,
  model: Model,
  num_ids: int,
  ends: tuple[int, ...],
  slots: int,
  kind: sampling.Kind,
) -> tuple[decoding.Cache, jax.Array, jax.Array]:
  """Returns the cache of the prompts, each row's first token_B, and done_B: which rows end."""
  cache = decoding.empty_cache(model, start_B, slots)
  out = decoding.forward_with_cache(weights, model, cache, tokens_BL, all_logits=False)
  token_B = sampling.sample(out.logits_BLV[:, 0], seed, 0, draw, kind, num_ids)
  return out.cache, token_B, done_B | jnp.isin(token_B, jnp.array(ends))


def decode(
  weights: DecoderWeights,
  cache: decoding.Cache,
  token_B: jax.Array,
  done_B: jax.Array,
  seed: jax.Array,
  length: jax.Array,
  steps: jax.Array,
  draw: sampling.Sampling,
  *,
  model: Model,
  num_ids: int,
  ends: tuple[int, ...],
  kind: sampling.Kind,
) -> tuple[decoding.Cache, jax.Array, jax.Array, jax.Array, jax.Array]:
  """Draws up to `steps` more tokens of each row, of which `length` are drawn already.

  Returns:
    The cache, the last token_B, done_B, out_BN, and the number of its columns that were drawn.
  """
  out_BN = jnp.full((token_B.shape[0], _CHUNK), ends[0], jnp.int32)
  never = jnp.iinfo(jnp.int32).max // 2

  def unfinished(carry: Any) -> jax.Array:
    number, _, _, done_B, _ = carry
    return (number < steps) & ~jnp.all(done_B)

  def step(carry: Any) -> Any:
    number, cache, token_B, done_B, out_BN = carry
    # A finished row is padding from now on, so that no expert is read for it.
    cache = cache._replace(start_B=jnp.where(done_B, never, cache.start_B))
    out = decoding.forward_with_cache(weights, model, cache, token_B[:, None], all_logits=False)
    next_B = sampling.sample(out.logits_BLV[:, 0], seed, length + number, draw, kind, num_ids)
    token_B = jnp.where(done_B, ends[0], next_B)
    out_BN = jax.lax.dynamic_update_slice(out_BN, token_B[:, None], (0, number))
    return number + 1, out.cache, token_B, done_B | jnp.isin(token_B, jnp.array(ends)), out_BN

  carry = (jnp.zeros((), jnp.int32), cache, token_B, done_B, out_BN)
  number, cache, token_B, done_B, out_BN = jax.lax.while_loop(unfinished, step, carry)
  return cache, token_B, done_B, out_BN, number
