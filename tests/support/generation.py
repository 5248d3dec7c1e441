"""Models of random weights that generate, and what the full forward pass says of them."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.config import Model, Router, Score
from moe_jax.data import tokenizers
from moe_jax.inference import decoding, generate
from moe_jax.model import pattern, transformer
from moe_jax.moe.routing import Tokens
from tests.support.toys import build, mesh_of, toy_config, with_delta, with_latents, with_options

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
  "options": {},  # and toys.with_options
  "latents": {},  # and toys.with_latents
  "delta": {},  # and toys.with_delta
}  # fmt: skip


class Letters(tokenizers.Tokenizer):
  """24 ids: letters, and the separator."""

  def __init__(self):
    super().__init__([bytes([97 + i]) for i in range(23)] + [b""], 23, "letters")

  def encode(self, text):
    return np.frombuffer(text.encode(), np.uint8) - 97


@dataclasses.dataclass(eq=False)
class Trained:
  model: Model  # as generation runs it: nothing drops
  params: nnx.State
  bias_ZE: jax.Array

  @functools.cached_property
  def logits(self):
    """The compiled full forward pass, [1, L] -> [1, L, V]."""

    @jax.jit
    def logits(params, bias_ZE, tokens_BL):
      positions_BL = jnp.arange(tokens_BL.shape[1], dtype=jnp.int32)[None]
      segments_BL = jnp.ones_like(tokens_BL)
      key = jax.random.key(0)
      tokens = Tokens(tokens_BL, segments_BL, positions_BL)
      return transformer.forward(self.model, params, bias_ZE, tokens, key, train=False).logits_BLV

    return logits


class Made(NamedTuple):
  model: generate.TextGenerator  # ready to generate
  trained: Trained  # what training would have left


def model_of(name="topk", mesh=None, **changes) -> Made:
  """Random weights with uneven routers."""
  model = dataclasses.replace(toy_config(**MODELS[name]).model, **changes)
  more = {"options": with_options, "latents": with_latents, "delta": with_delta}
  model = more[name](model) if name in more else model
  config = dataclasses.replace(toy_config(), model=model)
  _, params = build(config, 0)
  bias_ZE = 0.1 * jax.random.normal(jax.random.key(1), pattern.bias_shape(model))
  mesh = mesh or mesh_of()
  with jax.set_mesh(mesh):
    ours = decoding.for_inference(model)
    weights = decoding.weights(ours, params, bias_ZE)
  return Made(
    generate.TextGenerator(ours, weights, mesh, Letters()), Trained(ours, params, bias_ZE)
  )


def full_forward(trained, rows):
  """Transformer's own logits [L, V] of each row by itself, without drops.

  Rows are padded at their end, which a causal model does not see, so that one program serves all.
  """
  longest = -(-max(map(len, rows)) // 16) * 16
  found = []
  with jax.set_mesh(mesh_of()):
    for row in rows:
      tokens_BL = np.zeros((1, longest), np.int32)
      tokens_BL[0, : len(row)] = row
      logits_LV = np.asarray(trained.logits(trained.params, trained.bias_ZE, tokens_BL))[0]
      found.append(logits_LV[: len(row)])
  return found


def empty_cache(model, start_B, slots):
  make = functools.partial(decoding.empty_cache, model, slots=slots)
  return jax.jit(make)(start_B=jnp.asarray(start_B, jnp.int32))


def rows_of(lengths, seed=0):
  rng = np.random.default_rng(seed)
  return [rng.integers(0, 24, length) for length in lengths]


def greedy(ours, prompts, **options):
  return [c.tokens for c in ours.generate(prompts, temperature=0, **options)]
