"""Orbax checkpoints: train state, data iterator and metrics of a step, saved in one piece.

The one module that knows Orbax.
"""

import pathlib
from typing import Any

import grain.checkpoint
import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from moe_jax import config as config_lib
from moe_jax import sharding
from moe_jax import workdir as workdir_lib


class Checkpointer:
  """Checkpoints of one workdir; saved asynchronously, a step appears whole or not at all."""

  def __init__(self, workdir: pathlib.Path, train: config_lib.Train | None = None):
    """With `train`, keeps its latest and best steps and deletes the others; without, only reads."""
    self._workdir = workdir
    # The other two follow from it, but Orbax says so each time.
    options = ocp.CheckpointManagerOptions(read_only=True, create=False, save_interval_steps=0)
    if train is not None:
      # Orbax's own max_to_keep with best_fn would delete the newest checkpoint.
      keep = [policies.LatestN(train.keep_latest)]
      if train.keep_best:
        best = policies.BestN(
          get_metric_fn=lambda metrics: metrics["loss"],
          reverse=True,
          n=train.keep_best,
        )
        keep.append(best)
      options = ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(keep),
        best_fn=lambda metrics: metrics["loss"],  # without it the metrics are not written
        best_mode="min",
        enable_async_checkpointing=True,
      )
    self._manager = ocp.CheckpointManager(
      (workdir / workdir_lib.CHECKPOINTS).absolute(),
      options=options,
      item_names=("state", "data"),
    )

  def latest_step(self) -> int | None:
    return self._manager.latest_step()

  def steps(self) -> list[int]:
    return sorted(self._manager.all_steps())

  def find(self, step: int) -> int:
    """`step`, or for 0 the newest; raises UserError where there is no such checkpoint."""
    steps = self.steps()
    if not steps:
      raise config_lib.UserError(
        f"--workdir={self._workdir}: no checkpoint there yet; train.py makes one"
      )
    if step and step not in steps:
      raise config_lib.UserError(f"--step={step}: no such checkpoint; there are {steps}")
    return step or steps[-1]

  def save(self, step: int, state: Any, data: Any, loss: float) -> None:
    """Copies state to the host and returns; the write goes on behind the next steps.

    `loss` ranks the step among the best; inf for one that was not evaluated.
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
    """Reads straight into the shardings of `abstract_state`, whatever mesh wrote the files."""
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
    """The arrays of `needed`, {field of the state: shapes}: a model needs no moments."""
    abstract_state = abstract(needed, sharding.param_shardings(needed, mesh))
    args = ocp.checkpoint_utils.construct_restore_args(abstract_state)
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.PyTreeRestore(abstract_state, restore_args=args, partial_restore=True)
      ),
    )
    return restored["state"]

  def reached_preemption(self, step: int) -> bool:
    """Whether the scheduler wants this job gone; the same answer in every process."""
    return self._manager.reached_preemption(step)

  def wait(self) -> None:
    self._manager.wait_until_finished()

  def close(self) -> None:
    self._manager.close()


def abstract(tree: Any, shardings: Any) -> Any:
  """ShapeDtypeStructs that carry the shardings to restore into."""
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    tree,
    shardings,
  )
