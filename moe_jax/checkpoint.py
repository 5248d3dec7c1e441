"""Checkpoints: the train state, data iterator and metrics of a step, which Orbax saves together.

No other module imports Orbax.
"""

import math
import pathlib
from typing import Any

import grain.checkpoint
import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from moe_jax import config as config_lib
from moe_jax import remote, sharding
from moe_jax import workdir as workdir_lib


class Checkpointer:
  """The checkpoints of one workdir. A checkpoint is written while training goes on.

  A checkpoint's folder appears only when all its files are written.
  """

  def __init__(self, workdir: pathlib.Path, train: config_lib.Train | None = None):
    """Opens the checkpoints.

    Args:
      workdir: the run's folder.
      train: says how many of the latest and of the best steps to keep; the others are deleted.
        Without it the checkpoints are only read.
    """
    self._workdir = workdir
    # read_only implies the other two options, but Orbax prints a warning unless they are given.
    options = ocp.CheckpointManagerOptions(read_only=True, create=False, save_interval_steps=0)
    if train is not None:
      # Orbax's max_to_keep together with best_fn would delete the newest checkpoint.
      keep = [policies.LatestN(train.keep_latest)]
      if train.keep_best:
        best = policies.BestN(
          get_metric_fn=_rank,
          reverse=True,
          n=train.keep_best,
        )
        keep.append(best)
      options = ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(keep),
        best_fn=_rank,  # without it the metrics are not written
        best_mode="min",
        enable_async_checkpointing=True,
      )
    self._manager = ocp.CheckpointManager(
      remote.resolved(workdir / workdir_lib.CHECKPOINTS),
      options=options,
      item_names=("state", "data"),
    )

  def latest_step(self) -> int | None:
    """Returns the newest saved step; None where nothing is saved."""
    return self._manager.latest_step()

  def best_step(self) -> int | None:
    """Returns the saved step of the lowest validation loss, or the newest if none was evaluated.

    None where nothing is saved, or all that was saved has a loss that is not a number.
    """
    metrics = {step: self._manager.metrics(step) for step in reversed(self.steps())}
    usable = [step for step, saved in metrics.items() if not math.isnan(saved["loss"])]
    return min(usable, key=lambda step: _rank(metrics[step]), default=None)

  def steps(self) -> list[int]:
    """Returns the saved steps in order."""
    return sorted(self._manager.all_steps())

  def find(self, step: int) -> int:
    """Returns `step`, or the newest saved step for 0; raises a UserError if it is not saved."""
    steps = self.steps()
    if not steps:
      raise config_lib.UserError(
        f"--workdir={self._workdir}: no checkpoint there yet; train.py makes one"
      )
    if step and step not in steps:
      raise config_lib.UserError(f"--step={step}: no such checkpoint; there are {steps}")
    return step or steps[-1]

  def save(self, step: int, state: Any, data: Any, loss: float) -> None:
    """Copies the state to the host and returns; the files are written during the next steps.

    Args:
      step: the number of steps taken.
      state: the train state.
      data: the iterator over the training batches.
      loss: the validation loss, by which the best steps are kept; inf if it was not computed.
    """
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.PyTreeSave(state), data=grain.checkpoint.CheckpointSave(data)
      ),
      metrics={"loss": loss},
      force=True,
    )

  def restore(self, step: int, abstract_state: Any, data: Any) -> tuple[Any, Any]:
    """Returns the saved state and the data iterator, moved to where the step left it.

    Args:
      step: a saved step.
      abstract_state: shapes and shardings; the mesh may differ from the one that saved the step.
      data: an iterator over the same training batches.
    """
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.PyTreeRestore(
          abstract_state, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract_state)
        ),
        data=grain.checkpoint.CheckpointRestore(data),
      ),
    )
    return restored["state"], restored["data"]

  def restore_part(
    self, step: int, needed: dict[str, Any], mesh: jax.sharding.Mesh
  ) -> dict[str, Any]:
    """Returns some fields of the saved state, sharded over `mesh`.

    Args:
      step: a saved step.
      needed: {field of the state: its shapes}; a model alone needs no moments of an optimizer.
      mesh: may differ from the one that saved the step.
    """
    return self.restore_fields(step, abstract(needed, sharding.param_shardings(needed, mesh)))

  def restore_fields(self, step: int, fields: dict[str, Any]) -> dict[str, Any]:
    """Returns some fields of the saved state; `fields` gives their shapes and shardings."""
    args = ocp.checkpoint_utils.construct_restore_args(fields)
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.PyTreeRestore(fields, restore_args=args, partial_restore=True)
      ),
    )
    return restored["state"]

  def reached_preemption(self, step: int) -> bool:
    """Returns whether the scheduler has asked this job to stop; all processes get one answer."""
    return self._manager.reached_preemption(step)

  def wait(self) -> None:
    """Waits until all files are written."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Ends Orbax's threads; the object cannot be used any more."""
    self._manager.close()


def _rank(metrics: dict[str, float]) -> float:
  """Returns the validation loss; inf in place of nan, which cannot be compared."""
  return math.inf if math.isnan(metrics["loss"]) else metrics["loss"]


def abstract(tree: Any, shardings: Any) -> Any:
  """Returns the shapes and types of a tree's arrays, each with its sharding."""
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    tree,
    shardings,
  )
