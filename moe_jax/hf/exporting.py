"""Writes a run's checkpoint as a Hugging Face checkpoint that `from_pretrained` loads unchanged."""

import itertools
import json
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np

from moe_jax import sharding
from moe_jax.config import Config, override
from moe_jax.data import special_tokens, tokenizers
from moe_jax.errors import UserError
from moe_jax.hf import families, fields, files, layout, parts
from moe_jax.hf.fields import Family
from moe_jax.model import cost, transformer
from moe_jax.start import progress
from moe_jax.storage import weights as weights_lib
from moe_jax.storage import workdir as workdir_lib
from moe_jax.storage.weights import Weights


class Loaded(NamedTuple):
  """A run's weights on the mesh."""

  config: Config
  weights: Weights
  step: int
  beside: pathlib.Path  # the folder of files that came with an import; it may be missing


def load_run(workdir: str, step: int) -> Loaded:
  """Restores the weights of a run on this machine's devices."""
  path = workdir_lib.open_path(workdir)
  config = workdir_lib.read_config(path)
  config = override(config, {"mesh": sharding.fit_mesh(config.mesh, parts=jax.process_count())})
  cost.check_weights_memory(config)
  mesh = sharding.make_mesh(config.mesh)
  shapes = transformer.abstract_weights(config.model)
  step, weights = weights_lib.read(path, step, shapes, mesh)
  return Loaded(config, weights, step, path / workdir_lib.HF)


def choose_family(model: Any, named: str, first: str = "") -> Family:
  """Returns the family that is named, or one that can say the model: `first`, if that can.

  Raises:
    UserError: there is no such family, or none can; then what hinders the nearest one.
  """
  if named:
    if named not in families.FAMILIES:
      raise UserError(f"--family={named}: there are {', '.join(families.FAMILIES)}")
    return families.FAMILIES[named]
  refusals = {}
  for family in sorted(families.FAMILIES.values(), key=lambda family: family.model_type != first):
    try:
      fields.to_theirs(family, model)
    except UserError as error:
      refusals[family.model_type] = str(error)
    else:
      return family
  nearest = min(refusals.values(), key=lambda text: text.count(";"))
  raise UserError(f"no family can say this model; the nearest: {nearest}")


def export(
  loaded: Loaded,
  family: Family,
  target: pathlib.Path,
  dtype: str = "float32",
  largest: int = 5 * 10**9,
) -> None:
  """Writes safetensors, config.json, and the tokenizer's files where the run has them.

  The target is a folder that does not exist yet, or is empty; `largest` are the bytes of a file,
  and `dtype` is float32, bfloat16 or float16.

  Raises:
    UserError: the family cannot say the model, or the target has files.
    StorageError: the target cannot be written; then nothing is left there.
  """
  if target.exists() and (not target.is_dir() or any(target.iterdir())):
    raise UserError(f"--to={target} is not empty; name a new folder")
  model = loaded.config.model
  tokenizer = tokenizers.load_tokenizer(loaded.config.data)
  theirs = _config(loaded, family, dtype, tokenizer.separator)
  found = layout.tensors(model, parts.TOP, family.layer, parts.LAYER)
  bias_ZE = np.asarray(sharding.whole(loaded.weights.bias_ZE))
  arrays = {
    sharding.path_of(path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(loaded.weights.params)
  } | {layout.BIAS: bias_ZE}
  if bias_ZE.any() and not any(p.path == layout.BIAS for t in found for p in t.parts):
    raise UserError(
      f"{family.model_type} has no bias that balances the choice of experts, and this run has one; "
      "choose a --family that has, as glm4_moe"
    )
  width = np.dtype(dtype).itemsize
  sizes = {tensor.name: int(np.prod(tensor.shape)) * width for tensor in found}
  named = {tensor.name: tensor for tensor in found}
  told = progress.Progress("wrote", sum(sizes.values()), "MB")
  done = itertools.accumulate(sizes.values())

  def value(name: str) -> np.ndarray:
    pieces = []
    for part in named[name].parts:  # one layer's or one expert's values, on the host
      piece = arrays[part.path]
      piece = piece[part.place] if part.place else piece
      pieces.append(np.asarray(piece if isinstance(piece, np.ndarray) else sharding.whole(piece)))
    told.at(next(done))
    return np.ascontiguousarray(named[name].pack(pieces).astype(dtype))

  beside = _beside(loaded, tokenizer)
  files.write_checkpoint(target, sizes, largest, value, theirs, beside)


def _beside(loaded: Loaded, own: tokenizers.Tokenizer) -> dict[str, pathlib.Path | str]:
  """Returns {name: file or text} of what came with an import, or of the run's tokenizer."""
  if loaded.beside.is_dir():
    return {name: loaded.beside / name for name in files.BESIDE}
  path = pathlib.Path(loaded.config.data.tokenizer)
  if not path.suffix:  # bytes
    return {}
  found: dict[str, pathlib.Path | str] = {n: path.parent / n for n in files.OF_TOKENIZER}
  if path.suffix != ".json":
    return found | {files.SENTENCEPIECE: path}
  if not (path.parent / special_tokens.CONFIG).is_file():
    # Otherwise transformers makes another one, of the family's class.
    ends = dict.fromkeys(("bos_token", "eos_token"), own.separator_text)
    about = {"tokenizer_class": "PreTrainedTokenizerFast"} | ends
    found[special_tokens.CONFIG] = json.dumps(about)
  begins = own.separator_text is None or own.before == [own.separator]
  return found | {files.TOKENIZER: path if begins else _begun(path, own)}


def _begun(path: pathlib.Path, own: tokenizers.Tokenizer) -> str:
  """Returns a tokenizer.json that puts the separator before a text, as in training."""
  from tokenizers import Tokenizer, processors

  model, begin = Tokenizer.from_file(str(path)), own.separator_text
  model.post_processor = processors.TemplateProcessing(
    single=[begin, "$A"], special_tokens=[(begin, own.separator)]
  )
  return model.to_str(pretty=True)


def _config(loaded: Loaded, family: Family, dtype: str, separator: int) -> dict[str, Any]:
  """Returns config.json: what came with an import, under what the model says now."""
  theirs = fields.to_theirs(family, loaded.config.model) | {"dtype": dtype, "torch_dtype": dtype}
  before: dict[str, Any] = {}
  if (loaded.beside / files.CONFIG).is_file():
    before = dict(fields.text_config(files.read_hf_json(loaded.beside / files.CONFIG)))
    before.pop("quantization_config", None)
    if before.get("model_type") != family.model_type:
      before = {}
  longest = {"max_position_embeddings": loaded.config.data.seq_len}
  ends = {"bos_token_id": separator, "eos_token_id": separator, "pad_token_id": None}
  return longest | ends | before | theirs
