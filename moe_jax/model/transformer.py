"""The decoder: one layer for training, prefill and decoding, and the parameters of the stack.

Training scans the layers over their stacked parameters; inference (inference/decoding.py) unrolls
them. What differs between the two is `attend`: over the segments of a batch, or over a cache.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import config as config_lib
from moe_jax import sharding
from moe_jax.kernels.attention import attention as segment_attention
from moe_jax.kernels.autodiff import KEPT
from moe_jax.kernels.linear import Weight, linear
from moe_jax.model.attention import Attend, Attention, AttentionWeights, attention
from moe_jax.model.feedforward import (
  DenseFFN,
  FFNWeights,
  MoEFFN,
  MoEFFNWeights,
  feedforward,
  moe_feedforward,
)
from moe_jax.model.norm import RMSNorm, rms_norm
from moe_jax.moe import counts, routers
from moe_jax.moe.counts import Choices, MoeStats


class Tokens(NamedTuple):
  """What a batch says of each token."""

  ids_BL: jax.Array  # int32, below vocab_size
  segments_BL: jax.Array  # int32, the document of each token, from 1; 0 is padding
  positions_BL: jax.Array  # int32, position within the document

  @classmethod
  def of(cls, batch: Any) -> "Tokens":
    """Of a data.pipeline.Batch."""
    return cls(batch.tokens_BL, batch.segments_BL, batch.positions_BL)


class LayerWeights(NamedTuple):
  attention_norm_D: jax.Array
  attention: AttentionWeights
  ffn_norm_D: jax.Array
  ffn: FFNWeights | MoEFFNWeights


class LayerOutput(NamedTuple):
  x_BLD: jax.Array
  stats: MoeStats | None  # None of a dense layer
  choices: Choices | None  # None of a dense layer, and without `trace`
  cache: Any  # what `attend` left for the next tokens


def decoder_layer(
  x_BLD: jax.Array,
  weights: LayerWeights,
  tokens: Tokens,
  attend: Attend,
  model: config_lib.Model,
  key: jax.Array,
  *,
  train: bool,
  trace: bool = False,
) -> LayerOutput:
  """Pre-norm attention, then a dense or an MoE feed-forward.

  Args:
    x_BLD: the residual stream, compute dtype.
    weights: of this layer; dense or MoE by the type of its feed-forward.
    tokens: ids for hash routing, padding, positions.
    attend: see attention.Attend.
    model: what is not a weight.
    key: for jitter and the router's noise.
    train: capacity factor, jitter and noise of training.
    trace: also say what became of each token.
  """
  with jax.named_scope("attention"):
    h_BLD = rms_norm(x_BLD, weights.attention_norm_D, model.norm_eps)
    y_BLD, cache = attention(h_BLD, weights.attention, tokens.positions_BL, attend, model)
    x_BLD += y_BLD
  h_BLD, stats, choices = rms_norm(x_BLD, weights.ffn_norm_D, model.norm_eps), None, None
  if isinstance(weights.ffn, FFNWeights):
    with jax.named_scope("ffn"):
      y_BLD = feedforward(h_BLD, weights.ffn)
  else:
    real_BL = tokens.segments_BL > 0
    y_BLD, stats, choices = moe_feedforward(
      h_BLD, real_BL, tokens.ids_BL, weights.ffn, model.moe, key, train=train, trace=trace
    )
  return LayerOutput(sharding.constrain(x_BLD + y_BLD, "BLD"), stats, choices, cache)


def embed(embed_VD: jax.Array, ids_BL: jax.Array) -> jax.Array:
  """x_BLD, of the table's dtype."""
  # Whole rows before the look-up: a table split over D would have to be regathered per token.
  return sharding.constrain(sharding.constrain(embed_VD, "VD")[ids_BL], "BLD")


def next_token_logits(
  x_BLD: jax.Array, final_norm_D: jax.Array, head_DV: Weight, model: config_lib.Model
) -> jax.Array:
  """float32 [B, L, V]."""
  x_BLD = rms_norm(x_BLD, final_norm_D, model.norm_eps)
  with jax.named_scope("head"):
    return sharding.constrain(linear(x_BLD, head_DV, dtype=jnp.dtype(jnp.float32)), "BLV")


