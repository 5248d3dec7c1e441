"""Runs some rows through a checkpoint and records the experts of each token."""

from typing import Any, NamedTuple

import jax
import numpy as np

from moe_jax import sharding
from moe_jax.analysis.specialisation import Trace
from moe_jax.config import Model
from moe_jax.data import pipeline
from moe_jax.inference import loaded
from moe_jax.storage.weights import Weights


class RestoredModel(NamedTuple):
  """The weights of a checkpoint, on the mesh in force."""

  config: Model
  params: Any
  bias_ZE: jax.Array


def collect(
  model: RestoredModel,
  rows: pipeline.Rows,
  numbers: pipeline.Numbers,
  batch_size: int,
  mesh: jax.sharding.Mesh,
) -> Trace:
  """Traces the tokens of the rows with these numbers."""
  parts: list[Trace] = []
  weights = Weights(model.params, model.bias_ZE)
  for rows_B in pipeline.eval_batches(numbers, batch_size):
    batch, domain_BL = rows.batch(rows_B), rows.domains_BL(rows_B)
    placed = sharding.place(batch, mesh)
    choices = sharding.whole(loaded.choices(weights, *placed, model=model.config))
    real_BL = batch.segments_BL > 0
    index_2BL = np.indices(real_BL.shape)
    row_BL = index_2BL[0] + len(parts) * batch_size
    tokens = (batch.tokens_BL, row_BL, batch.segments_BL, index_2BL[1], domain_BL)
    layers = (choices.routed_BLE, choices.kept_BLE, choices.gate_BLE)
    parts.append(Trace(*(x[real_BL] for x in tokens), *(x[:, real_BL] for x in layers)))
  # T is the first dimension of the tokens' arrays and the second of the layers'.
  return jax.tree.map(lambda *arrays: np.concatenate(arrays, axis=arrays[0].ndim // 2), *parts)
