"""The decoder with a cache of keys and values: its layers unrolled, and nothing dropped.

Few tokens at a time take as long as it takes to read the weights, so layers are arrays of their
own, and the kernels may lay each out anew (kernels/packing.py). model/transformer.py has the layer.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import config as config_lib
from moe_jax import sharding, validation
from moe_jax.config import Dispatch, Exchange
from moe_jax.kernels import cache as kv_cache
from moe_jax.kernels import packing
from moe_jax.kernels.attention import attention as segment_attention
from moe_jax.kernels.cache import KeysValues
from moe_jax.kernels.linear import Weight
from moe_jax.model import transformer
from moe_jax.model.feedforward import FFNWeights
from moe_jax.model.transformer import LayerWeights, Tokens
from moe_jax.moe.counts import Choices


class Weights(NamedTuple):
  """Compute dtype, except for norms, routers and biases, which are float32."""

  embed_VD: jax.Array
  layers: tuple[LayerWeights, ...]
  final_norm_D: jax.Array
  head_DV: Weight


class Cache(NamedTuple):
  """Keys and values of the tokens so far; rows are aligned at their end."""

  layers: tuple[KeysValues, ...]
  start_B: jax.Array  # int32, the first slot in use; before it is padding
  length: jax.Array  # int32 [], slots in use


class Decoded(NamedTuple):
  logits_BLV: jax.Array  # float32; L = 1 without all_logits
  cache: Cache
  choices: list[Choices]  # of each MoE layer, with `trace`


def for_inference(model: config_lib.Model) -> config_lib.Model:
  """The model without drops; UserError for routers that a generator cannot follow."""
  validation.validate_generation(model.moe)
  moe = dataclasses.replace(
    model.moe, dispatch=Dispatch.GROUPED, group_size=0, exchange=Exchange.AUTO, exchange_factor=0.0
  )
  return dataclasses.replace(model, moe=moe)


def weights(model: config_lib.Model, params: Any, bias_ZE: jax.Array) -> Weights:
  """A Transformer's parameters, laid out for inference on the mesh in force.

  Args:
    model: the shapes.
    params: nnx state of a Transformer.
    bias_ZE: float32 balancing biases.
  """

  def unpacked(params: Any, bias_ZE: jax.Array) -> Weights:
    return unstacked(model, params, bias_ZE)

  def packed(params: Any, bias_ZE: jax.Array) -> Weights:
    return _packed(unpacked(params, bias_ZE))

  if packing.packs():
    return jax.jit(packed)(params, bias_ZE)
  shapes = jax.eval_shape(unpacked, params, bias_ZE)
  shardings = sharding.param_shardings(shapes, jax.sharding.get_mesh())
  return jax.jit(unpacked, out_shardings=shardings)(params, bias_ZE)


def unstacked(model: config_lib.Model, params: Any, bias_ZE: jax.Array) -> Weights:
  """The same, each layer's arrays as they are trained."""
  dtype = jnp.dtype(model.compute_dtype.value)
  decoder = transformer.merge(model, params)
  layers: list[LayerWeights] = []
  moe_layers = 0
  for stack, (repeats, _) in zip(decoder.scans, transformer.layer_pattern(model), strict=True):
    graph, stacked = nnx.split(stack)
    for number in range(repeats):
      period = nnx.merge(graph, jax.tree.map(lambda w, number=number: w[number], stacked))
      for block in period.blocks:
        layers.append(block.weights(dtype, bias_ZE[min(moe_layers, len(bias_ZE) - 1)]))
        moe_layers += not isinstance(layers[-1].ffn, FFNWeights)
  embed_VD = decoder.embed_VD[...].astype(dtype)
  head_DV = embed_VD.T if model.tied_head else decoder.head_DV[...].astype(dtype)
  return Weights(embed_VD, tuple(layers), decoder.final_norm.weights(), head_DV)


def _packed(weights: Weights) -> Weights:
  layers = tuple(_packed_layer(layer) for layer in weights.layers)
  return weights._replace(layers=layers, head_DV=packing.matrix(weights.head_DV))


