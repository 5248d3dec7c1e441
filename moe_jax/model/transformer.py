"""The decoder: one layer for training, prefill and decoding, and the parameters of the stack.

Training scans over the layers' stacked parameters, with an `attend` over the segments of a batch.
Inference (inference/decoding.py) unrolls the layers, with an `attend` over a cache.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from moe_jax import sharding
from moe_jax.config import Model, Remat
from moe_jax.kernels import activation, context, cross_entropy, gathered
from moe_jax.kernels.autodiff import SAVED_BY_KERNEL
from moe_jax.kernels.delta_rule import DeltaState
from moe_jax.kernels.linear import Weight, linear
from moe_jax.kernels.mask import Mask, soft_capped
from moe_jax.model import mixer
from moe_jax.model.attention import Attend, over_segments
from moe_jax.model.feedforward import (
  DenseFFN,
  FFNWeights,
  MoEFFN,
  MoEFFNWeights,
  feedforward,
  moe_feedforward,
)
from moe_jax.model.norm import RMSNorm, rms_norm
from moe_jax.model.pattern import LayerKind, bias_shape, layer_pattern
from moe_jax.moe import counts, routers
from moe_jax.moe.counts import Choices, MoeStats
from moe_jax.moe.routing import Mode, Tokens


class LayerWeights(NamedTuple):
  """The weights of one layer; norms are float32."""

  attention_norm_D: jax.Array
  attention: mixer.MixerWeights
  ffn_norm_D: jax.Array
  ffn: FFNWeights | MoEFFNWeights


class LayerOutput(NamedTuple):
  """What one layer returns."""

  x_BLD: jax.Array  # the residual stream, compute dtype
  stats: MoeStats | None  # None if the layer is dense
  choices: Choices | None  # None if the layer is dense, or without `trace`
  cache: Any  # the state that `attend` returned for the next tokens


def decoder_layer(
  x_BLD: jax.Array,
  weights: LayerWeights,
  tokens: Tokens,
  attend: Attend | DeltaState | None,
  model: Model,
  key: jax.Array,
  *,
  mask: Mask,
  mode: Mode,
) -> LayerOutput:
  """Computes pre-norm attention, then a dense or an MoE feed-forward.

  Args:
    x_BLD: the residual stream, compute dtype.
    weights: of this layer; the type of `ffn` makes it dense or MoE.
    tokens: ids for hash routing, padding, positions.
    attend: computes attention; see mixer.mix.
    model: the configuration.
    key: the random key of jitter and of the router's noise.
    mask: what the scores of this layer's attention are put through.
    mode: whether it is training, and whether to return the experts of each token.
  """
  with jax.named_scope("attention"):
    h_BLD = rms_norm(x_BLD, weights.attention_norm_D, model.norm_eps)
    y_BLD, cache = mixer.mix(h_BLD, weights.attention, tokens, attend, model, mask)
    x_BLD += _scaled(y_BLD, model.residual_multiplier)
  h_BLD, stats, choices = rms_norm(x_BLD, weights.ffn_norm_D, model.norm_eps), None, None
  if isinstance(weights.ffn, FFNWeights):
    with jax.named_scope("ffn"):
      y_BLD = feedforward(h_BLD, weights.ffn, activation.nonlinearity(model))
  else:
    out = moe_feedforward(h_BLD, tokens, weights.ffn, model, key, mode)
    y_BLD, stats, choices = out.y_BLD, out.stats, out.choices
  with jax.named_scope("residual"):
    x_BLD = sharding.constrain(x_BLD + _scaled(y_BLD, model.residual_multiplier), "BLD")
  return LayerOutput(x_BLD=x_BLD, stats=stats, choices=choices, cache=cache)


def _scaled(x: jax.Array, multiplier: float) -> jax.Array:
  return x if multiplier == 1 else x * multiplier


@jax.named_scope("embedding")
def embed(embed_VD: Any, ids_BL: jax.Array, model: Model) -> jax.Array:
  """Looks up the embeddings x_BLD of ids_BL, in the dtype of the table embed_VD."""
  if not isinstance(embed_VD, gathered.Copies):
    # Gathers the table along D first; otherwise each token's row is gathered from several devices.
    embed_VD = sharding.constrain(embed_VD, "VD")
  x_BLD = sharding.constrain(embed_VD[ids_BL], "BLD")
  return _scaled(x_BLD, model.embedding_multiplier)


def next_token_logits(
  x_BLD: jax.Array, final_norm_D: jax.Array, head_DV: Weight, model: Model
) -> jax.Array:
  """Returns float32 logits_BLV of the last layer's x_BLD, after the final norm."""
  x_BLD = rms_norm(x_BLD, final_norm_D, model.norm_eps)
  with jax.named_scope("head"):
    logits_BLV = linear(x_BLD, head_DV, dtype=jnp.dtype(jnp.float32))
    return sharding.constrain(scaled_logits(logits_BLV, model), "BLV")


