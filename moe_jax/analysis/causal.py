"""Measures a model's loss with every token's future hidden from its routers.

R: rows.
"""

import time
from typing import Any

import jax
import numpy as np

from moe_jax import sharding
from moe_jax.analysis import trace
from moe_jax.data import pipeline
from moe_jax.errors import UserError
from moe_jax.model import transformer
from moe_jax.moe import dispatch

_SECONDS = 10  # between lines of progress


def cut(
  batch: pipeline.Batch[np.ndarray],
  other: pipeline.Batch[np.ndarray],
  last_B: np.ndarray,
  separator: int,
) -> pipeline.Batch[np.ndarray]:
  """Replaces the columns after `last_B` of a batch by those of `other`.

  The replaced part begins a new document at position 0, like a row that begins inside a document,
  and separators in it begin further documents. So it fills slots of the experts as any text does,
  and attention does not mix the two parts. Targets stay those of `batch`.
  """
  column_1L = np.arange(batch.tokens_BL.shape[1], dtype=np.int32)[None]
  past_BL = column_1L > last_B[:, None]
  tokens_BL = np.where(past_BL, other.tokens_BL, batch.tokens_BL)
  starts_BL = past_BL & ((tokens_BL == separator) | (column_1L == last_B[:, None] + 1))
  new_BL = np.cumsum(starts_BL, axis=1, dtype=np.int32)
  last_segment_B1 = np.take_along_axis(batch.segments_BL, last_B[:, None], axis=1)
  segments_BL = np.where(past_BL, last_segment_B1 + new_BL, batch.segments_BL)
  since_BL = column_1L - np.maximum.accumulate(np.where(starts_BL, column_1L, 0), axis=1)
  positions_BL = np.where(past_BL, since_BL, batch.positions_BL)
  return batch._replace(tokens_BL=tokens_BL, segments_BL=segments_BL, positions_BL=positions_BL)


def causal_losses(
  model: trace.RestoredModel,
  rows: pipeline.Rows,
  numbers: pipeline.Numbers,
  batch_size: int,
  mesh: jax.sharding.Mesh,
) -> tuple[np.ndarray, np.ndarray]:
  """Computes the loss of every target of some rows without and with the true future.

  A model that generates from left to right does not have the tokens after t when it predicts from
  t. Therefore the logits at t are computed with the tokens after t replaced by those of another row
  (`cut`), so that the experts get as many tokens as in training, but none that tells the future.
  One pass gives one t of each routing group. The teacher-forced losses come from a pass of the same
  shape, so that a causal model's two losses are equal bit for bit.

  Args:
    model: the checkpoint, on `mesh`.
    rows: of the split.
    numbers: of the rows to evaluate, which must be full, and fill two routing groups at least.
    batch_size: rows of a pass, which fill routing groups.

  Returns:
    Losses in nats, float32 [R, L], without the true future and with it.
  """
  step = jax.jit(
    lambda params, bias_ZE, batch: (
      transformer.target_nll(
        model.config, params, bias_ZE, batch, jax.random.key(0), train=False
      ).nll_BL
    )
  )
  L, n, group_rows = rows.seq_len, len(numbers), dispatch.group_rows(model.config.moe, rows.seq_len)
  groups = batch_size // group_rows  # the other rows of a group are not changed

  def nll(batch: pipeline.Batch[np.ndarray]) -> np.ndarray:
    return sharding.whole(step(model.params, model.bias_ZE, sharding.place(batch, mesh)))

  hidden_RL, forced_RL = np.zeros((n, L), np.float32), np.zeros((n, L), np.float32)
  begin, last_print = 0.0, time.monotonic()
  for r in range(n):
    first = r - r % group_rows
    batch = rows.batch([numbers[first + i] for i in range(group_rows)] * groups)
    other = rows.batch([numbers[(r + group_rows) % n]] * batch_size)
    copies = np.arange(groups) * group_rows + r % group_rows  # places of this row in the batch
    forced_BL = nll(batch)
    begin = begin or time.monotonic()  # after the first pass, which compiles
    for start in range(0, L, groups):
      t = np.minimum(np.arange(start, start + groups), L - 1)
      last_B = np.full(batch_size, L - 1)
      last_B[copies] = t
      hidden_RL[r, t] = nll(cut(batch, other, last_B, rows.tokenizer.separator))[copies, t]
      forced_RL[r, t] = forced_BL[copies, t]
      if time.monotonic() - last_print > _SECONDS:
        last_print = time.monotonic()
        remaining = (last_print - begin) * (n * L / (r * L + t[-1] + 1) - 1)
        print(f"causal evaluation: row {r + 1} of {n}, {remaining:.0f} s left", flush=True)
  return hidden_RL, forced_RL


def measure_losses(
  model: trace.RestoredModel,
  rows: pipeline.Rows,
  num_rows: int,
  batch_size: int,
  mesh: jax.sharding.Mesh,
) -> dict[str, Any]:
  """Returns the entry `causal` of eval.json: means of `causal_losses`, in nats per token."""
  group_rows = dispatch.group_rows(model.config.moe, rows.seq_len)
  numbers = pipeline.spread(rows.num_full, max(-(-num_rows // group_rows), 2) * group_rows)
  numbers = numbers[: len(numbers) - len(numbers) % group_rows]
  if len(numbers) < 2 * group_rows:
    raise UserError(
      f"--causal: the split has {rows.num_full} rows, but needs at least {2 * group_rows}, because "
      "the future of one row is replaced by the text of another; choose another --split"
    )
  hidden_RL, forced_RL = causal_losses(model, rows, numbers, batch_size, mesh)
  return {
    "loss": float(hidden_RL.mean(dtype=np.float64)),
    "teacher_forced_loss": float(forced_RL.mean(dtype=np.float64)),
    "gap": float((hidden_RL - forced_RL).mean(dtype=np.float64)),
    "tokens": hidden_RL.size,
  }
