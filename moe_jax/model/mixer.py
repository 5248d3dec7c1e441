"""How a layer mixes the tokens of a document: attention, latent attention, or the delta rule."""

from typing import Any

import jax
from flax import nnx

from moe_jax.config import Model
from moe_jax.kernels.delta_rule import DeltaState
from moe_jax.kernels.mask import Mask
from moe_jax.model.attention import (
  Attend,
  AttentionLayer,
  AttentionWeights,
  grouped_query_attention,
)
from moe_jax.model.delta import DeltaLayer, DeltaWeights, delta_layer
from moe_jax.model.latent_attention import LatentAttentionLayer, LatentWeights, latent_attention
from moe_jax.model.pattern import LayerKind
from moe_jax.moe.routing import Tokens

MixerWeights = AttentionWeights | LatentWeights | DeltaWeights


def make_mixer(
  model: Model, kind: LayerKind, rngs: nnx.Rngs
) -> AttentionLayer | LatentAttentionLayer | DeltaLayer:
  """Returns the parameters of a layer of that kind."""
  if kind.delta:
    return DeltaLayer(model, rngs)
  return (LatentAttentionLayer if model.latent.kv_dim else AttentionLayer)(model, rngs)


def mix(
  x_BLD: jax.Array,
  weights: MixerWeights,
  tokens: Tokens,
  attend: Attend | DeltaState | None,
  model: Model,
  mask: Mask,
) -> tuple[jax.Array, Any]:
  """Calls the function that the type of the weights names.

  Args:
    x_BLD: normed tokens, compute dtype.
    weights: of this layer.
    tokens: of the batch.
    attend: computes attention; for the delta rule the state before, or None in training.
    model: the configuration.
    mask: what the scores of this layer are put through; the sinks of the weights join it.

  Returns:
    y_BLD in the compute dtype, and the state for the next tokens.
  """
  if isinstance(weights, DeltaWeights):
    assert not callable(attend)
    return delta_layer(x_BLD, weights, tokens.segments_BL, attend, model)
  assert callable(attend)
  if isinstance(weights, LatentWeights):
    return latent_attention(x_BLD, weights, tokens.positions_BL, attend, model, mask)
  return grouped_query_attention(x_BLD, weights, tokens.positions_BL, attend, model, mask)
