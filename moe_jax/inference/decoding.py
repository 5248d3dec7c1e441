"""The decoder with a cache of keys and values: its layers are unrolled, and no token is dropped.

Computing few tokens takes as long as reading the weights. Therefore each layer's weights are
separate arrays, which the kernels may store in another layout (kernels/packing.py). The layer is
`decoder_layer` of model/transformer.py.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import sharding
from moe_jax.config import Dispatch, Model
from moe_jax.kernels import cache as kv_cache
from moe_jax.kernels import packing
from moe_jax.kernels.attention import segment_attention
from moe_jax.kernels.cache import KeysValues, Stored
from moe_jax.kernels.delta_rule import DeltaState
from moe_jax.kernels.linear import Weight
from moe_jax.kernels.mask import Mask
from moe_jax.model import delta, pattern, transformer
from moe_jax.model.feedforward import FFNWeights
from moe_jax.model.transformer import LayerWeights
from moe_jax.moe import dispatch, validation
from moe_jax.moe.counts import Choices
from moe_jax.moe.routing import Mode, Tokens


class DecoderWeights(NamedTuple):
  """The weights of the decoder in the compute dtype; norms, routers and biases are float32."""

  embed_VD: jax.Array
  layers: tuple[LayerWeights, ...]
  final_norm_D: jax.Array
  head_DV: Weight


class Cache(NamedTuple):
  """Keys and values of the tokens so far; the newest tokens of all rows share a slot.

  A layer with a window keeps the tokens of the window alone, a layer of the delta rule its state.
  """

  layers: tuple[KeysValues | DeltaState, ...]
  start_B: jax.Array  # int32, the first token of each row; those before it are padding
  length: jax.Array  # int32 [], tokens so far


class Decoded(NamedTuple):
  """What `forward_with_cache` returns."""

  logits_BLV: jax.Array  # float32; L = 1 without all_logits
  cache: Cache  # with the tokens added
  choices: list[Choices]  # one for each MoE layer; empty without `trace`
  stream: list[jax.Array]  # x_BLD of the embedding, then after each layer; empty without `trace`


def for_inference(model: Model) -> Model:
  """Returns the model with dispatch and capacity set so that no token is dropped.

  Raises a UserError where the router cannot generate text token by token.
  """
  validation.validate_generation(model.moe)
  moe = dataclasses.replace(
    model.moe, dispatch=Dispatch.GROUPED, group_size=0, **dispatch.DEFAULT_EXCHANGE
  )
  return dataclasses.replace(model, moe=moe)


def weights(model: Model, params: Any, bias_ZE: jax.Array) -> DecoderWeights:
  """Lays out a Transformer's parameters, an nnx state, for inference on the mesh in force."""
  unpacked = functools.partial(unstacked, model)
  if packing.packs():
    return jax.jit(lambda *stacked: _packed(unpacked(*stacked)))(params, bias_ZE)
  shapes = jax.eval_shape(unpacked, params, bias_ZE)
  # A step of decoding reads all weights for few tokens, so that no more than `fsdp` splits them.
  shardings = sharding.param_shardings(shapes, jax.sharding.get_mesh(), spread=False)
  return jax.jit(unpacked, out_shardings=shardings)(params, bias_ZE)


def unstacked(model: Model, params: Any, bias_ZE: jax.Array) -> DecoderWeights:
  """Returns the weights with separate arrays for each layer, in the layout of training."""
  dtype = jnp.dtype(model.compute_dtype.value)
  decoder = transformer.merge(model, params)
  layers: list[LayerWeights] = []
  moe_layers = 0
  for stack, (repeats, unit) in zip(decoder.scans, pattern.layer_pattern(model), strict=True):
    graph, stacked = nnx.split(stack)
    for number in range(repeats):
      period = nnx.merge(graph, jax.tree.map(lambda w, number=number: w[number], stacked))
      for kind, block in zip(unit, period.blocks, strict=True):
        layers.append(block.weights(dtype, bias_ZE[moe_layers] if kind.is_moe else None))
        moe_layers += kind.is_moe
  embed_VD = decoder.embed_VD[...].astype(dtype)
  head_DV = embed_VD.T if model.tied_head else decoder.head_DV[...].astype(dtype)
  return DecoderWeights(
    embed_VD=embed_VD,
    layers=tuple(layers),
    final_norm_D=decoder.final_norm.weights(),
    head_DV=head_DV,
  )


def _packed(weights: DecoderWeights) -> DecoderWeights:
  layers = tuple(_packed_layer(layer) for layer in weights.layers)
  return weights._replace(layers=layers, head_DV=packing.matrix(weights.head_DV))


