"""A run as moe_jax.load returns it: a TextGenerator with its config, parameters, and routing."""

import dataclasses
import functools
import math
import pathlib
from typing import NamedTuple

import jax
import numpy as np

from moe_jax import sharding
from moe_jax.config import Model, override
from moe_jax.data import tokenizers
from moe_jax.data.pipeline import Batch
from moe_jax.errors import UserError
from moe_jax.inference import decoding, memory, padding
from moe_jax.inference.generate import TextGenerator
from moe_jax.kernels import choose
from moe_jax.model import cost, pattern, transformer
from moe_jax.moe import counts, dispatch, validation
from moe_jax.moe.counts import Choices
from moe_jax.start import startup
from moe_jax.storage import files
from moe_jax.storage import weights as weights_lib
from moe_jax.storage import workdir as workdir_lib
from moe_jax.storage.weights import Weights


class TokenRouting(NamedTuple):
  """The K experts of each of T tokens in each of Z MoE layers, that of the largest gate first."""

  tokens: list[str]  # as tokenizers.shown has them
  ids_T: np.ndarray  # int64
  layers: list[int]  # the number of each MoE layer in the network, from 0
  expert_ZTK: np.ndarray  # int32
  gate_ZTK: np.ndarray  # float32, before drops
  dropped_ZTK: np.ndarray  # bool, the expert had no slot for the token


class LoadedModel(TextGenerator):
  """The model of a run of train.py.

  config: of the run, with the mesh and the kernels that are in force here.
  """

  def __init__(self, workdir: str | pathlib.Path, step: int = 0):
    """Reads the checkpoint of `step`, the newest for 0, and the tokenizer; the data are not needed.

    Raises:
      UserError: the workdir has no run or no such checkpoint, or the router cannot generate.
    """
    self.path = path = workdir_lib.open_path(workdir)
    config = workdir_lib.read_config(path)
    startup.start(config)
    axes = sharding.of_whole_sequences(config.mesh)
    config = override(config, {"mesh": sharding.fit_mesh(axes, parts=jax.process_count())})
    cost.check_weights_memory(config)
    tokenizer = tokenizers.check_fits(config)
    workdir_lib.check_same_tokenizer(path, tokenizer.fingerprint)
    model = choose.for_reading(config.model, workdir_lib.read_kernels(path))
    self.config = dataclasses.replace(config, model=model)
    model = decoding.for_inference(model)
    mesh = sharding.make_mesh(config.mesh)
    step, stored = weights_lib.read(path, step, transformer.abstract_weights(model), mesh)
    with jax.set_mesh(mesh):
      weights = decoding.weights(model, *stored)
    super().__init__(model, weights, mesh, tokenizer, step, files.exists(path / workdir_lib.HF))

  def __repr__(self) -> str:
    size, run = cost.count(self.config), f"{self.path.name} at step {self.step}"
    return f"<{run}: {size.total:,} parameters, {size.active:,} active for a token>"

  @functools.cached_property
  def _stored(self) -> Weights:
    """The weights as they are stored, read again: `generate` needs them in another layout."""
    shapes = transformer.abstract_weights(self.config.model)
    return weights_lib.read(self.path, self.step, shapes, self.mesh)[1]

  @functools.cached_property
  def params(self) -> dict[str, np.ndarray]:
    """The parameters of the checkpoint, float32: {"embed_VD": ..., "layers/3/ffn/up_EDF": ...}.

    `bias_ZE` is the bias of loss-free balancing. The first use reads the checkpoint again.
    """
    leaves = jax.tree_util.tree_leaves_with_path(sharding.whole(self._stored.params))
    by_path = {sharding.path_of(path): array for path, array in leaves}
    found = {"/".join(path): array for path, array in by_path.items() if path[0] != "scans"}
    for layer, (stack, place) in enumerate(pattern.layer_places(self.config.model)):
      inside = {path[4:]: array[place] for path, array in by_path.items() if path[:4] == stack}
      found |= {f"layers/{layer}/{'/'.join(path)}": array for path, array in inside.items()}
    return found | {"bias_ZE": sharding.whole(self._stored.bias_ZE)}

  def routing(self, text: str, capacity_factor: float | None = None) -> TokenRouting:
    """Returns where evaluation sends each token of a text that begins a document.

    The text, of any length, is evaluated in a row that it has to itself: a routing group is the
    text, or `moe.group_size` of its tokens if that is less. The first use reads the checkpoint
    again.

    Args:
      text: as in `encode`, whose ids are routed.
      capacity_factor: in place of `moe.eval_capacity_factor`; inf drops nothing, as `generate`.

    Raises:
      UserError: the model is dense, or the factor is not above 0.
    """
    config, ids_T = self.config, self.encode(text)
    if not config.model.moe.num_experts:
      raise UserError("routing: config.model.moe.num_experts=0, a dense model, routes nothing")
    if capacity_factor is not None:
      config = validation.at_capacity(config, capacity_factor)
    model, length = _of_row(config.model, len(ids_T))
    batch, one_T = np.zeros((4, self.rows, length), np.int32), np.ones_like(ids_T)
    batch[:, 0, : len(ids_T)] = Batch(ids_T, 0 * one_T, one_T, np.arange(len(ids_T)))
    what = f"a text of {len(ids_T):,} tokens"
    with jax.set_mesh(self.mesh), memory.one_line(what):
      arguments = self._stored, *sharding.place(tuple(batch), self.mesh)
      self._memory.check(what, choices, *arguments, model=model)
      found = sharding.whole(choices(*arguments, model=model))
    tokens = [tokenizers.shown(self.tokenizer.decode_bytes([i])) for i in ids_T]
    best = counts.by_gate(*(x[:, 0, : len(ids_T)] for x in found))
    return TokenRouting(tokens, ids_T, pattern.moe_layers(model), *best)


@functools.partial(jax.jit, static_argnames="model")
def choices(stored: Weights, *batch: jax.Array, model: Model) -> Choices | None:
  """Returns the experts of each token of a Batch, as in evaluation; None of a dense model."""
  return transformer.evaluate(model, *stored, Batch(*batch), trace=True).choices


def _of_row(model: Model, tokens: int) -> tuple[Model, int]:
  """Returns a model and the length of a padded row in which so many tokens drop as without it."""
  moe = model.moe
  if 0 < moe.group_size < tokens:
    return model, -(-tokens // moe.group_size) * moe.group_size
  length, factor = padding.padded_sizes(1, tokens, 1)[1], dispatch.capacity_factor(moe, train=False)
  if factor < math.inf:  # capacity counts padding, which takes no slot
    slots = dispatch.capacity(factor, tokens, moe.top_k, moe.num_experts)
    factor = slots * moe.num_experts / (length * moe.top_k)
  moe = dataclasses.replace(moe, group_size=0, eval_capacity_factor=factor)
  return dataclasses.replace(model, moe=moe), length
