"""The log probability of each token of given rows, and the perplexity of a long text in windows."""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import sharding
from moe_jax.config import Model
from moe_jax.inference import decoding, padding
from moe_jax.inference.generate import TextGenerator
from moe_jax.kernels.cross_entropy import token_nll

Ids = Sequence[int]


class Scores(NamedTuple):
  """Of the N ids that count."""

  log_probs: np.ndarray  # float32 [N], nats
  best: np.ndarray  # bool [N], whether no other id is more probable


def scores_of_windows(
  text: TextGenerator,
  texts: Sequence[Sequence["ScoredWindow"]],
  batch: int,
  progress: Callable[[int], None],
) -> list[Scores]:
  """Returns the Scores of the ids that count in the windows of each text, one after another.

  `batch` windows are computed together on the mesh of `text`, of windows over 2,048 ids fewer, for
  as much memory; the longest first. Nothing is dropped. `progress` gets the number that is done.
  """
  rows = [window for windows in texts for window in windows]
  order = sorted(range(len(rows)), key=lambda i: -len(rows[i].ids))
  done: dict[int, Scores] = {}
  while len(done) < len(rows):
    longest = len(rows[order[len(done)]].ids)
    together = max(min(batch, batch * 2048 // longest), 1)
    chosen = order[len(done) : len(done) + together]
    ids = [np.asarray(rows[i].ids) for i in chosen]
    with jax.set_mesh(text.mesh):
      placed = sharding.place(padding.padded(ids, text.rows), text.mesh)
      found = sharding.whole(_scores(text.weights, *placed, model=text.model))
    for i, log_probs, best in zip(chosen, *found, strict=False):  # the rest is padding
      done[i] = Scores(log_probs[-rows[i].scored :], best[-rows[i].scored :])
    progress(len(done))
  scores = (done[i] for i in range(len(rows)))
  empty = Scores(np.zeros(0, np.float32), np.zeros(0, bool))  # of a text without ids
  parts = [[empty, *itertools.islice(scores, len(windows))] for windows in texts]
  return [Scores(*map(np.concatenate, zip(*part, strict=True))) for part in parts]


@functools.partial(jax.jit, static_argnames="model")
def _scores(
  weights: decoding.DecoderWeights, tokens_BL: jax.Array, start_B: jax.Array, *, model: Model
) -> tuple[jax.Array, jax.Array]:
  """Returns the log probability of each token but the first, and whether it is the best."""
  logits_BLV = decoding.logits_of_rows(weights, tokens_BL, start_B, model=model)[:, :-1]
  next_BL = tokens_BL[:, 1:]
  nll_BL, _ = token_nll(logits_BLV, next_BL)
  return -nll_BL, jnp.argmax(logits_BLV, axis=-1) == next_BL


class ScoredWindow(NamedTuple):
  """A row of a long text, of which the last `scored` ids count."""

  ids: list[int]
  scored: int


def windows(context: Ids, ids: Ids, length: int, stride: int) -> Iterator[ScoredWindow]:
  """Yields windows that together score every id of a text once.

  A window predicts from `length` ids at most, and moves on by `stride`, at most `length`: after the
  first one, each id is predicted from length - stride + 1 ids before it at least. `context`, one id
  at least, stands before the text, and its first ids are cut where they are too many.
  """
  ids, done = [*context, *ids], len(context)
  end = min(done + length, len(ids))
  while done < len(ids):
    yield ScoredWindow(ids[max(end - length - 1, 0) : end], end - done)
    done, end = end, min(end + stride, len(ids))