class Block(nnx.Module):
  """The parameters of one layer."""

  def __init__(self, model: config_lib.Model, is_moe: bool, rngs: nnx.Rngs):
    self.attention_norm = RMSNorm("D", model.dim)
    self.attention = Attention(model, rngs)
    self.ffn_norm = RMSNorm("D", model.dim)
    self.ffn = MoEFFN(model, rngs) if is_moe else DenseFFN(model, model.ffn_dim, rngs)

  def weights(self, dtype: jnp.dtype, bias_E: jax.Array) -> LayerWeights:
    """`bias_E`: float32, of the router's selection; not read by a dense layer."""
    if isinstance(self.ffn, MoEFFN):
      ffn: FFNWeights | MoEFFNWeights = self.ffn.ffn_weights(dtype, bias_E)
    else:
      ffn = self.ffn.weights(dtype)
    return LayerWeights(
      self.attention_norm.weights(), self.attention.weights(dtype), self.ffn_norm.weights(), ffn
    )


class Period(nnx.Module):
  """The repeating unit of the layer pattern, and the body of the scan: one MoE layer at most."""

  def __init__(self, model: config_lib.Model, pattern: tuple[bool, ...], rngs: nnx.Rngs):
    self.blocks = nnx.List([Block(model, is_moe, rngs) for is_moe in pattern])


class ModelOutput(NamedTuple):
  logits_BLV: jax.Array  # float32
  stats: MoeStats  # of the MoE layers, stacked on Z; Z = 0 in a dense model
  choices: Choices | None  # with `trace`, of a model that has experts: [Z, B, L, E]


_REMAT_POLICIES = {
  config_lib.Remat.DOTS: jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_saveable, jax.checkpoint_policies.save_only_these_names(KEPT)
  ),
  config_lib.Remat.FULL: jax.checkpoint_policies.nothing_saveable,
}


class Transformer(nnx.Module):
  """The parameters of a decoder, float32, and its forward pass over packed documents."""

  def __init__(self, model: config_lib.Model, rngs: nnx.Rngs):
    self.model = model
    init = jax.random.normal
    self.embed_VD = nnx.Param(0.02 * init(rngs.params(), (model.vocab_size, model.dim)))
    self.scans = nnx.List(
      [
        _stack(model, pattern, jax.random.split(rngs.params(), repeats))
        for repeats, pattern in layer_pattern(model)
      ]
    )
    self.final_norm = RMSNorm("D", model.dim)
    if not model.tied_head:
      head = model.dim**-0.5 * init(rngs.params(), (model.dim, model.vocab_size))
      self.head_DV = nnx.Param(head)

  def __call__(
    self, tokens: Tokens, bias_ZE: jax.Array, key: jax.Array, *, train: bool, trace: bool = False
  ) -> ModelOutput:
    """Next-token logits of packed documents.

    Args:
      tokens: of the batch.
      bias_ZE: float32 balancing bias of the MoE layers' selection, zeros to have none.
      key: for the routers' jitter and noise.
      train: training or evaluation capacity, jitter and noise or none.
      trace: also return the Choices of each token in each MoE layer.
    """
    model, dtype = self.model, jnp.dtype(self.model.compute_dtype.value)
    x_BLD = embed(self.embed_VD[...].astype(dtype), tokens.ids_BL)
    stats = [counts.zeros(0, model.moe.num_experts, routers.choices_per_token(model.moe))]
    choices, first = [], 0
    for index, stack in enumerate(self.scans):
      repeats, pattern = layer_pattern(model)[index]
      keys = jax.random.split(jax.random.fold_in(key, index), repeats)
      last = first + repeats if any(pattern) else first
      # A dense layer is given a bias that it does not read.
      biases_ZE = bias_ZE[first:last] if any(pattern) else jnp.zeros((repeats, 0))
      x_BLD, of_stack = self._scan(stack, x_BLD, tokens, biases_ZE, keys, train, trace)
      stats += [s for s, _ in of_stack]
      choices += [c for _, c in of_stack if c is not None]
      first = last
    head_DV = self.embed_VD[...].T if model.tied_head else self.head_DV[...]
    logits_BLV = next_token_logits(x_BLD, self.final_norm.weights(), head_DV.astype(dtype), model)
    return ModelOutput(logits_BLV, _on_layers(stats), _on_layers(choices) if choices else None)

  def _scan(
    self,
    stack: Period,
    x_BLD: jax.Array,
    tokens: Tokens,
    bias_ZE: jax.Array,
    keys_Z: jax.Array,
    train: bool,
    trace: bool,
  ) -> tuple[jax.Array, list[tuple[MoeStats, Choices | None]]]:
    """(x_BLD after the layers of a stack, what its MoE layers counted: one pair or none)."""
    model, dtype = self.model, jnp.dtype(self.model.compute_dtype.value)
    graph, params = nnx.split(stack)

    def attend(q_BLHA: jax.Array, k_BLGA: jax.Array, v_BLGA: jax.Array) -> tuple[jax.Array, None]:
      return segment_attention(q_BLHA, k_BLGA, v_BLGA, tokens.segments_BL, model.attention), None

    def body(x_BLD: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
      params, bias_E, key = layer
      counted = []
      for number, block in enumerate(nnx.merge(graph, params).blocks):
        block_key, weights = jax.random.fold_in(key, number), block.weights(dtype, bias_E)
        out = decoder_layer(
          x_BLD, weights, tokens, attend, model, block_key, train=train, trace=trace
        )
        x_BLD = out.x_BLD
        counted += [(out.stats, out.choices)] if out.stats is not None else []
      return x_BLD, counted

    if model.remat is not config_lib.Remat.NONE:
      # Inside a scan nothing can merge the recomputation with the forward pass.
      body = jax.checkpoint(body, policy=_REMAT_POLICIES[model.remat], prevent_cse=False)
    return jax.lax.scan(body, x_BLD, (params, bias_ZE, keys_Z))


def _on_layers(parts: list[Any]) -> Any:
  """The trees of several stacks as one, their layers one after the other."""
  return jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *parts)


