"""Runs some rows through a checkpoint and records the experts of each token."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from moe_jax import sharding
from moe_jax.analysis.specialisation import Trace
from moe_jax.config import Model
from moe_jax.data import pipeline
from moe_jax.model import transformer


class RestoredModel(NamedTuple):
  """The weights of a checkpoint, on the mesh in force."""

  config: Model
  params: Any
  bias_ZE: jax.Array


def compile_choices(model: Model) -> Callable[..., Any]:
  """Returns a compiled function (params, bias_ZE, batch) -> Choices."""

  def choices(params: Any, bias_ZE: jax.Array, batch: pipeline.Batch[jax.Array]) -> Any:
    return transformer.evaluate(model, params, bias_ZE, batch, trace=True).choices

  return jax.jit(choices)


def collect(
  choices: Callable[..., Any],
  model: RestoredModel,
  rows: pipeline.Rows,
  numbers: pipeline.Numbers,
  batch_size: int,
  mesh: jax.sharding.Mesh,
) -> Trace:
  """Traces the tokens of the rows with these numbers.

  `choices` is the function that `compile_choices` made for the model's config.
  """
  parts: list[Trace] = []
  for rows_B in pipeline.eval_batches(numbers, batch_size):
    batch, domain_BL = rows.batch(rows_B), rows.domains_BL(rows_B)
    batch_choices = sharding.whole(
      choices(model.params, model.bias_ZE, sharding.place(batch, mesh))
    )
    real_BL = batch.segments_BL > 0
    indices = np.indices(real_BL.shape)
    row_BL, place_BL = indices[0] + len(parts) * batch_size, indices[1]
    parts.append(
      Trace(
        token_T=batch.tokens_BL[real_BL],
        row_T=row_BL[real_BL],
        segment_T=batch.segments_BL[real_BL],
        place_T=place_BL[real_BL],
        domain_T=domain_BL[real_BL],
        routed_ZTE=batch_choices.routed_BLE[:, real_BL],
        kept_ZTE=batch_choices.kept_BLE[:, real_BL],
        gate_ZTE=batch_choices.gate_BLE[:, real_BL],
      )
    )
  # T is the first dimension of the tokens' arrays and the second of the layers'.
  return jax.tree.map(lambda *arrays: np.concatenate(arrays, axis=arrays[0].ndim // 2), *parts)
