"""Held-out loss over a fixed set of batches. The letter G counts domains of documents here."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import config as config_lib
from moe_jax import sharding
from moe_jax.data import pipeline
from moe_jax.model import transformer
from moe_jax.training import losses, metrics


class DomainSums(NamedTuple):
  """Of the targets of each domain's documents."""

  nll_G: jax.Array  # float32, nats
  targets_G: jax.Array  # int32
  bytes_G: jax.Array  # int32


class EvalSums(NamedTuple):
  sums: losses.Sums
  num_bytes: jax.Array  # int32 [], bytes of text the targets stand for
  domains: DomainSums | None  # None of unlabelled text


def eval_step(
  params: Any,
  bias_ZE: jax.Array,
  batch: pipeline.Batch[jax.Array],
  bytes_V: jax.Array,
  domain_BL: jax.Array | None = None,
  *,
  model: config_lib.Model,
  num_domains: int = 0,
) -> EvalSums:
  """Sums of one batch with the evaluation capacity factor and no jitter."""
  logits_BLV, stats, _ = transformer.evaluate(model, params, bias_ZE, batch)
  real_BL = batch.segments_BL > 0
  bytes_BL = jnp.where(real_BL, bytes_V[batch.targets_BL], 0)
  domains = None
  if domain_BL is not None:
    of_domain_GBL = domain_BL[None] == jnp.arange(num_domains)[:, None, None]
    nll_BL, _ = losses.token_nll(logits_BLV, batch.targets_BL)
    values = (nll_BL, real_BL.astype(jnp.int32), bytes_BL)
    domains = DomainSums(
      *(jnp.sum(jnp.where(of_domain_GBL, x_BL[None], 0), axis=(1, 2)) for x_BL in values)
    )
  sums = losses.sums(logits_BLV, batch.targets_BL, real_BL, stats)
  return EvalSums(sums, jnp.sum(bytes_BL), domains)


def batch_size(config: config_lib.Config) -> int:
  return config.eval.batch_size or config.data.batch_size // config.train.accumulation


class Evaluator:
  """Runs `eval_step` over the first batches of a split, always the same ones."""

  def __init__(
    self,
    config: config_lib.Config,
    rows: pipeline.Rows,
    mesh: jax.sharding.Mesh,
    num_batches: int,
  ):
    """Reads num_batches of the rows; 0 is the whole split."""
    self._config, self._rows, self._mesh = config, rows, mesh
    self._num_batches = num_batches
    self._bytes_V = np.zeros(config.model.vocab_size, np.int32)
    self._bytes_V[: rows.tokenizer.vocab_size] = rows.tokenizer.bytes_V
    self.batch_size = batch_size(config)
    step = functools.partial(eval_step, model=config.model, num_domains=len(rows.domains))
    self._step = jax.jit(step)
    self._add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b))

  def __call__(self, params: Any, bias_ZE: jax.Array) -> dict[str, Any]:
    """{loss: nats per token, perplexity, bits_per_byte, tokens, ... and metrics.moe_metrics}."""
    return self.result(self.total(params, bias_ZE))

  def total(self, params: Any, bias_ZE: jax.Array) -> EvalSums:
    """On the host."""
    total = None
    for rows_B in pipeline.eval_rows(
      self._rows, self.batch_size, self._num_batches, jax.process_index(), jax.process_count()
    ):
      domain_BL = self._rows.domains_BL(rows_B) if self._rows.domains else None
      batch, domain_BL = sharding.to_global((self._rows.batch(rows_B), domain_BL), self._mesh)
      sums = self._step(params, bias_ZE, batch, self._bytes_V, domain_BL)
      total = sums if total is None else self._add(total, sums)
    return jax.device_get(total)

  def result(self, total: EvalSums) -> dict[str, Any]:
    sums = total.sums
    loss = float(sums.nll / sums.targets)
    result: dict[str, float | np.ndarray] = {
      "loss": loss,
      "perplexity": math.exp(min(loss, 100.0)),
      # The cost of every target, document ends included, over the bytes of text.
      "bits_per_byte": float(sums.nll / math.log(2)) / max(int(total.num_bytes), 1),
      "tokens": int(sums.targets),
      "bytes": int(total.num_bytes),
    }
    if len(sums.moe.tokens):
      balance_Z = losses.load_balance(sums, config_lib.BalanceScope.GLOBAL)
      result["load_balance"] = float(np.mean(balance_Z))
      result |= {name: np.asarray(v) for name, v in metrics.moe_metrics(sums.moe).items()}
    return result

  def by_domain(self, domains: DomainSums) -> dict[str, dict[str, Any]]:
    """{name: the loss of its documents} of the domains that were met."""
    return {
      name: {
        "loss": float(nll / targets),
        "bits_per_byte": float(nll / math.log(2)) / max(int(num_bytes), 1),
        "tokens": int(targets),
        "bytes": int(num_bytes),
      }
      for name, nll, targets, num_bytes in zip(self._rows.domains, *domains, strict=True)
      if targets
    }