def _packed_layer(layer: LayerWeights) -> LayerWeights:
  attention, ffn = layer.attention.packed(packing.matrix), layer.ffn
  if isinstance(ffn, FFNWeights):
    return layer._replace(attention=attention, ffn=_packed_ffn(ffn))
  moe = ffn.moe._replace(experts=packing.packed_experts(ffn.moe.experts))
  shared = _packed_ffn(ffn.shared) if ffn.shared is not None else None
  return layer._replace(attention=attention, ffn=ffn._replace(moe=moe, shared=shared))


def _packed_ffn(ffn: FFNWeights) -> FFNWeights:
  gate_DF = packing.matrix(ffn.gate_DF) if ffn.gate_DF is not None else None
  return FFNWeights(gate_DF, packing.matrix(ffn.up_DF), packing.matrix(ffn.down_FD))


def empty_cache(model: Model, start_B: jax.Array, slots: int) -> Cache:
  """Returns a cache with room for `slots` tokens of each row.

  start_B, int32, is the number of padding tokens at the start of each row.
  """
  B, G, A, latent = start_B.shape[0], model.num_kv_heads, model.head_dim, model.latent
  if latent.kv_dim:
    G, A = 1, latent.kv_dim + latent.rotary_dim
  dtype, values = jnp.dtype(model.compute_dtype.value), not latent.kv_dim
  layers = tuple(
    delta.empty_state(model, B)
    if kind.delta
    else kv_cache.empty(B, G, min(slots, kind.mask.window or slots), A, dtype, values=values)
    for kind in pattern.layer_kinds(model)
  )
  return Cache(layers, start_B, jnp.zeros((), jnp.int32))


def forward_with_cache(
  weights: DecoderWeights,
  model: Model,
  cache: Cache,
  tokens_BL: jax.Array,
  *,
  all_logits: bool,
  trace: bool = False,
) -> Decoded:
  """Computes next-token logits after more tokens, and adds the tokens to the cache.

  Args:
    weights: the result of `weights`.
    model: the result of `for_inference`.
    cache: an empty one for L > 1 tokens (prefill); one of any length for one token (decode).
    tokens_BL: int32; tokens before a row's start are not read.
    all_logits: whether to return the logits of every token, or only of the last.
    trace: whether to return the experts of each token in each MoE layer, and the residual stream.
  """
  L = tokens_BL.shape[1]
  slot_L = cache.length + jnp.arange(L)
  real_BL = slot_L[None] >= cache.start_B[:, None]
  positions_BL = jnp.maximum(slot_L[None] - cache.start_B[:, None], 0)
  tokens = Tokens(
    ids_BL=tokens_BL, segments_BL=real_BL.astype(jnp.int32), positions_BL=positions_BL
  )
  x_BLD = transformer.embed(weights.embed_VD, tokens_BL, model)
  key = jax.random.key(0)  # not used: validate_generation refuses routers with noise in evaluation
  layers: list[KeysValues | DeltaState] = []
  choices: list[Choices] = []
  stream = [x_BLD]
  kinds = pattern.layer_kinds(model)
  for kind, layer, layer_cache in zip(kinds, weights.layers, cache.layers, strict=True):

    def attend(
      q_BLHA: jax.Array,
      k_BLGA: jax.Array,
      v_BLGX: jax.Array | None,
      mask: Mask,
      stored: Stored | None = None,
      old: Any = layer_cache,
    ) -> tuple[jax.Array, KeysValues]:
      new = kv_cache.insert(old, stored or Stored(k_BLGA, v_BLGX), cache.length)
      if L == 1:
        return kv_cache.attend_to_cache(q_BLHA, new, cache.start_B, cache.length, mask), new
      segments_BL, kernel = tokens.segments_BL, model.attention
      return segment_attention(q_BLHA, k_BLGA, v_BLGX, segments_BL, kernel, mask), new

    out = transformer.decoder_layer(
      x_BLD,
      layer,
      tokens,
      layer_cache if isinstance(layer_cache, DeltaState) else attend,
      model,
      key,
      mask=kind.mask,
      mode=Mode(train=False, trace=trace),
    )
    x_BLD = out.x_BLD
    layers.append(out.cache)
    choices += [out.choices] if out.choices is not None else []
    stream.append(x_BLD)
  if not all_logits:
    x_BLD = x_BLD[:, -1:]
  logits_BLV = transformer.next_token_logits(x_BLD, weights.final_norm_D, weights.head_DV, model)
  cache = Cache(tuple(layers), cache.start_B, cache.length + L)
  return Decoded(logits_BLV, cache, choices, stream if trace else [])


def logits_of_rows(
  weights: DecoderWeights, tokens_BL: jax.Array, start_B: jax.Array, *, model: Model
) -> jax.Array:
  """Returns float32 logits_BLV after every token of rows that begin at the slots start_B."""
  cache = empty_cache(model, start_B, tokens_BL.shape[1])
  return forward_with_cache(weights, model, cache, tokens_BL, all_logits=True).logits_BLV
