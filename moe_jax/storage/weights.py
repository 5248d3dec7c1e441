"""A run's weights, without its optimizer's state: read from a checkpoint, or saved as step 0."""

import contextlib
import math
import pathlib
from typing import Any, NamedTuple

import jax

from moe_jax.errors import UserError
from moe_jax.storage.checkpoint import Checkpointer


class Weights(NamedTuple):
  """What a model needs of a checkpoint."""

  params: Any  # the nnx state of a Transformer, float32
  bias_ZE: jax.Array  # the balancing biases


def read(
  workdir: pathlib.Path, step: int, shapes: dict[str, Any], mesh: jax.sharding.Mesh
) -> tuple[int, Weights]:
  """Returns the step, the newest for 0, and the weights of a run's checkpoint, split over `mesh`.

  `shapes` is transformer.abstract_weights; the mesh may differ from the one that saved the step.

  Raises:
    UserError: there is no such checkpoint, or it is of another model.
    DamagedError: it cannot be read, or is not what was saved.
  """
  with contextlib.closing(Checkpointer.reading(workdir)) as reader, jax.set_mesh(mesh):
    step, stored = reader.restore_part(step, shapes, mesh)
  return step, Weights(**stored)


def save(workdir: pathlib.Path, weights: Weights) -> None:
  """Saves weights as step 0 of a new workdir, which train.py --init_from takes.

  Raises:
    UserError: they are not finite.
    StorageError: they could not be written.
  """
  with contextlib.closing(Checkpointer.writing(workdir)) as saver:
    if not saver.save(0, weights, next_batch=0, loss=math.inf):
      raise UserError(f"--workdir={workdir}: weights that are not finite are not saved")
    saver.wait()
