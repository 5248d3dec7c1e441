"""Reads a Hugging Face checkpoint onto the mesh, piece by piece, and saves it as a run's workdir.

A device asks for its own piece of each parameter, and only that piece is read. So a host holds what
its devices hold, and one tensor of the file more.
"""

import dataclasses
import functools
import pathlib
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import sharding
from moe_jax.config import Config, Data, Dispatch, Loss, Mesh, Model, override
from moe_jax.data import tokenizers
from moe_jax.errors import UserError, si
from moe_jax.hf import families, fields, files, layout, parts
from moe_jax.hf.fields import Family
from moe_jax.hf.layout import Ranges, Tensor
from moe_jax.kernels import platform
from moe_jax.model import cost, pattern, transformer
from moe_jax.moe import validation
from moe_jax.start import progress
from moe_jax.storage import files as file_lib
from moe_jax.storage import weights as weights_lib
from moe_jax.storage import workdir as workdir_lib
from moe_jax.storage.weights import Weights

_HEAD, _EMBED = "lm_head.weight", "model.embed_tokens.weight"
_NAMED = 20  # tensors that do not fit; a wrong file has thousands
_LENGTH = 2048  # of a row, where a model names none
# Files of which a folder with a tokenizer has one.
_TOKENIZER = r"tokeniz|special_tokens|added_tokens|vocab\.|merges\.|tekken|.*(tiktoken|\.model$)"
_READ, _WRITTEN = 5e8, 3e8  # bytes per second, for the prediction of --dry-run


class ImportPlan(NamedTuple):
  """What an import would do."""

  family: Family
  config: Config
  tensors: list[Tensor]
  stored: files.StoredTensors
  notes: list[str]

  @property
  def bytes_to_read(self) -> int:
    """The bytes of all tensors that are read."""
    return sum(self.stored.size(tensor.name) for tensor in self.tensors)

  @property
  def largest(self) -> int:
    """The bytes of the largest tensor."""
    return max(self.stored.size(tensor.name) for tensor in self.tensors)


def plan(folder: str, mesh: Mesh) -> ImportPlan:
  """Reads config.json and the headers, and compares them with our model.

  Raises:
    UserError: names what is missing, left over, of another shape, or cannot be expressed.
  """
  path = pathlib.Path(folder)
  if not path.is_dir():
    raise UserError(f"--from={folder}: no such folder; download the checkpoint into one first")
  theirs = fields.text_config(files.read_hf_json(path / files.CONFIG))
  where = str(path / files.CONFIG)
  family = families.family_of(theirs, where)
  _check_quantization(theirs, where)
  model, unread = fields.to_model(family, theirs, where)
  notes = [f"not read of {files.CONFIG}: {', '.join(unread)}"] if unread else []
  stored = files.StoredTensors(path)
  layer = layout.replaced(family.layer, family.stacked, stored.shapes)
  experts = model.moe.num_experts if any("{expert}" in row.theirs for row in layer) else 0
  if model.num_layers + experts > len(stored.shapes):  # before millions of them are listed
    raise UserError(
      f"{where}: it has {model.num_layers:,} layers and {model.moe.num_experts:,} experts, but the "
      f"files hold {len(stored.shapes):,} tensors; they are of another model"
    )
  if model.tied_head and _HEAD in stored.shapes and not stored.same(_HEAD, _EMBED):
    model = dataclasses.replace(model, tied_head=False)  # as transformers does
    notes.append(f"{_HEAD} is not the embedding, so tie_word_embeddings=true is not followed")
  config = _config(model, mesh, theirs, path)
  validation.validate(config)
  config = _fit_rows(config, theirs.get("max_position_embeddings"))
  if config.data.tokenizer == "bytes":
    notes.append("no tokenizer is there: a text is its bytes")
  else:
    tokenizers.check_fits(config)
  try:
    tensors = layout.tensors(model, parts.TOP, layer, parts.LAYER)
  except KeyError as error:
    raise UserError(f"{where}: a {family.model_type} has no {error.args[0]}") from None
  notes += _compare(family, model, tensors, stored)
  return ImportPlan(family, config, tensors, stored, notes)


def _check_quantization(theirs: Mapping[str, Any], where: str) -> None:
  """Raises a UserError for weights in a format that is not read."""
  found = theirs.get("quantization_config")
  kind = found.get("quant_method") if isinstance(found, dict) else None
  if kind not in (None, "fp8", "mxfp4"):
    raise UserError(
      f"{where}: its weights are quantized by {kind!r}, which is not read; take the checkpoint in "
      "bfloat16, or one in fp8 or mxfp4"
    )


