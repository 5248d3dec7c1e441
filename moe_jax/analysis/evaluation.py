"""Evaluates a run for eval.py: its losses, other capacities, causal evaluation, routing.

Everything is read from the run's workdir.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from moe_jax import sharding
from moe_jax.analysis import causal, specialisation, trace
from moe_jax.config import Config, Mesh
from moe_jax.config.fields import plain
from moe_jax.data import pipeline
from moe_jax.errors import UserError
from moe_jax.kernels import choose
from moe_jax.model import cost
from moe_jax.model.pattern import moe_layers
from moe_jax.model.transformer import abstract_weights
from moe_jax.moe import dispatch, validation
from moe_jax.start import startup
from moe_jax.storage import checkpoint
from moe_jax.storage import workdir as workdir_lib
from moe_jax.training import evaluator as evaluator_lib
from moe_jax.training import placement
from moe_jax.training.evaluator import Evaluator, batch_size

# How much text, spread over the split, routing and causal evaluation take.
_TRACED_TOKENS = 16_384
_CAUSAL_ROWS = 16
# The numbers of an evaluation that depend on the capacity.
_CAPACITY_METRICS = (
  "loss", "bits_per_byte", "drop_fraction_Z", "gate_drop_fraction_Z", "drop_by_rank_ZK",
  "drop_by_position_ZP", "max_vio_Z",
)  # fmt: skip


def evaluate_run(
  workdir: str,
  step: int,
  split: str,
  *,
  capacity_factors: Sequence[float] = (),
  causal: bool = False,
  documents: int = 0,
  routing: bool = False,
  data: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Evaluates a checkpoint and writes eval.json and, with `routing`, routing.json.

  Args:
    step: of the checkpoint; 0 is the newest.
    capacity_factors: capacity factors to evaluate besides the run's own.
    causal: whether to measure the loss with the future hidden.
    documents: how many documents to give the loss of, the largest ones.
    routing: whether to trace which experts took which tokens.
    data: fields of config.data, for other text than the run's; the file is then eval_data.json.

  Returns:
    The contents of both files; {} without `routing`. Of several processes the first one writes the
    files, and the others get {} for both.
  """
  run = LoadedRun(workdir, step, split, data)
  check_options(run.config, capacity_factors, routing)
  traced: dict[str, Any] = {}
  with jax.set_mesh(run.mesh):
    model = run.restore(run.asked)
    result = run.loss(model, documents)
    if capacity_factors:
      result["capacity"] = run.capacity(model, capacity_factors)
    if causal:
      result["causal"] = run.causal(model)
    if routing:
      traced = run.routing(model)
  run.reader.close()
  if jax.process_index():
    return {}, {}
  if routing:
    traced = workdir_lib.write_object(run.path / workdir_lib.ROUTING, traced, indent=None)
  # Written last, because this file shows that the evaluation is complete.
  name = workdir_lib.EVAL_DATA if data else workdir_lib.EVAL
  return workdir_lib.write_object(run.path / name, result), traced