def _stack(model: config_lib.Model, pattern: tuple[bool, ...], keys_Z: jax.Array) -> Period:
  """One Period whose parameters have a leading Z, a layer (or period) for each key."""
  return nnx.vmap(lambda key: Period(model, pattern, nnx.Rngs(key)))(keys_Z)


def abstract(model: config_lib.Model) -> Any:
  """Shapes of the parameters: nnx state of a Transformer, of which nothing is allocated."""
  return _split(model)[1]


def merge(model: config_lib.Model, params: Any) -> Transformer:
  """The decoder with these parameters (nnx state of a Transformer of the same config)."""
  return nnx.merge(_split(model)[0], params)


def _split(model: config_lib.Model) -> tuple[Any, Any]:
  return nnx.split(nnx.eval_shape(lambda: Transformer(model, nnx.Rngs(0))))


def forward(
  model: config_lib.Model,
  params: Any,
  bias_ZE: jax.Array,
  tokens: Tokens,
  key: jax.Array,
  *,
  train: bool,
  trace: bool = False,
) -> ModelOutput:
  """Transformer.__call__ as a pure function of the parameters."""
  return merge(model, params)(tokens, bias_ZE, key, train=train, trace=trace)


def layer_pattern(model: config_lib.Model) -> list[tuple[int, tuple[bool, ...]]]:
  """[(repeats, (is_moe of each block in the unit))], first layer first."""
  moe = model.moe
  if not moe.num_experts:
    return [(model.num_layers, (False,))]
  unit = (False,) * (moe.every - 1) + (True,)
  scans = [(moe.first_dense, (False,)), ((model.num_layers - moe.first_dense) // moe.every, unit)]
  return [(repeats, pattern) for repeats, pattern in scans if repeats]


def moe_layers(model: config_lib.Model) -> list[int]:
  """Index of each MoE layer in the network, in the order of Z of statistics and biases."""
  flat = [is_moe for repeats, pattern in layer_pattern(model) for is_moe in pattern * repeats]
  return [index for index, is_moe in enumerate(flat) if is_moe]


def bias_shape(model: config_lib.Model) -> tuple[int, int]:
  """Of the balancing biases, [Z, E]; a dense model has one that nobody reads, as Orbax saves no
  empty array."""
  return max(len(moe_layers(model)), 1), max(model.moe.num_experts, 1)


def abstract_weights(model: config_lib.Model) -> dict[str, Any]:
  """{"params", "bias_ZE"} as shapes: what a model needs of a checkpoint."""
  bias_ZE = jax.ShapeDtypeStruct(bias_shape(model), jnp.float32)
  return {"params": abstract(model), "bias_ZE": bias_ZE}


def evaluate(
  model: config_lib.Model, params: Any, bias_ZE: jax.Array, batch: Any, *, trace: bool = False
) -> ModelOutput:
  """`forward` of a data.pipeline.Batch in evaluation: no jitter and no noise."""
  tokens, key = Tokens.of(batch), jax.random.key(0)
  return forward(model, params, bias_ZE, tokens, key, train=False, trace=trace)
