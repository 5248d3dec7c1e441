"""The decoder: dense and MoE blocks by pattern, scanned, returning (logits, statistics)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import config as config_lib
from moe_jax import sharding
from moe_jax.kernels import blocked
from moe_jax.model.attention import Attention, RMSNorm
from moe_jax.model.feedforward import DenseFFN, MoEFFN
from moe_jax.moe import counts, routers


class Block(nnx.Module):
  """Pre-norm attention, then a dense or an MoE feed-forward."""

  def __init__(self, model: config_lib.Model, is_moe: bool, rngs: nnx.Rngs):
    self.attention_norm = RMSNorm("D", model.dim, model.norm_eps)
    self.attention = Attention(model, rngs)
    self.ffn_norm = RMSNorm("D", model.dim, model.norm_eps)
    self.is_moe = is_moe
    self.ffn = MoEFFN(model, rngs) if is_moe else DenseFFN(model, model.ffn_dim, rngs)

  def __call__(self, x_BLD, tokens, bias_E, key, *, train, trace):
    ids_BL, segments_BL, positions_BL = tokens
    with jax.named_scope("attention"):
      x_BLD += self.attention(self.attention_norm(x_BLD), positions_BL, segments_BL)
    h_BLD = self.ffn_norm(x_BLD)
    if self.is_moe:
      with jax.named_scope("moe"):
        y_BLD, *counted = self.ffn(
          h_BLD, segments_BL > 0, ids_BL, bias_E, key, train=train, trace=trace
        )
    else:
      with jax.named_scope("ffn"):
        y_BLD, counted = self.ffn(h_BLD), []
    return sharding.constrain(x_BLD + y_BLD, "BLD"), counted


class Period(nnx.Module):
  """The repeating unit of the layer pattern, and the body of the scan."""

  def __init__(self, model: config_lib.Model, pattern: tuple[bool, ...], rngs: nnx.Rngs):
    self.blocks = nnx.List([Block(model, is_moe, rngs) for is_moe in pattern])


def _stack(model: config_lib.Model, pattern: tuple[bool, ...], keys: jax.Array) -> Period:
  """One Period whose parameters have a leading Z, a layer (or period) for each key."""
  return nnx.vmap(lambda key: Period(model, pattern, nnx.Rngs(key)))(keys)


def abstract(model: config_lib.Model) -> tuple[Any, Any]:
  """(graph, shapes of the parameters) of nnx.split; nothing is allocated."""
  return nnx.split(nnx.eval_shape(lambda: Transformer(model, nnx.Rngs(0))))


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


_REMAT_POLICIES = {
  config_lib.Remat.DOTS: jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_saveable,
    jax.checkpoint_policies.save_only_these_names(blocked.KEPT),  # its matmuls are in a loop
  ),
  config_lib.Remat.FULL: jax.checkpoint_policies.nothing_saveable,
}


class Transformer(nnx.Module):
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
    self.final_norm = RMSNorm("D", model.dim, model.norm_eps)
    if not model.tied_head:
      head = model.dim**-0.5 * init(rngs.params(), (model.dim, model.vocab_size))
      self.head_DV = nnx.Param(head)

  def __call__(
    self,
    tokens_BL: jax.Array,
    segments_BL: jax.Array,
    positions_BL: jax.Array,
    bias_ZE: jax.Array,
    key: jax.Array,
    *,
    train: bool,
    trace: bool = False,
  ) -> tuple[jax.Array, ...]:
    """Next-token logits of packed documents.

    Args:
      tokens_BL: int32 ids below vocab_size.
      segments_BL: int32, the document of each token, from 1; 0 is padding.
      positions_BL: int32, position within the document.
      bias_ZE: float32 balancing bias of the MoE layers' selection, zeros to have none.
      key: for the routers' jitter and noise.
      train: training or evaluation capacity, jitter and noise or none.
      trace: also return the Choices of each token in each MoE layer.

    Returns:
      logits_BLV, float32, and the MoE layers' MoeStats stacked on Z (Z = 0 in a dense model); with
      `trace`, a third: Choices, [Z, B, L, E], of a model that has experts.
    """
    model, dtype = self.model, jnp.dtype(self.model.compute_dtype.value)
    # Whole rows before the look-up: a table split over D would have to be regathered per token.
    embed_VD = sharding.constrain(self.embed_VD[...].astype(dtype), "VD")
    x_BLD = sharding.constrain(embed_VD[tokens_BL], "BLD")
    tokens = (tokens_BL, segments_BL, positions_BL)
    stats, choices = [counts.zeros((0,), model.moe.num_experts, routers.choices(model.moe))], []
    for index, stack in enumerate(self.scans):
      repeats, pattern = layer_pattern(model)[index]
      # A period has one MoE layer at most; a dense one is given biases that it does not read.
      done = sum(len(s.tokens) for s in stats)
      biases = bias_ZE[done : done + repeats] if any(pattern) else jnp.zeros((repeats, 0))
      graph, params = nnx.split(stack)

      def body(x_BLD, layer, graph=graph):
        params, bias_E, key = layer
        period, counted = nnx.merge(graph, params), []
        for number, block in enumerate(period.blocks):
          block_key = jax.random.fold_in(key, number)
          x_BLD, of_block = block(x_BLD, tokens, bias_E, block_key, train=train, trace=trace)
          counted += of_block  # one MoE block in a period at most
        return x_BLD, counted

      if model.remat is not config_lib.Remat.NONE:
        # Inside a scan nothing can merge the recomputation with the forward pass.
        body = jax.checkpoint(body, policy=_REMAT_POLICIES[model.remat], prevent_cse=False)
      keys = jax.random.split(jax.random.fold_in(key, index), repeats)
      x_BLD, scanned = jax.lax.scan(body, x_BLD, (params, biases, keys))
      stats += scanned[:1]
      choices += scanned[1:] if trace else []
    x_BLD = self.final_norm(x_BLD)
    head_DV = self.embed_VD[...].T if model.tied_head else self.head_DV[...]
    with jax.named_scope("head"):
      # Here and in every layer tokens are one dimension: XLA:CPU is slow at the gradients of BLD.
      x_TD = x_BLD.reshape(-1, model.dim)
      logits_TV = jnp.dot(x_TD, head_DV.astype(dtype), preferred_element_type=jnp.float32)
      logits_BLV = logits_TV.reshape(*tokens_BL.shape, model.vocab_size)
    logits_BLV = sharding.constrain(logits_BLV, "BLV")
    stats, *choices = (
      jax.tree.map(lambda *zs: jnp.concatenate(zs), *zs) for zs in (stats, choices) if zs
    )
    return logits_BLV, stats, *choices


def abstract_weights(model: config_lib.Model) -> dict[str, Any]:
  """{"params", "bias_ZE"} as shapes: what a model needs of a checkpoint."""
  bias_ZE = jax.ShapeDtypeStruct(bias_shape(model), jnp.float32)
  return {"params": abstract(model)[1], "bias_ZE": bias_ZE}


def evaluate(
  graph: Any, params: Any, bias_ZE: jax.Array, batch: Any, *, trace: bool = False
) -> tuple[Any, ...]:
  """What Transformer returns of a data.Batch in evaluation: no jitter and no noise."""
  return nnx.merge(graph, params)(
    batch.tokens_BL, batch.segments_BL, batch.positions_BL, bias_ZE, jax.random.key(0),
    train=False, trace=trace,
  )  # fmt: skip