class LoadedRun:
  """A run whose workdir is open, and one split of its data, on this machine's devices."""

  def __init__(self, workdir: str, step: int, split: str, data: Mapping[str, Any] | None = None):
    """Opens a workdir; the arguments are those of `evaluation.run`."""
    self.path = workdir_lib.open_path(workdir)
    config = workdir_lib.read_config(self.path)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, **(data or {})))
    startup.start(config)
    mesh = mesh_here(config)
    model = choose.for_reading(config.model, workdir_lib.read_kernels(self.path))
    self.config, self.split = dataclasses.replace(config, model=model, mesh=mesh), split
    cost.check_evaluation_memory(self.config)
    self.reader = checkpoint.Checkpointer.reading(self.path)
    self.asked, self.step, self.steps = step, self.reader.find(step), self.reader.steps()
    self.rows = pipeline.load_rows(config.data, split)
    workdir_lib.check_same_tokenizer(self.path, self.rows.tokenizer.fingerprint)
    if not data:
      workdir_lib.check_same_data(self.path, {split: self.rows.digest})
    self.mesh = sharding.make_mesh(self.config.mesh)

  def restore(self, step: int) -> trace.RestoredModel:
    """Reads the checkpoint of a step; 0 is the newest, which is then that of this evaluation."""
    model = self.config.model
    found, stored = self.reader.restore_part(step, abstract_weights(model), self.mesh)
    self.step = self.step if step else found
    place_ZE = placement.recorded(self.path, found)
    if place_ZE is not None:  # back, so that each is reported under its first number
      stored = placement.permuted(
        stored, place_ZE, self.config, lambda config: abstract_weights(config.model)
      )
    return trace.RestoredModel(model, **stored)

  def loss(self, model: trace.RestoredModel, documents: int) -> dict[str, Any]:
    """Returns the numbers that every eval.json has, and the losses of that many documents."""
    config, rows = self.config, self.rows
    evaluator = Evaluator(config, rows, self.mesh, config.eval.final_batches)
    total = evaluator.total(model.params, model.bias_ZE, by_document=True)
    by_document = total.documents
    assert by_document is not None
    counts = cost.count(config)
    result = evaluator.result(total)
    result["documents"] = evaluator_lib.num_documents(by_document)
    if result["documents"] > 1:
      result["bits_per_byte_error"] = evaluator_lib.standard_error(by_document)
    if rows.domains:
      result["domains"] = evaluator.by_domain(by_document)
    if documents:
      largest = evaluator_lib.largest(rows, by_document, documents)
      result["largest_documents"] = [{"name": rows.name(n)} | numbers for n, numbers in largest]
    return result | {
      "step": self.step,
      "split": self.split,
      "data": config.data.mixture or f"{config.data.name} {config.data.path}".strip(),
      "layers": moe_layers(config.model),
      "parameters": counts.total,
      "active_parameters": counts.active,
      "flops_per_token": counts.flops_per_token,
      "gzip_bits_per_byte": evaluator.gzip_bits_per_byte,
      "device": jax.devices()[0].device_kind,
    }

  def capacity(self, model: trace.RestoredModel, factors: Sequence[float]) -> list[dict[str, Any]]:
    """Evaluates the same weights on the same text with other capacity factors."""
    points = []
    for factor in factors:
      config = validation.at_capacity(self.config, factor)
      evaluator = Evaluator(config, self.rows, self.mesh, config.eval.final_batches)
      result = evaluator.result(evaluator.total(model.params, model.bias_ZE))
      points.append(
        {"capacity_factor": plain(factor)} | {name: result[name] for name in _CAPACITY_METRICS}
      )
      said = f"capacity factor {factor:<6g} loss {result['loss']:.4f}  "
      print(f"{said}dropped {100 * np.mean(result['drop_fraction_Z']):.1f}%", flush=True)
    return points

  def causal(self, model: trace.RestoredModel) -> dict[str, Any]:
    """Measures the loss with every token's future hidden (causal.causal_losses)."""
    # With slots a token's row does not depend on later tokens. Rows sorted by expert do, and a
    # kernel rounds differently in another row.
    moe = dispatch.with_slots(self.config.model.moe)
    model = model._replace(config=dataclasses.replace(self.config.model, moe=moe))
    return causal.measure_losses(model, self.rows, _CAUSAL_ROWS, batch_size(self.config), self.mesh)

  def routing(self, model: trace.RestoredModel) -> dict[str, Any]:
    """Returns the contents of routing.json: the checkpoint's routing, compared with the others'."""
    rows, size = self.rows, batch_size(self.config)
    numbers = pipeline.spread(len(rows), max(_TRACED_TOKENS // rows.seq_len, 1))
    traced, saturation = trace.collect(model, rows, numbers, size, self.mesh), []
    for step in self.steps:
      if step != self.step:
        print(f"routing of step {step}", flush=True)
        other = trace.collect(self.restore(step), rows, numbers, size, self.mesh)
        overlap_Z = specialisation.overlap(other.routed_ZTE, traced.routed_ZTE)
        saturation.append({"step": step, "overlap_Z": np.round(overlap_Z, 6)})
    pieces = {i: rows.tokenizer.decode_bytes([i]) for i in np.unique(traced.token_T).tolist()}
    about = {"step": self.step, "split": self.split, "layers": moe_layers(self.config.model)}
    report = specialisation.routing_report(
      traced, pieces, rows.domains, rows.seq_len, self.config.model.moe.top_k
    )
    return about | report | {"saturation": saturation}


def mesh_here(config: Config) -> Mesh:
  """Returns the mesh of an evaluation here, of which every device holds whole routing groups."""
  group_rows = dispatch.group_rows(config.model.moe, config.data.seq_len)
  return sharding.fit_mesh(config.mesh, batch_size(config) // group_rows)


def check_options(config: Config, factors: Sequence[float], routing: bool) -> None:
  """Raises UserError for an option that has no meaning for this model."""
  for flag, value in (("--capacity_factors", factors), ("--routing", routing)):
    if value and not config.model.moe.num_experts:
      raise UserError(
        f"{flag}: config.model.moe.num_experts=0, a dense model, routes nothing; leave it out"
      )
  for factor in factors:
    validation.at_capacity(config, factor)


def describe(result: dict[str, Any]) -> str:
  """Formats the numbers of eval.json by domain and document, and those of --causal."""
  parts = result.get("domains", {}) | {d["name"]: d for d in result.get("largest_documents", [])}
  width = max([18, *map(len, parts)])
  lines = [
    f"{name:<{width}} {part['bits_per_byte']:.4f} bits per byte, loss {part['loss']:.4f}, "
    f"{part['tokens']:,} tokens"
    for name, part in parts.items()
  ]
  if causal := result.get("causal"):
    lines.append(
      f"causal loss        {causal['loss']:.4f} with the future hidden, "
      f"{causal['teacher_forced_loss']:.4f} with it: a gap of {causal['gap']:.4f} "
      f"({causal['tokens']:,} tokens)"
    )
  return "\n".join(lines)
