"""Held-out loss over a fixed set, and the routing report. Needs nothing but the workdir."""

import dataclasses
import json
import math
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax import backend, checkpoint, data, describe, losses, metrics, sharding, validation
from moe_jax import config as config_lib
from moe_jax.transformer import Transformer, bias_shape, moe_layers


class EvalSums(NamedTuple):
  sums: losses.Sums
  num_bytes: jax.Array  # int32 [], bytes of text the targets stand for


def eval_step(
  params: Any, bias_ZE: jax.Array, batch: data.Batch, bytes_V: jax.Array, *, graph: Any
) -> EvalSums:
  """Sums of one batch with the evaluation capacity factor and no jitter."""
  logits_BLV, stats = nnx.merge(graph, params)(
    batch.tokens_BL, batch.segments_BL, batch.positions_BL, bias_ZE, jax.random.key(0), train=False
  )
  real_BL = batch.segments_BL > 0
  num_bytes = jnp.sum(jnp.where(real_BL, bytes_V[batch.targets_BL], 0))
  return EvalSums(losses.sums(logits_BLV, batch.targets_BL, real_BL, stats), num_bytes)


def batch_size(config: config_lib.Config) -> int:
  return config.eval.batch_size or config.data.batch_size // config.train.accumulation


class Evaluator:
  """Runs `eval_step` over the first batches of a split, always the same ones."""

  def __init__(
    self,
    config: config_lib.Config,
    rows: data.Rows,
    mesh: jax.sharding.Mesh,
    graph: Any,
    num_batches: int,
  ):
    """Reads num_batches of the rows; 0 is the whole split."""
    self._config, self._rows, self._mesh = config, rows, mesh
    self._num_batches = num_batches
    self._bytes_V = np.zeros(config.model.vocab_size, np.int32)
    self._bytes_V[: rows.tokenizer.vocab_size] = rows.tokenizer.bytes_V
    self.batch_size = batch_size(config)
    self._step = jax.jit(lambda *args: eval_step(*args, graph=graph))
    self._add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b))

  def __call__(self, params: Any, bias_ZE: jax.Array) -> dict[str, Any]:
    """{loss: nats per token, perplexity, bits_per_byte, tokens, ... and metrics.moe_metrics}."""
    total = None
    batches = data.eval_batches(
      self._rows, self.batch_size, self._num_batches, jax.process_index(),
      jax.process_count(),
    )  # fmt: skip
    for batch in batches:
      batch = sharding.to_global(batch, self._mesh)
      sums = self._step(params, bias_ZE, batch, self._bytes_V)
      total = sums if total is None else self._add(total, sums)
    total = jax.device_get(total)
    sums = total.sums
    loss = float(sums.nll / sums.targets)
    result = {
      "loss": loss,
      "perplexity": math.exp(min(loss, 100.0)),
      # The cost of every target, document ends included, over the bytes of text.
      "bits_per_byte": float(sums.nll / math.log(2) / max(total.num_bytes, 1)),
      "tokens": int(sums.targets),
      "bytes": int(total.num_bytes),
    }
    if len(sums.moe.tokens):
      balance_Z = losses.load_balance(sums, config_lib.BalanceScope.GLOBAL)
      result["load_balance"] = float(np.mean(balance_Z))
      result |= {name: np.asarray(v) for name, v in metrics.moe_metrics(sums.moe).items()}
    return result


def read_config(workdir: pathlib.Path) -> config_lib.Config:
  path = workdir / "config.json"
  if not path.is_file():
    raise config_lib.UserError(
      f"--workdir={workdir}: no config.json there, so no run; train one first with train.py"
    )
  config = config_lib.from_json(path.read_text())
  validation.validate(config)
  return config


def check_same_data(workdir: pathlib.Path, digests: dict[str, str]) -> None:
  """Refuses text other than the run's own: another Python's standard library, changed files.

  Args:
    workdir: of the run; its data.json has the digests that it was started with.
    digests: {split: digest of its token stream}.
  """
  path = workdir / "data.json"
  recorded = json.loads(path.read_text()) if path.exists() else {}
  changed = [split for split, digest in digests.items() if recorded.get(split, digest) != digest]
  if changed:
    raise config_lib.UserError(
      f"--workdir={workdir}: the {' and '.join(changed)} text is not the one this run was trained "
      "with (another Python version, or changed files?); use the same text, or a new workdir"
    )


def fit_mesh(config: config_lib.Config) -> config_lib.Config:
  """The run's own mesh where the devices match, otherwise the batch over as many as divide it.

  Results do not depend on the mesh, so a checkpoint of 64 devices evaluates on one.
  """
  mesh, devices = config.mesh, jax.device_count()
  if mesh.data * mesh.fsdp * mesh.expert * mesh.tensor == devices:
    return config
  mesh = config_lib.Mesh(data=math.gcd(batch_size(config), devices))
  return dataclasses.replace(config, mesh=mesh)


def run(workdir: str, step: int, split: str) -> dict[str, Any]:
  """Evaluates a checkpoint (step 0: the newest) and writes `eval.json`."""
  path = pathlib.Path(workdir)
  config = read_config(path)
  backend.start(config.data)
  config = fit_mesh(config)
  reader = checkpoint.Checkpointer(path)
  steps = reader.steps()
  if not steps:
    raise config_lib.UserError(f"--workdir={workdir}: no checkpoint there yet; train.py makes one")
  if step and step not in steps:
    raise config_lib.UserError(f"--step={step}: no such checkpoint; there are {steps}")
  step = step or steps[-1]
  rows = data.load_rows(config.data, split)
  check_same_data(path, {split: rows.digest})
  mesh = sharding.make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    graph, params = nnx.split(nnx.eval_shape(lambda: Transformer(config.model, nnx.Rngs(0))))
    bias_ZE = jax.ShapeDtypeStruct(bias_shape(config.model), jnp.float32)
    needed = {"params": params, "bias_ZE": bias_ZE}
    shapes = checkpoint.abstract(needed, sharding.param_shardings(needed, mesh))
    restored = reader.restore_params(step, shapes)
    evaluator = Evaluator(config, rows, mesh, graph, config.eval.final_batches)
    result = evaluator(restored["params"], restored["bias_ZE"])
  reader.close()
  counts = describe.count(config)
  evaluated = min(len(rows), evaluator.batch_size * config.eval.final_batches or len(rows))
  result |= {
    "step": step,
    "split": split,
    "layers": moe_layers(config.model),
    "parameters": counts.total,
    "active_parameters": counts.active,
    "gzip_bits_per_byte": data.gzip_bits_per_byte(rows.documents(evaluated)),
    "device": jax.devices()[0].device_kind,
  }
  plain = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in result.items()}
  (path / "eval.json").write_text(json.dumps(plain, indent=2) + "\n")
  return plain
