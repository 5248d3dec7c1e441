"""The decoder at inference: a KV cache, nothing dropped, and memory read once.

The same function as transformer.py, laid out for few tokens at a time, where reading weights is
what takes the time: layers and, on a CPU, experts are arrays of their own, so that nothing copies
a slice and only the experts that a token chose are read; matrices lie with their output first.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import config as config_lib
from moe_jax import sharding, validation
from moe_jax.config import Dispatch, Exchange
from moe_jax.kernels.experts import Experts
from moe_jax.model.attention import cached_attention, causal_attention, rms_norm, rope
from moe_jax.model.transformer import abstract, layer_pattern
from moe_jax.moe import layer as moe_lib

_FEW = 64  # tokens, for _linear


class FFNWeights(NamedTuple):
  gate_FD: jax.Array
  up_FD: jax.Array
  down_DF: jax.Array


class MoEWeights(NamedTuple):
  router: dict[str, jax.Array]  # float32 by name
  bias_E: jax.Array  # float32
  experts: Experts  # stacked; or of each expert its own arrays, with their output first
  shared: FFNWeights | None


class AttentionWeights(NamedTuple):
  q_HAD: jax.Array
  k_GAD: jax.Array
  v_GAD: jax.Array
  out_DHA: jax.Array
  q_norm_A: jax.Array | None  # float32
  k_norm_A: jax.Array | None


class LayerWeights(NamedTuple):
  attention_norm_D: jax.Array
  attention: AttentionWeights
  ffn_norm_D: jax.Array
  ffn: FFNWeights | MoEWeights


class Weights(NamedTuple):
  """Compute dtype, except for norms, routers and biases, which are float32."""

  embed_VD: jax.Array
  layers: tuple[LayerWeights, ...]
  final_norm_D: jax.Array
  head_VD: jax.Array


class Cache(NamedTuple):
  """Keys and values of the tokens so far, rows aligned at their end; S slots.

  On one CPU device B and G are one dimension: XLA:CPU would copy a cache that it reshapes.
  """

  k_BGSA: tuple[jax.Array, ...]  # of each layer
  v_BGSA: tuple[jax.Array, ...]
  start_B: jax.Array  # int32, the first slot in use; before it is padding
  length: jax.Array  # int32 [], slots in use


def for_inference(model: config_lib.Model) -> config_lib.Model:
  """The model without drops; UserError for routers that a generator cannot follow."""
  validation.validate_generation(model.moe)
  moe = dataclasses.replace(
    model.moe, dispatch=Dispatch.GROUPED, capacity_factor=0.0, eval_capacity_factor=0.0,
    group_size=0, exchange=Exchange.AUTO, exchange_factor=0.0,
  )  # fmt: skip
  return dataclasses.replace(model, moe=moe)


def experts_apart() -> bool:
  """Whether each expert is an array of its own: on one CPU device, which copies what it slices."""
  mesh = jax.sharding.get_abstract_mesh()
  return jax.default_backend() == "cpu" and mesh.size == 1


def weights(model: config_lib.Model, params: Any, bias_ZE: jax.Array) -> Weights:
  """A Transformer's parameters, laid out for inference on the mesh in force.

  Args:
    model: the shapes.
    params: nnx state of a Transformer.
    bias_ZE: balancing biases.
  """
  apart = experts_apart()

  def layout(params, bias_ZE):
    return _weights(model, params, bias_ZE, apart)

  shardings = None
  if not apart:
    shapes = jax.eval_shape(layout, params, bias_ZE)
    shardings = sharding.param_shardings(shapes, jax.sharding.get_mesh())
  return jax.jit(layout, out_shardings=shardings)(params, bias_ZE)


def _weights(model, params, bias_ZE, apart):
  dtype = jnp.dtype(model.compute_dtype.value)
  transformer = nnx.merge(abstract(model)[0], params)

  def ffn(module, z):
    gate_DF, up_DF, down_FD = (w[...][z] for w in (module.gate_DF, module.up_DF, module.down_FD))
    return FFNWeights(*(w.astype(dtype).T for w in (gate_DF, up_DF, down_FD)))

  def moe(module, z, bias_E):
    stacked = Experts(
      *(w[...][z].astype(dtype) for w in (module.gate_EDF, module.up_EDF, module.down_EFD))
    )
    if apart:
      stacked = Experts(*(tuple(w.T for w in by_expert) for by_expert in stacked))
    shared = ffn(module.shared, z) if module.shared is not None else None
    router = {name: w[z] for name, w in module.router().items()}
    return MoEWeights(router, bias_E, stacked, shared)

  def attention(module, z):
    inputs = (w[...][z] for w in (module.q_DHA, module.k_DGA, module.v_DGA))
    q_HAD, k_GAD, v_GAD = (jnp.moveaxis(w, 0, -1).astype(dtype) for w in inputs)
    out_DHA = jnp.moveaxis(module.out_HAD[...][z], -1, 0).astype(dtype)
    norms = (n and n.norm_A[...][z] for n in (module.q_norm, module.k_norm))
    return AttentionWeights(q_HAD, k_GAD, v_GAD, out_DHA, *norms)

  layers, moe_layers = [], 0
  for stack, (repeats, _) in zip(transformer.scans, layer_pattern(model), strict=True):
    for z in range(repeats):
      for block in stack.blocks:
        if block.is_moe:
          of_block = moe(block.ffn, z, bias_ZE[moe_layers])
          moe_layers += 1
        else:
          of_block = ffn(block.ffn, z)
        layers.append(
          LayerWeights(
            block.attention_norm.norm_D[...][z], attention(block.attention, z),
            block.ffn_norm.norm_D[...][z], of_block,
          )
        )  # fmt: skip
  embed_VD = transformer.embed_VD[...].astype(dtype)
  head_VD = embed_VD if model.tied_head else transformer.head_DV[...].astype(dtype).T
  return Weights(embed_VD, tuple(layers), transformer.final_norm.norm_D[...], head_VD)


def empty_cache(model: config_lib.Model, start_B: jax.Array, slots: int) -> Cache:
  """Room for `slots` tokens of each row; start_B, int32: how much padding begins a row."""
  rows = (start_B.shape[0], model.num_kv_heads)
  rows = (math.prod(rows),) if experts_apart() else rows
  empty = jnp.zeros((*rows, slots, model.head_dim), jnp.dtype(model.compute_dtype.value))
  k, v = (tuple(_sharded(empty) for _ in range(model.num_layers)) for _ in range(2))
  return Cache(k, v, start_B, jnp.zeros((), jnp.int32))


def forward(
  weights: Weights,
  model: config_lib.Model,
  cache: Cache,
  tokens_BL: jax.Array,
  *,
  all_logits: bool,
  trace: bool = False,
) -> tuple[Any, ...]:
  """Next-token logits after more tokens, and the cache with them.

  Args:
    weights: of `weights`.
    model: of `for_inference`.
    cache: empty for L > 1 tokens (prefill); with any length for one (decode).
    tokens_BL: int32; what lies before a row's start is not read.
    all_logits: of every token, or only of the last.
    trace: also return the statistics.Choices of each MoE layer.

  Returns:
    float32 logits_BLV, L = 1 without all_logits; the cache, of which past its S slots nothing is
    kept; with `trace`, a list of Choices.
  """
  L = tokens_BL.shape[1]
  slot_L = cache.length + jnp.arange(L)
  real_BL = slot_L[None] >= cache.start_B[:, None]
  positions_BL = jnp.maximum(slot_L[None] - cache.start_B[:, None], 0)
  embed_VD = sharding.constrain(weights.embed_VD, "VD")
  x_BLD = sharding.constrain(embed_VD[tokens_BL], "BLD")
  keys, values, choices = [], [], []
  for layer, k_BGSA, v_BGSA in zip(weights.layers, cache.k_BGSA, cache.v_BGSA, strict=True):
    h_BLD = rms_norm(x_BLD, layer.attention_norm_D, model.norm_eps)
    q_BLHA, k_BLGA, v_BLGA = _queries_keys_values(h_BLD, layer.attention, positions_BL, model)
    k_BGSA = _write(k_BGSA, k_BLGA, cache.length)
    v_BGSA = _write(v_BGSA, v_BLGA, cache.length)
    if L > 1:
      y_BLHA = causal_attention(q_BLHA, k_BLGA, v_BLGA, real_BL.astype(jnp.int32))
    else:
      y_BLHA = cached_attention(q_BLHA, k_BGSA, v_BGSA, cache.start_B, cache.length)
    x_BLD += _linear(layer.attention.out_DHA, y_BLHA, 2)
    h_BLD = rms_norm(x_BLD, layer.ffn_norm_D, model.norm_eps)
    if isinstance(layer.ffn, FFNWeights):
      y_BLD = _swiglu(h_BLD, layer.ffn)
    else:
      y_BLD, of_layer = _experts(h_BLD, layer.ffn, model.moe, tokens_BL, real_BL, trace)
      choices.append(of_layer)
    x_BLD = sharding.constrain(x_BLD + y_BLD, "BLD")
    keys.append(k_BGSA)
    values.append(v_BGSA)
  if not all_logits:
    x_BLD = x_BLD[:, -1:]
  logits_BLV = _linear(
    weights.head_VD, rms_norm(x_BLD, weights.final_norm_D, model.norm_eps), 1, jnp.float32
  )
  cache = Cache(tuple(keys), tuple(values), cache.start_B, cache.length + L)
  return (logits_BLV, cache, choices) if trace else (logits_BLV, cache)


def _sharded(k_BGSA):
  return sharding.constrain(k_BGSA, "BGSA") if k_BGSA.ndim == 4 else k_BGSA


def _write(k_BGSA, new_BLGA, length):
  new_BGLA = new_BLGA.swapaxes(1, 2)
  new = new_BGLA.reshape(*k_BGSA.shape[:-2], *new_BGLA.shape[2:])
  start = (0,) * (k_BGSA.ndim - 2) + (length, 0)
  return _sharded(jax.lax.dynamic_update_slice(k_BGSA, new, start))


def _linear(w, x_BL, contracted: int, dtype=None):
  """w[..., *inner] times x_BL[..., *inner] over the `contracted` inner dimensions, [B, L, *outer].

  Of up to 64 tokens as weights times tokens. XLA:CPU would turn this into tokens times weights,
  which takes up to three times as long, but does not look across the barriers.
  """
  B, L = x_BL.shape[:2]
  outer, inner = w.shape[:-contracted], w.shape[-contracted:]
  assert x_BL.shape[2:] == inner
  w_OI, x_TI = w.reshape(-1, math.prod(inner)), x_BL.reshape(B * L, -1)
  if B * L > _FEW:
    y_TO = jnp.dot(x_TI, w_OI.T, preferred_element_type=dtype)
  else:
    x_IT = jax.lax.optimization_barrier(x_TI.T)
    y_OT = jnp.dot(w_OI, x_IT, preferred_element_type=dtype)
    y_TO = jax.lax.optimization_barrier(y_OT).T
  return y_TO.reshape(B, L, *outer)


def _queries_keys_values(x_BLD, attention, positions_BL, model):
  q_BLHA, k_BLGA, v_BLGA = (
    _linear(w, x_BLD, 1) for w in (attention.q_HAD, attention.k_GAD, attention.v_GAD)
  )
  if attention.q_norm_A is not None:
    q_BLHA = rms_norm(q_BLHA, attention.q_norm_A, model.norm_eps)
    k_BLGA = rms_norm(k_BLGA, attention.k_norm_A, model.norm_eps)
  q_BLHA = sharding.constrain(rope(q_BLHA, positions_BL, model.rope_base), "BLHA")
  k_BLGA = sharding.constrain(rope(k_BLGA, positions_BL, model.rope_base), "BLGA")
  return q_BLHA, k_BLGA, v_BLGA


def _swiglu(x_BLD, ffn):
  gate_BLF, up_BLF = _linear(ffn.gate_FD, x_BLD, 1), _linear(ffn.up_FD, x_BLD, 1)
  return _linear(ffn.down_DF, jax.nn.silu(gate_BLF) * up_BLF, 1)


def _experts(x_BLD, layer, moe, ids_BL, real_BL, trace):
  weights = moe_lib.MoEWeights(layer.router, layer.bias_E, layer.experts)
  tokens = moe_lib.Tokens(real_BL, ids_BL)
  key = jax.random.key(0)  # nothing is drawn: validate_generation refuses noise in evaluation
  y_BLD, _, choices = moe_lib.moe_layer(x_BLD, tokens, weights, moe, key, train=False, trace=trace)
  if layer.shared is not None:
    y_BLD += _swiglu(x_BLD, layer.shared)
  return y_BLD, choices