def scaled_logits(logits: jax.Array, model: Model) -> jax.Array:
  """Returns the logits with the multiplier and the soft cap of the config, elementwise."""
  return soft_capped(_scaled(logits, model.logit_multiplier), model.logit_soft_cap)


class DecoderLayer(nnx.Module):
  """The parameters of one layer."""

  def __init__(self, model: Model, kind: LayerKind, rngs: nnx.Rngs):
    self.attention_norm = RMSNorm("D", model.dim, offset=model.norm_offset)
    self.attention = mixer.make_mixer(model, kind, rngs)
    self.ffn_norm = RMSNorm("D", model.dim, offset=model.norm_offset)
    self.ffn = MoEFFN(model, rngs) if kind.is_moe else DenseFFN(model, model.ffn_dim, rngs)

  @jax.named_scope("weights")
  def weights(self, dtype: jnp.dtype, bias_E: jax.Array | None) -> LayerWeights:
    """Returns the weights in `dtype`; a dense layer has no balancing bias bias_E."""
    if isinstance(self.ffn, MoEFFN):
      assert bias_E is not None
      ffn: FFNWeights | MoEFFNWeights = self.ffn.ffn_weights(dtype, bias_E)
    else:
      ffn = self.ffn.weights(dtype)
    return LayerWeights(
      attention_norm_D=self.attention_norm.weights(),
      attention=self.attention.weights(dtype),
      ffn_norm_D=self.ffn_norm.weights(),
      ffn=ffn,
    )


class Period(nnx.Module):
  """The layers that the pattern repeats; one step of the scan."""

  def __init__(self, model: Model, unit: tuple[LayerKind, ...], rngs: nnx.Rngs):
    self.blocks = nnx.List([DecoderLayer(model, kind, rngs) for kind in unit])


class MoELayers(NamedTuple):
  """What several MoE layers return, stacked on Z."""

  stats: MoeStats
  choices: Choices | None  # None without `trace`


class ModelOutput(NamedTuple):
  """What the decoder returns."""

  logits_BLV: jax.Array  # float32
  stats: MoeStats  # of the MoE layers, stacked on Z; Z = 0 in a dense model
  choices: Choices | None  # [Z, B, L, E]; None without `trace` or in a dense model


class TargetNll(NamedTuple):
  """What the decoder makes of the targets."""

  nll_BL: jax.Array  # float32, nats of each target
  log_z_BL: jax.Array  # float32, logsumexp of each token's logits
  stats: MoeStats  # as in ModelOutput


_LAYER_INPUT = "layer_input"  # checkpoint_name of what a layer begins with
REMAT_POLICIES = {
  Remat.DOTS: jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_saveable,
    jax.checkpoint_policies.save_only_these_names(SAVED_BY_KERNEL),
  ),
  Remat.FULL: jax.checkpoint_policies.nothing_saveable,
  Remat.OFFLOAD: jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=[_LAYER_INPUT],
    offload_src="device",
    offload_dst="pinned_host",
  ),
  Remat.NONE: jax.checkpoint_policies.save_anything_except_these_names(gathered.GATHERED),
}


