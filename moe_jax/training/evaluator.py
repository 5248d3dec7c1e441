"""Held-out loss over a fixed set of rows, spread over a split. The letter M counts documents."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import sharding
from moe_jax.config import BalanceScope, Config, Model
from moe_jax.data import pipeline
from moe_jax.model import transformer
from moe_jax.start import progress
from moe_jax.training import losses, metrics


class DocumentSums(NamedTuple):
  """Sums over the targets of each document of a split; 0 for a document that no row touches."""

  nll_M: np.ndarray  # float64, nats
  targets_M: np.ndarray  # int64
  bytes_M: np.ndarray  # int64


class EvalSums(NamedTuple):
  """Sums over the rows of an evaluation, on the host: int64 and float64, so that none overflows."""

  sums: losses.Sums
  num_bytes: np.ndarray  # [], bytes of text that the targets stand for
  documents: DocumentSums | None  # None where it was not asked for


def eval_step(
  params: Any,
  bias_ZE: jax.Array,
  batch: pipeline.Batch[jax.Array],
  bytes_V: jax.Array,
  *,
  model: Model,
) -> tuple[losses.Sums, jax.Array, jax.Array]:
  """Returns the sums of one batch, the bytes of its text, and the nats of each target (nll_BL).

  The router adds no noise and takes the capacity factor of evaluation.
  """
  key = jax.random.key(0)  # nothing is drawn
  found = transformer.target_nll(model, params, bias_ZE, batch, key, train=False)
  real_BL = batch.segments_BL > 0
  bytes_BL = jnp.where(real_BL, bytes_V[batch.targets_BL], 0)
  sums = losses.sums(found.nll_BL, found.log_z_BL, real_BL, found.stats)
  return sums, jnp.sum(bytes_BL), found.nll_BL


def batch_size(config: Config) -> int:
  return config.eval.batch_size or config.data.batch_size // config.train.accumulation


class Evaluator:
  """Runs `eval_step` over rows spread evenly over a split, always the same ones."""

  def __init__(
    self,
    config: Config,
    rows: pipeline.Rows,
    mesh: jax.sharding.Mesh,
    num_batches: int,
  ):
    """Reads num_batches of the rows (`pipeline.eval_rows`); 0 is the whole split."""
    self._config, self._rows, self._mesh = config, rows, mesh
    self.stopped: Callable[[], bool] = lambda: False  # before a batch: InterruptedError
    self._bytes_V = np.zeros(config.model.vocab_size, np.int32)
    self._bytes_V[: rows.tokenizer.vocab_size] = rows.tokenizer.bytes_V
    self.batch_size = batch_size(config)
    self.numbers = pipeline.eval_rows(rows, self.batch_size, num_batches)
    # Sums are whole on every process; the targets' nats stay where their rows are.
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    self._step = jax.jit(
      functools.partial(eval_step, model=config.model),
      out_shardings=(everywhere, everywhere, None),
    )

  @functools.cached_property
  def gzip_bits_per_byte(self) -> float:
    """The bits per byte that gzip -9 takes for the same rows."""
    return pipeline.gzip_bits_per_byte(self._rows, self.numbers)

  def __call__(self, params: Any, bias_ZE: jax.Array) -> dict[str, Any]:
    """Returns the numbers of `result`, and gzip's bits per byte of the same rows."""
    gzip = {"gzip_bits_per_byte": self.gzip_bits_per_byte}
    return self.result(self.total(params, bias_ZE)) | gzip

  def total(self, params: Any, bias_ZE: jax.Array, *, by_document: bool = False) -> EvalSums:
    """Returns the sums over all rows; `by_document`, also those of documents."""
    total: Any = None
    documents = None
    if by_document:
      shape = self._rows.starts_M.shape
      documents = DocumentSums(*(np.zeros(shape, dtype) for dtype in (float, int, int)))
    told = progress.Progress("evaluated", len(self.numbers), "rows")
    for done, numbers_B in enumerate(pipeline.eval_batches(self.numbers, self.batch_size), 1):
      if self.stopped():
        raise InterruptedError
      batch = self._rows.batch(numbers_B)
      placed = sharding.place(batch, self._mesh)
      sums, num_bytes, nll_BL = self._step(params, bias_ZE, placed, self._bytes_V)
      host = jax.tree.map(_wide, jax.device_get((sums, num_bytes)))
      total = host if total is None else jax.tree.map(np.add, total, host)
      if documents is not None:
        self._add_documents(documents, numbers_B, batch, sharding.whole(nll_BL))
      if jax.process_index() == 0:
        told.at(min(done * self.batch_size, len(self.numbers)))
    sums, num_bytes = total
    return EvalSums(sums, num_bytes, documents)

  def _add_documents(
    self,
    documents: DocumentSums,
    numbers_B: np.ndarray,
    batch: pipeline.Batch[np.ndarray],
    nll_BL: np.ndarray,
  ) -> None:
    document_BL = self._rows.documents_BL(numbers_B)
    real_BL = document_BL >= 0
    values = (nll_BL, np.ones_like(document_BL), self._bytes_V[batch.targets_BL])
    for sums_M, values_BL in zip(documents, values, strict=True):
      np.add.at(sums_M, document_BL[real_BL], values_BL[real_BL])

  def result(self, total: EvalSums) -> dict[str, Any]:
    """Returns loss (nats per token), perplexity, bits_per_byte, tokens, bytes and moe_metrics."""
    sums = total.sums
    loss = float(sums.nll / sums.targets)
    result: dict[str, float | np.ndarray] = {
      "loss": loss,
      "perplexity": math.exp(min(loss, 100.0)),
      # The cost of every target, document ends included, over the bytes of text.
      "bits_per_byte": bits_per_byte(sums.nll, total.num_bytes),
      "tokens": int(sums.targets),
      "bytes": int(total.num_bytes),
    }
    if len(sums.moe.tokens):
      # Ratios of sums: as float32 they cannot overflow, where jax would make int64 an int32.
      result |= jax.device_get(_ratios(jax.tree.map(np.float32, sums)))
      result["load_balance"] = float(result["load_balance"])
    return result

  def by_domain(self, documents: DocumentSums) -> dict[str, dict[str, Any]]:
    """Returns {name: loss of its documents} for each domain that the rows touch."""
    losses_of = {}
    for number, name in enumerate(self._rows.domains):
      sums = [np.sum(sums_M[self._rows.domain_M == number]) for sums_M in documents]
      if sums[1]:
        losses_of[name] = _loss(*sums)
    return losses_of


