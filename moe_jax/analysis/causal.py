"""What a model's loss is when every token's future is hidden from its routers.

The letter R counts rows.
"""

import time
from typing import Any

import jax
import numpy as np

from moe_jax import config as config_lib
from moe_jax import sharding
from moe_jax.analysis import trace
from moe_jax.data import pipeline
from moe_jax.model import transformer
from moe_jax.training import losses

_SECONDS = 10  # between lines of progress


def cut(
  batch: pipeline.Batch[np.ndarray],
  other: pipeline.Batch[np.ndarray],
  last_B: np.ndarray,
  separator: int,
) -> pipeline.Batch[np.ndarray]:
  """Rows up to column `last_B`, and from there on the rows of `other`.

  The rest begins a document of its own at position 0, as a row does that begins inside a document;
  separators in it begin further ones. So it takes slots of the experts as any text would, and
  attention does not mix the two. Targets are the row's.
  """
  column_1L = np.arange(batch.tokens_BL.shape[1], dtype=np.int32)[None]
  past_BL = column_1L > last_B[:, None]
  tokens_BL = np.where(past_BL, other.tokens_BL, batch.tokens_BL)
  starts_BL = past_BL & ((tokens_BL == separator) | (column_1L == last_B[:, None] + 1))
  begun_BL = np.cumsum(starts_BL, axis=1, dtype=np.int32)
  last_segment_B1 = np.take_along_axis(batch.segments_BL, last_B[:, None], axis=1)
  segments_BL = np.where(past_BL, last_segment_B1 + begun_BL, batch.segments_BL)
  since_BL = column_1L - np.maximum.accumulate(np.where(starts_BL, column_1L, 0), axis=1)
  positions_BL = np.where(past_BL, since_BL, batch.positions_BL)
  return pipeline.Batch(tokens_BL, batch.targets_BL, segments_BL, positions_BL)


def causal_losses(
  model: trace.Model,
  rows: pipeline.Rows,
  numbers: pipeline.Numbers,
  batch_size: int,
  group_rows: int,
  mesh: jax.sharding.Mesh,
) -> tuple[np.ndarray, np.ndarray]:
  """Nats of every target of full rows, float32 [rows, L]: (without the true future, with it).

  A left-to-right reader does not have the tokens after t when it predicts from t, so the logits at
  t are read with those of another of the rows in their place (`cut`): the experts are as sought
  after as in training, by a text that tells nothing. A pass gives one t of each routing group. The
  teacher-forced losses come from a pass of the same shape, so that a causal model's are bit-equal.

  Args:
    numbers: the rows, 2 * group_rows or more and a multiple of it.
    batch_size: rows of a pass, a multiple of group_rows.
    group_rows: rows in a routing group; the other rows of a group stay as they are.
  """
  step = jax.jit(lambda params, bias_ZE, batch: losses.token_nll(
    transformer.evaluate(model.config, params, bias_ZE, batch).logits_BLV, batch.targets_BL
  )[0])  # fmt: skip
  L, groups, n = rows.seq_len, batch_size // group_rows, len(numbers)

  def nll(batch: pipeline.Batch[np.ndarray]) -> np.ndarray:
    return np.asarray(step(model.params, model.bias_ZE, sharding.to_global(batch, mesh)))

  hidden_RL, forced_RL = np.zeros((n, L), np.float32), np.zeros((n, L), np.float32)
  begin, said = 0.0, time.monotonic()
  for r in range(n):
    first = r - r % group_rows
    batch = rows.batch([numbers[first + i] for i in range(group_rows)] * groups)
    other = rows.batch([numbers[(r + group_rows) % n]] * batch_size)
    mine = np.arange(groups) * group_rows + r % group_rows  # this row's copy in each group
    forced_BL = nll(batch)
    begin = begin or time.monotonic()  # the first pass compiled
    for start in range(0, L, groups):
      t = np.minimum(np.arange(start, start + groups), L - 1)
      last_B = np.full(batch_size, L - 1)
      last_B[mine] = t
      hidden_RL[r, t] = nll(cut(batch, other, last_B, rows.tokenizer.separator))[mine, t]
      forced_RL[r, t] = forced_BL[mine, t]
      if time.monotonic() - said > _SECONDS:
        said = time.monotonic()
        left = (said - begin) * (n * L / (r * L + t[-1] + 1) - 1)
        print(f"causal evaluation: row {r + 1} of {n}, {left:.0f} s left", flush=True)
  return hidden_RL, forced_RL


def measure(
  model: trace.Model,
  rows: pipeline.Rows,
  moe: config_lib.MoE,
  num_rows: int,
  batch_size: int,
  mesh: jax.sharding.Mesh,
) -> dict[str, Any]:
  """`causal` of eval.json: mean losses of `causal_losses`, nats per token, and their difference."""
  group_rows = max(moe.group_size // rows.seq_len, 1) if moe.num_experts else 1
  numbers = pipeline.spread(rows.num_full, max(-(-num_rows // group_rows), 2) * group_rows)
  numbers = numbers[: len(numbers) - len(numbers) % group_rows]
  if len(numbers) < 2 * group_rows:
    raise config_lib.UserError(
      f"--causal: the split has {rows.num_full} rows, and hiding the future of one takes the text "
      f"of another: {2 * group_rows} rows at least; choose another --split"
    )
  hidden_RL, forced_RL = causal_losses(model, rows, numbers, batch_size, group_rows, mesh)
  return {
    "loss": float(hidden_RL.mean(dtype=np.float64)),
    "teacher_forced_loss": float(forced_RL.mean(dtype=np.float64)),
    "gap": float((hidden_RL - forced_RL).mean(dtype=np.float64)),
    "tokens": hidden_RL.size,
  }