class Transformer(nnx.Module):
  """The parameters of a decoder, float32, and its forward pass over packed documents."""

  def __init__(self, model: Model, rngs: nnx.Rngs):
    self.model = model
    init = jax.random.normal
    self.embed_VD = nnx.Param(0.02 * init(rngs.params(), (model.vocab_size, model.dim)))
    self.scans = nnx.List(
      [
        _stack(model, unit, jax.random.split(rngs.params(), repeats))
        for repeats, unit in layer_pattern(model)
      ]
    )
    self.final_norm = RMSNorm("D", model.dim, offset=model.norm_offset)
    if not model.tied_head:
      head = model.dim**-0.5 * init(rngs.params(), (model.dim, model.vocab_size))
      self.head_DV = nnx.Param(head)

  def __call__(
    self, tokens: Tokens, bias_ZE: jax.Array, key: jax.Array, *, train: bool, trace: bool = False
  ) -> ModelOutput:
    """Computes next-token logits of packed documents.

    Args:
      tokens: of the batch.
      bias_ZE: float32 balancing biases of the MoE layers, zeros for none.
      key: the random key of the routers' jitter and noise.
      train: whether to use the capacity factor, jitter and noise of training.
      trace: whether to return the experts of each token in each MoE layer too.
    """
    tokens, mode = context.split(tokens), Mode(train, trace)
    x_BLD, head_DV, stats, choices = self._layers(tokens, bias_ZE, key, mode)
    logits_BLV = next_token_logits(x_BLD, self.final_norm.weights(), head_DV, self.model)
    choices = jax.tree.map(jax.vmap(context.join), choices)
    return ModelOutput(context.join(logits_BLV), stats, choices)

  def target_nll(
    self,
    tokens: Tokens,
    targets_BL: jax.Array,
    bias_ZE: jax.Array,
    key: jax.Array,
    *,
    train: bool,
  ) -> TargetNll:
    """Computes the nats of each token's target, of `loss_chunk` tokens of a device at a time.

    The arguments are those of `__call__`, and int32 targets_BL.
    """
    model = self.model
    tokens, targets_BL = context.split((tokens, targets_BL))
    x_BLD, head_DV, stats, _ = self._layers(tokens, bias_ZE, key, Mode(train, False))
    if not model.loss_chunk:
      logits_BLV = next_token_logits(x_BLD, self.final_norm.weights(), head_DV, model)
      return TargetNll(*context.join(cross_entropy.token_nll(logits_BLV, targets_BL)), stats)
    x_BLD = rms_norm(x_BLD, self.final_norm.weights(), model.norm_eps)
    scaling = functools.partial(scaled_logits, model=model)
    found = cross_entropy.nll_in_chunks(x_BLD, head_DV, targets_BL, model.loss_chunk, scaling)
    return TargetNll(*context.join(found), stats)

  def _layers(
    self, tokens: Tokens, bias_ZE: jax.Array, key: jax.Array, mode: Mode
  ) -> tuple[jax.Array, Any, MoeStats, Choices | None]:
    """Returns x_BLD after the last layer, the head, and what the MoE layers return."""
    model, dtype = self.model, jnp.dtype(self.model.compute_dtype.value)
    ends = {"embed_VD": self.embed_VD[...].astype(dtype)}
    if not model.tied_head:
      ends["head_DV"] = self.head_DV[...].astype(dtype)
    ends = gathered.copies(ends, model.gradient_sums)
    x_BLD = embed(ends["embed_VD"], tokens.ids_BL, model)
    of_none = counts.zeros(0, model.moe.num_experts, routers.choices_per_token(model.moe))
    stats, choices, first = [of_none], [], 0
    for index, stack in enumerate(self.scans):
      repeats, unit = layer_pattern(model)[index]
      keys = jax.random.split(jax.random.fold_in(key, index), repeats)
      last = first + repeats * sum(kind.is_moe for kind in unit)
      x_BLD, moe_layers = self._scan(index, stack, x_BLD, tokens, bias_ZE[first:last], keys, mode)
      if moe_layers is not None:
        stats.append(moe_layers.stats)
        choices.append(moe_layers.choices)
      first = last
    head_DV = ends["embed_VD"].T if model.tied_head else ends["head_DV"]
    return x_BLD, head_DV, _on_layers(stats), _on_layers(choices) if choices else None

  def _scan(
    self,
    index: int,
    stack: Period,
    x_BLD: jax.Array,
    tokens: Tokens,
    bias_ZE: jax.Array,
    keys: jax.Array,
    mode: Mode,
  ) -> tuple[jax.Array, "MoELayers | None"]:
    """Runs the layers of one stack, the `index`-th; `keys` has one for each repeat.

    Returns:
      x_BLD after the stack, and what its MoE layers return; None if all are dense.
    """
    model, dtype = self.model, jnp.dtype(self.model.compute_dtype.value)
    repeats, unit = layer_pattern(model)[index]
    graph, params = nnx.split(stack)
    biases = bias_ZE.reshape(repeats, sum(kind.is_moe for kind in unit), bias_ZE.shape[-1])
    attend = over_segments(tokens.segments_BL, model.attention)

    def body(x_BLD: jax.Array, period: Any) -> tuple[jax.Array, Any]:
      params, biases, key = period
      if model.remat is Remat.OFFLOAD:  # at the start of the body: elsewhere it is not offloaded
        x_BLD = checkpoint_name(x_BLD, _LAYER_INPUT)
      moe_layers: list[MoELayers] = []
      blocks = nnx.merge(graph, params).blocks
      for number, (kind, block) in enumerate(zip(unit, blocks, strict=True)):
        bias_E = biases[len(moe_layers)] if kind.is_moe else None
        out = decoder_layer(
          x_BLD,
          gathered.copies(block.weights(dtype, bias_E), model.gradient_sums),
          tokens,
          None if kind.delta else attend,
          model,
          jax.random.fold_in(key, number),
          mask=kind.mask,
          mode=mode,
        )
        x_BLD = out.x_BLD
        if out.stats is not None:
          moe_layers.append(MoELayers(out.stats, out.choices))
      if not moe_layers:
        return x_BLD, None
      return x_BLD, jax.tree.map(lambda *layers: jnp.stack(layers), *moe_layers)

    if model.remat is not Remat.NONE or gathered.drops_copies():
      # Inside a scan XLA cannot merge the recomputation with the forward pass in any case.
      body = jax.checkpoint(body, policy=REMAT_POLICIES[model.remat], prevent_cse=False)
    with jax.named_scope("layers"):
      x_BLD, moe_layers = jax.lax.scan(body, x_BLD, (params, biases, keys))
    # [repeats, MoE layers of the unit, ...] to [Z, ...]
    return x_BLD, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), moe_layers)