@jax.jit  # one program, where each operation by itself would be one
def _ratios(sums: losses.Sums) -> dict[str, jax.Array]:
  balance_Z = losses.load_balance(sums, BalanceScope.GLOBAL)
  return {"load_balance": jnp.mean(balance_Z)} | metrics.moe_metrics(sums.moe)


def _wide(value: np.ndarray) -> np.ndarray:
  return np.asarray(value, np.float64 if np.issubdtype(value.dtype, np.floating) else np.int64)


def _loss(nll: Any, targets: Any, num_bytes: Any) -> dict[str, Any]:
  return {
    "loss": float(nll / targets),
    "bits_per_byte": bits_per_byte(nll, num_bytes),
    "tokens": int(targets),
    "bytes": int(num_bytes),
  }


def bits_per_byte(nll: Any, num_bytes: Any) -> float:
  """Returns the nats of all targets, in bits, over the bytes of their text."""
  return float(nll) / math.log(2) / max(int(num_bytes), 1)


def standard_error(documents: DocumentSums) -> float:
  """Returns the standard error of the bits per byte, with the documents as a random sample.

  The error of a ratio of two sums over documents (Cochran 1977, Sampling Techniques, eq. 6.13),
  without the correction for a finite population. It takes two documents at least.
  """
  touched_M, count = documents.targets_M > 0, num_documents(documents)
  nll_M, bytes_M = documents.nll_M[touched_M], documents.bytes_M[touched_M]
  residual_M = nll_M - bytes_M * (np.sum(nll_M) / np.sum(bytes_M))
  variance = count / (count - 1) * np.sum(residual_M**2)
  return float(np.sqrt(variance) / math.log(2) / max(np.sum(bytes_M), 1))


def num_documents(documents: DocumentSums) -> int:
  """Returns the number of documents that the rows touch."""
  return int(np.count_nonzero(documents.targets_M))


def largest(
  rows: pipeline.Rows, documents: DocumentSums, count: int
) -> list[tuple[int, dict[str, Any]]]:
  """Returns (number in the split, loss) of the documents of which most bytes were read."""
  order = np.argsort(-documents.bytes_M, kind="stable")[:count]
  sums_CM = np.stack([np.asarray(x, float) for x in documents])[:, order]
  return [
    (int(rows.source_M[m]), _loss(*sums))
    for m, sums in zip(order, sums_CM.T, strict=True)
    if sums[1]
  ]
