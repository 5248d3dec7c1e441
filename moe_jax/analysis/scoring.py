"""The log probability of each token of given rows, and the perplexity of a long text in windows."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import sharding
from moe_jax.config import Model
from moe_jax.inference import decoding, padding
from moe_jax.inference.generate import TextGenerator
from moe_jax.training import losses

Ids = Sequence[int]


class Scores(NamedTuple):
  """Of the ids of a row after its first."""

  log_probs: np.ndarray  # float32 [N - 1], nats
  best: np.ndarray  # bool [N - 1], whether no other id is more probable


class Scorer:
  """Scores rows of ids in batches on the mesh of a TextGenerator; nothing is dropped."""

  def __init__(self, text: TextGenerator, batch: int):
    """`batch` rows are computed together; of rows over 2,048 ids fewer, for as much memory."""
    self._text, self._batch = text, batch
    self._scores = jax.jit(functools.partial(_scores, model=text.model))

  def __call__(
    self, rows: Sequence[Ids], progress: Callable[[int], None] = lambda done: None
  ) -> list[Scores]:
    """Returns the Scores of each row, which has two ids at least; longest rows are computed first.

    `progress` gets the number of rows that are done.
    """
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    found: dict[int, Scores] = {}
    while len(found) < len(rows):
      together = max(min(self._batch, self._batch * 2048 // len(rows[order[len(found)]])), 1)
      chosen = order[len(found) : len(found) + together]
      for i, scores in zip(chosen, self._together([rows[i] for i in chosen]), strict=True):
        found[i] = scores
      progress(len(found))
    return [found[i] for i in range(len(rows))]

  def of_windows(
    self, texts: Sequence[Sequence["ScoredWindow"]], progress: Callable[[int], None]
  ) -> list[Scores]:
    """Returns the Scores of the ids that count in the windows of each text, one after another."""
    scores = iter(self([window.ids for text in texts for window in text], progress))
    found = []
    for text in texts:
      parts = [[part[-w.scored :] for part in next(scores)] for w in text]
      empty = [np.zeros(0, np.float32), np.zeros(0, bool)]  # of a text without ids
      found.append(Scores(*map(np.concatenate, zip(empty, *parts, strict=True))))
    return found

  def _together(self, rows: list[Ids]) -> list[Scores]:
    text = self._text
    tokens_BL, start_B = padding.padded([np.asarray(row) for row in rows], text.rows)
    with jax.set_mesh(text.mesh):
      placed = sharding.place((tokens_BL, start_B), text.mesh)
      log_probs_BL, best_BL = sharding.whole(self._scores(text.weights, *placed))
    return [
      Scores(log_probs[1 - len(row) :], best[1 - len(row) :])
      for row, log_probs, best in zip(rows, log_probs_BL, best_BL, strict=False)
    ]


def _scores(
  weights: decoding.DecoderWeights, tokens_BL: jax.Array, start_B: jax.Array, *, model: Model
) -> tuple[jax.Array, jax.Array]:
  """Returns the log probability of each token but the first, and whether it is the best."""
  logits_BLV = decoding.logits_of_rows(weights, tokens_BL, start_B, model=model)[:, :-1]
  next_BL = tokens_BL[:, 1:]
  nll_BL, _ = losses.token_nll(logits_BLV, next_BL)
  return -nll_BL, jnp.argmax(logits_BLV, axis=-1) == next_BL


class ScoredWindow(NamedTuple):
  """A row of a long text, of which the last `scored` ids count."""

  ids: list[int]
  scored: int


def windows(context: Ids, ids: Ids, length: int, stride: int) -> Iterator[ScoredWindow]:
  """Yields windows that together score every id of a text once.

  Args:
    context: the ids before the text; one at least. Where they are too many the first are cut.
    ids: of the text.
    length: ids that a window predicts from at most.
    stride: ids by which a window moves on, at most `length`. After the first window, each id is
      predicted from length - stride + 1 ids before it at least.
  """
  ids, done = [*context, *ids], len(context)
  end = min(done + length, len(ids))
  while done < len(ids):
    yield ScoredWindow(ids[max(end - length - 1, 0) : end], end - done)
    done, end = end, min(end + stride, len(ids))