def _on_layers(parts: list[Any]) -> Any:
  """Concatenates the trees of several stacks along their layers."""
  return jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *parts)


def _stack(model: Model, unit: tuple[LayerKind, ...], keys: jax.Array) -> Period:
  """Returns one Period whose parameters have a leading Z, one entry for each key."""
  return nnx.vmap(lambda key: Period(model, unit, nnx.Rngs(key)))(keys)


def abstract_params(model: Model) -> Any:
  """Returns the nnx state of a Transformer as shapes, without allocating it."""
  return jax.tree.map(lambda shape: shape, _split(model, jax.sharding.get_abstract_mesh())[1])


def merge(model: Model, params: Any) -> Transformer:
  """Returns the decoder with these parameters, the nnx state of a Transformer of this config."""
  return nnx.merge(_split(model, jax.sharding.get_abstract_mesh())[0], params)


@functools.cache  # a start asks ten times
def _split(model: Model, _: jax.sharding.AbstractMesh) -> tuple[Any, Any]:
  return nnx.split(nnx.eval_shape(lambda: Transformer(model, nnx.Rngs(0))))


def forward(
  model: Model,
  params: Any,
  bias_ZE: jax.Array,
  tokens: Tokens,
  key: jax.Array,
  *,
  train: bool,
  trace: bool = False,
) -> ModelOutput:
  """Calls a Transformer with these parameters; the arguments are those of its `__call__`."""
  return merge(model, params)(tokens, bias_ZE, key, train=train, trace=trace)


def target_nll(
  model: Model,
  params: Any,
  bias_ZE: jax.Array,
  batch: Any,
  key: jax.Array,
  *,
  train: bool,
) -> TargetNll:
  """Calls Transformer.target_nll with these parameters on a data.pipeline.Batch."""
  tokens = Tokens.of_batch(batch)
  return merge(model, params).target_nll(tokens, batch.targets_BL, bias_ZE, key, train=train)


def abstract_weights(model: Model) -> dict[str, Any]:
  """Returns {"params", "bias_ZE"} as shapes: the part of a checkpoint that a model needs."""
  bias_ZE = jax.ShapeDtypeStruct(bias_shape(model), jnp.float32)
  return {"params": abstract_params(model), "bias_ZE": bias_ZE}


def evaluate(
  model: Model, params: Any, bias_ZE: jax.Array, batch: Any, *, trace: bool = False
) -> ModelOutput:
  """Calls `forward` on a data.pipeline.Batch as in evaluation, with a fixed key."""
  tokens, key = Tokens.of_batch(batch), jax.random.key(0)
  return forward(model, params, bias_ZE, tokens, key, train=False, trace=trace)