def _packed_layer(layer: LayerWeights) -> LayerWeights:
  heads = layer.attention
  heads = heads._replace(
    q_DHA=packing.matrix(heads.q_DHA), k_DGA=packing.matrix(heads.k_DGA),
    v_DGA=packing.matrix(heads.v_DGA), out_HAD=packing.matrix(heads.out_HAD, inner=2),
  )  # fmt: skip
  ffn = layer.ffn
  if isinstance(ffn, FFNWeights):
    return layer._replace(attention=heads, ffn=_packed_ffn(ffn))
  moe = ffn.moe._replace(experts=packing.experts(ffn.moe.experts))
  shared = _packed_ffn(ffn.shared) if ffn.shared is not None else None
  return layer._replace(attention=heads, ffn=ffn._replace(moe=moe, shared=shared))


def _packed_ffn(ffn: FFNWeights) -> FFNWeights:
  return FFNWeights(*(packing.matrix(w) for w in ffn))


def empty_cache(model: config_lib.Model, start_B: jax.Array, slots: int) -> Cache:
  """Room for `slots` tokens of each row; start_B, int32: how much padding begins a row."""
  B, G, A = start_B.shape[0], model.num_kv_heads, model.head_dim
  dtype = jnp.dtype(model.compute_dtype.value)
  layers = tuple(kv_cache.empty(B, G, slots, A, dtype) for _ in range(model.num_layers))
  return Cache(layers, start_B, jnp.zeros((), jnp.int32))


def forward(
  weights: Weights,
  model: config_lib.Model,
  cache: Cache,
  tokens_BL: jax.Array,
  *,
  all_logits: bool,
  trace: bool = False,
) -> Decoded:
  """Next-token logits after more tokens, and the cache with them.

  Args:
    weights: of `weights`.
    model: of `for_inference`.
    cache: empty for L > 1 tokens (prefill); with any length for one (decode). Of tokens past its
      slots nothing is kept.
    tokens_BL: int32; what lies before a row's start is not read.
    all_logits: of every token, or only of the last.
    trace: also return the choices of each MoE layer.
  """
  L = tokens_BL.shape[1]
  slot_L = cache.length + jnp.arange(L)
  real_BL = slot_L[None] >= cache.start_B[:, None]
  positions_BL = jnp.maximum(slot_L[None] - cache.start_B[:, None], 0)
  tokens = Tokens(tokens_BL, real_BL.astype(jnp.int32), positions_BL)
  x_BLD = transformer.embed(weights.embed_VD, tokens_BL)
  key = jax.random.key(0)  # nothing is drawn: validate_generation refuses noise in evaluation
  layers: list[KeysValues] = []
  choices: list[Choices] = []
  for layer, kept in zip(weights.layers, cache.layers, strict=True):

    def attend(
      q_BLHA: jax.Array, k_BLGA: jax.Array, v_BLGA: jax.Array, kept: KeysValues = kept
    ) -> tuple[jax.Array, KeysValues]:
      kept = kv_cache.write(kept, k_BLGA, v_BLGA, cache.length)
      if L == 1:
        return kv_cache.attention(q_BLHA, kept, cache.start_B, cache.length), kept
      y_BLHA = segment_attention(q_BLHA, k_BLGA, v_BLGA, tokens.segments_BL, model.attention)
      return y_BLHA, kept

    out = transformer.decoder_layer(
      x_BLD, layer, tokens, attend, model, key, train=False, trace=trace
    )
    x_BLD = out.x_BLD
    layers.append(out.cache)
    choices += [out.choices] if out.choices is not None else []
  if not all_logits:
    x_BLD = x_BLD[:, -1:]
  logits_BLV = transformer.next_token_logits(x_BLD, weights.final_norm_D, weights.head_DV, model)
  return Decoded(logits_BLV, Cache(tuple(layers), cache.start_B, cache.length + L), choices)