def _config(model: Model, mesh: Mesh, theirs: Mapping[str, Any], folder: pathlib.Path) -> Config:
  """Returns the config of the workdir: their model, without dropped tokens as there."""
  found = sorted(path.name for path in folder.iterdir() if re.match(_TOKENIZER, path.name))
  named = next((name for name in (files.TOKENIZER, files.SENTENCEPIECE) if name in found), "")
  if found and not named:
    raise UserError(
      f"{folder}: its tokenizer, {found[0]}, is not read; {files.TOKENIZER} is, which "
      "AutoTokenizer.from_pretrained(...).save_pretrained(...) of transformers writes"
    )
  data = Data(tokenizer=str(folder / named) if named else "bytes")
  coefficient = theirs.get("router_aux_loss_coef")
  balance = float(coefficient) * model.moe.top_k if isinstance(coefficient, int | float) else 0.0
  loss = Loss(load_balance=balance if model.moe.num_experts else 0.0, router_z=0.0)
  config = Config(model=model, mesh=mesh, data=data, loss=loss)
  return override(config, {"model.moe.dispatch": Dispatch.GROUPED})


def _fit_rows(config: Config, longest: Any) -> Config:
  """Takes the model's own length, or as much of it as half of the memory has room for logits."""
  mesh = config.mesh
  length = longest if type(longest) is int and longest > 0 else _LENGTH
  room = (platform.memory_bytes() or sys.maxsize) - cost.check_weights_memory(config)
  logits = 4 * config.model.vocab_size / mesh.tensor  # bytes of a token
  while length * logits > room / 2 and length > _LENGTH:
    length //= 2
  rows = mesh.sequences * min(max(8 * _LENGTH // length, 1), 8)
  return override(config, {"data.seq_len": length, "data.batch_size": rows})


def _compare(
  family: Family, model: Model, tensors: list[Tensor], stored: files.StoredTensors
) -> list[str]:
  """Returns notes about tensors that are left out; raises a UserError where some do not fit."""
  wanted = {tensor.name: tensor for tensor in tensors}
  left_out = family.left_out.format(num_layers=model.num_layers)
  tied = {_HEAD} if model.tied_head else set()
  extra: list[str] = []
  skipped: list[str] = []
  for name in stored.shapes:
    if name in wanted or name in tied or re.fullmatch(parts.COMPUTED, name):
      continue
    (skipped if left_out and re.fullmatch(left_out, name) else extra).append(name)
  if not wanted.keys() & stored.shapes.keys():
    raise UserError(
      f"{stored.folder}: no tensor has the name of one of a {family.model_type}: the files begin "
      f"with {next(iter(stored.shapes), 'none')}, the model with {next(iter(wanted))}"
    )
  wrong = [f"missing: {name}" for name in wanted if name not in stored.shapes]
  wrong += [f"not of this model: {name}" for name in extra]
  for name in wanted.keys() & stored.shapes.keys():
    if stored.shapes[name] != wanted[name].shape:
      shapes = f"{list(stored.shapes[name])}, not {list(wanted[name].shape)}"
      wrong.append(f"of another shape: {name} is {shapes}")
    elif not stored.readable(name):
      wrong.append(f"of a type that is not read: {name} is {stored.types[name]}")
  if wrong:
    more = [f"and {len(wrong) - _NAMED} more"] if len(wrong) > _NAMED else []
    lines = "\n  ".join(sorted(wrong)[:_NAMED] + more)
    raise UserError(
      f"{stored.folder}: {len(wrong)} tensor(s) do not fit its config.json:\n  {lines}"
    )
  if skipped:
    return [f"left out: {len(skipped)} tensors of {family.why_left_out}"]
  return []


def read_weights(made: ImportPlan, mesh: jax.sharding.Mesh) -> Weights:
  """Reads the weights onto a mesh; raises a UserError that names tensors that are not finite."""
  model = made.config.model
  parameters = layout.by_parameter(made.tensors)
  damaged: set[str] = set()
  told = progress.Progress("read", made.bytes_to_read, "MB")

  def read_range(name: str, ranges: Ranges) -> np.ndarray:
    values = made.stored.read(name, ranges)
    if not np.isfinite(values).all():
      damaged.add(name)
    told.at(made.stored.bytes_read)
    return values

  def array(path: layout.Path, shape: tuple[int, ...], where: jax.sharding.Sharding) -> jax.Array:
    shards: dict[Any, jax.Array] = {}
    found = []
    for device, index in where.addressable_devices_indices_map(shape).items():
      ranges = tuple(slice(*i.indices(n)[:2]) for i, n in zip(index or (), shape, strict=True))
      key = tuple((r.start, r.stop) for r in ranges)
      if key not in shards:
        pieces = layout.pieces(path, ranges, parameters[path], read_range)
        shards[key] = _fill(tuple(r.stop - r.start for r in ranges), pieces, device)
      found.append(jax.device_put(shards[key], device))
    return jax.make_array_from_single_device_arrays(shape, where, found)

  abstract = transformer.abstract_params(model)
  params = jax.tree_util.tree_map_with_path(
    lambda path, leaf, where: array(sharding.path_of(path), leaf.shape, where),
    abstract,
    sharding.param_shardings(abstract, mesh),
  )
  shape = pattern.bias_shape(model)
  if layout.BIAS in parameters:
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    bias_ZE = array(layout.BIAS, shape, where)
  else:
    bias_ZE = jnp.zeros(shape)
  if damaged:
    raise UserError(
      f"{made.stored.folder}: values that are not finite in {', '.join(sorted(damaged))}"
    )
  return Weights(params, bias_ZE)


def _fill(
  shape: tuple[int, ...], pieces: Iterator[tuple[tuple[int, ...], np.ndarray]], device: jax.Device
) -> jax.Array:
  """Returns a float32 array on a device, which takes one piece after another."""
  with jax.default_device(device):
    whole = None
    for start, values in pieces:
      values = values.astype(np.float32)
      if values.shape == shape:  # a single piece
        return jax.device_put(values, device)
      if whole is None:
        whole = jnp.zeros(shape)
      whole = _placed(whole, values, start)
      whole.block_until_ready()  # so that the host holds one piece at a time
    assert whole is not None
    return whole


@functools.partial(jax.jit, donate_argnums=0)
def _placed(whole: jax.Array, piece: jax.Array, start: tuple[int, ...]) -> jax.Array:
  return jax.lax.dynamic_update_slice(whole, piece, start)


def save_import(made: ImportPlan, weights: Weights, workdir: pathlib.Path) -> None:
  """Writes a workdir with the weights as its checkpoint 0, and their files beside them in hf/.

  config.json comes last: a workdir without it is no run.
  """
  workdir_lib.make(workdir)
  weights_lib.save(workdir, weights)
  beside = {name: made.stored.folder / name for name in files.BESIDE}
  files.copy(beside, workdir / workdir_lib.HF)
  config = made.config
  if config.data.tokenizer != "bytes":
    name = pathlib.Path(config.data.tokenizer).name
    copy = workdir_lib.resolved(workdir) / workdir_lib.HF / name
    config = override(config, {"data.tokenizer": str(copy)})
    fingerprint = tokenizers.load_tokenizer(config.data).fingerprint
    workdir_lib.write_object(workdir / workdir_lib.DATA, {"tokenizer": fingerprint})
  file_lib.write(workdir / workdir_lib.HF / "family", made.family.model_type + "\n")
  workdir_lib.write_config(workdir, config)


def import_report(made: ImportPlan) -> str:
  """Describes an import before it is made: sizes, memory and time."""
  counts = cost.count(made.config)
  mesh = made.config.mesh
  held = cost.check_weights_memory(made.config)
  seconds = made.bytes_to_read / _READ + 4 * counts.total / _WRITTEN
  data = made.config.data
  lines = [
    f"family             {made.family.model_type}, {len(made.tensors)} tensors in "
    f"{files.gb(made.bytes_to_read)} of files, the largest {files.gb(made.largest)}",
    f"text               {data.tokenizer}, rows of {data.seq_len:,} tokens",
    f"parameters         {si(counts.total)} total, {si(counts.active)} active per token",
    f"memory             {files.gb(held)} on each of {mesh.devices} device(s), in float32; on the "
    f"host {files.gb(1.5 * made.largest)} beside it",
    f"disk               {files.gb(4 * counts.total)} for the checkpoint",
    f"time               about {progress.clock(seconds)}, reading {files.gb(_READ)}/s "
    f"and writing {files.gb(_WRITTEN)}/s",
  ]
  return "\n".join(lines + made.notes)
