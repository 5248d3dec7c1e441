"""Looks into a checkpoint with a few rows: who took each token, what hiding the future costs."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from moe_jax import config as config_lib
from moe_jax import data, sharding
from moe_jax.analysis.specialisation import Trace
from moe_jax.model.transformer import Tokens
from moe_jax.training import losses

_SECONDS = 10  # between lines of progress


class Model(NamedTuple):
  """A checkpoint on the mesh in force."""

  graph: Any
  params: Any
  bias_ZE: jax.Array


def forward(model: Model, batch: data.Batch, **options: Any) -> tuple[Any, ...]:
  """What Transformer returns in evaluation."""
  transformer = nnx.merge(model.graph, model.params)
  tokens = Tokens(batch.tokens_BL, batch.segments_BL, batch.positions_BL)
  return transformer(tokens, model.bias_ZE, jax.random.key(0), train=False, **options)


def spread(available: int, count: int) -> list[int]:
  """At most `count` of the numbers below `available`, evenly spaced: neighbours share documents."""
  return np.unique(np.linspace(0, available - 1, min(count, available)).astype(int)).tolist()


def compile_choices(graph: Any) -> Callable[..., Any]:
  """(params, bias_ZE, batch) -> Choices."""
  return jax.jit(
    lambda params, bias_ZE, batch: forward(Model(graph, params, bias_ZE), batch, trace=True).choices
  )


def trace(
  choices: Callable[..., Any],
  model: Model,
  rows: data.Rows,
  numbers: Sequence[int],
  batch_size: int,
  mesh: jax.sharding.Mesh,
) -> Trace:
  """What became of every token of these rows; `choices` is compile_choices of the model's graph."""
  found = []
  for rows_B in _batches(numbers, batch_size):
    batch, domain_BL = rows.batch(rows_B), rows.domains_BL(rows_B)
    chosen = choices(model.params, model.bias_ZE, sharding.to_global(batch, mesh))
    real_BL = batch.segments_BL > 0
    row_BL, place_BL = np.indices(real_BL.shape)
    row_BL += len(found) * batch_size
    of_tokens = (batch.tokens_BL, row_BL, batch.segments_BL, place_BL, domain_BL)
    of_layers = [np.asarray(jax.device_get(x))[:, real_BL] for x in chosen]
    found.append((*(x[real_BL] for x in of_tokens), *of_layers))
  *tokens, routed, kept, gate = zip(*found, strict=True)
  layers = (np.concatenate(x, axis=1) for x in (routed, kept, gate))
  return Trace(*(np.concatenate(x) for x in tokens), *layers)


def _batches(numbers: Sequence[int], batch_size: int) -> Iterator[list[int]]:
  """The last one is filled up with -1, rows of padding."""
  for first in range(0, len(numbers), batch_size):
    rows_B = list(numbers[first : first + batch_size])
    yield rows_B + [-1] * (batch_size - len(rows_B))


def cut(batch: data.Batch, other: data.Batch, last_B: np.ndarray, separator: int) -> data.Batch:
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
  return data.Batch(tokens_BL, batch.targets_BL, segments_BL, positions_BL)


def causal_losses(
  model: Model,
  rows: data.Rows,
  numbers: Sequence[int],
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
    forward(Model(model.graph, params, bias_ZE), batch).logits_BLV, batch.targets_BL
  )[0])  # fmt: skip
  L, groups, n = rows.seq_len, batch_size // group_rows, len(numbers)

  def nll(batch):
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


def causal(
  model: Model,
  rows: data.Rows,
  moe: config_lib.MoE,
  num_rows: int,
  batch_size: int,
  mesh: jax.sharding.Mesh,
) -> dict[str, Any]:
  """`causal` of eval.json: mean losses of `causal_losses`, nats per token, and their difference."""
  group_rows = max(moe.group_size // rows.seq_len, 1) if moe.num_experts else 1
  numbers = spread(rows.num_full, max(-(-num_rows // group_rows), 2) * group_rows)
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
