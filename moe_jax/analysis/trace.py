"""Follows a few rows through a checkpoint: which experts took each token."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from moe_jax import config as config_lib
from moe_jax import sharding
from moe_jax.analysis.specialisation import Trace
from moe_jax.data import pipeline
from moe_jax.model import transformer


class Model(NamedTuple):
  """A checkpoint on the mesh in force."""

  config: config_lib.Model
  params: Any
  bias_ZE: jax.Array


def compile_choices(model: config_lib.Model) -> Callable[..., Any]:
  """(params, bias_ZE, batch) -> Choices."""

  def choices(params: Any, bias_ZE: jax.Array, batch: pipeline.Batch[jax.Array]) -> Any:
    return transformer.evaluate(model, params, bias_ZE, batch, trace=True).choices

  return jax.jit(choices)


def collect(
  choices: Callable[..., Any],
  model: Model,
  rows: pipeline.Rows,
  numbers: pipeline.Numbers,
  batch_size: int,
  mesh: jax.sharding.Mesh,
) -> Trace:
  """What became of every token of these rows; `choices` is compile_choices of its config."""
  found: list[tuple[np.ndarray, ...]] = []
  for rows_B in pipeline.eval_batches(numbers, batch_size):
    batch, domain_BL = rows.batch(rows_B), rows.domains_BL(rows_B)
    chosen = choices(model.params, model.bias_ZE, sharding.to_global(batch, mesh))
    real_BL = batch.segments_BL > 0
    indices = np.indices(real_BL.shape)
    row_BL, place_BL = indices[0] + len(found) * batch_size, indices[1]
    of_tokens = (batch.tokens_BL, row_BL, batch.segments_BL, place_BL, domain_BL)
    of_layers = [np.asarray(jax.device_get(x))[:, real_BL] for x in chosen]
    found.append((*(x[real_BL] for x in of_tokens), *of_layers))
  *tokens, routed, kept, gate = zip(*found, strict=True)
  layers = (np.concatenate(x, axis=1) for x in (routed, kept, gate))
  return Trace(*(np.concatenate(x) for x in tokens), *layers)
