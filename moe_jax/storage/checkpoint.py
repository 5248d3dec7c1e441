"""Checkpoints: the train state, place in the data and loss of a step, which Orbax saves together.

No other module imports Orbax. Each checkpoint has digests of all its arrays, which are computed on
the devices while it is saved and again when it is read.
"""

import concurrent.futures
import contextlib
import errno
import functools
import logging
import math
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from moe_jax import sharding
from moe_jax.errors import (
  DamagedError,
  StorageError,
  UserError,
  few,
  is_storage,
  notice,
  why_unread,
)
from moe_jax.storage import files, remote, verification
from moe_jax.storage import workdir as workdir_lib

_DELETED = "deleted"  # a folder in that of the checkpoints, of those that no run needs
_TEMPORARY = ".orbax-checkpoint-tmp"  # in the name of a folder that is not completely written


class Checkpointer:
  """The checkpoints of one workdir. A checkpoint is written while training goes on.

  A checkpoint's folder appears only when all its files are written. Those that no run needs are
  moved to one folder, which takes no time, and are deleted from there by a thread; in an object
  store Orbax deletes them itself.
  """

  @classmethod
  def reading(cls, workdir: pathlib.Path) -> "Checkpointer":
    """Opens the checkpoints of a run's folder, and changes nothing there."""
    # read_only implies the next two options, but Orbax prints a warning unless they are given.
    options = ocp.CheckpointManagerOptions(
      read_only=True, create=False, save_interval_steps=0, lightweight_initialize=True
    )
    return cls(workdir, False, options)

  @classmethod
  def writing(cls, workdir: pathlib.Path, latest: int = 1, best: int = 0) -> "Checkpointer":
    """Opens the checkpoints to save more; those that cannot be opened are set aside.

    The remains of a save or of a deletion that was cut off are deleted. The `latest` newest steps
    and the `best` of the lowest loss are kept.
    """
    # Orbax's max_to_keep together with best_fn would delete the newest checkpoint.
    keep: list[policies.PreservationPolicy] = [policies.LatestN(latest)]
    if best:
      keep.append(policies.BestN(get_metric_fn=_rank, reverse=True, n=best))
    options = ocp.CheckpointManagerOptions(
      preservation_policy=policies.AnyPreservationPolicy(keep),
      best_fn=_rank,  # without it the metrics are not written
      best_mode="min",
      enable_async_checkpointing=True,
      todelete_subdir=_DELETED,  # renamed first, so a kill leaves no part of one
    )
    return cls(workdir, True, options)

  def __init__(self, workdir: pathlib.Path, writes: bool, options: ocp.CheckpointManagerOptions):
    self._workdir = workdir
    self._writes = writes and jax.process_index() == 0
    self._folder = workdir / workdir_lib.CHECKPOINTS
    self._deletions: concurrent.futures.ThreadPoolExecutor | None = None
    _silence_late_answers()
    if self._writes:
      if not remote.is_remote(self._folder):
        self._deletions = concurrent.futures.ThreadPoolExecutor(1)
      _delete_all(self._folder.glob(f"{_DELETED}/*"))
      _delete_all(self._folder.glob(f"*{_TEMPORARY}*"))
      for step in workdir_lib.saved_steps(workdir):
        if why := verification.unreadable(self._folder / str(step)):
          self._move_away(step, why)
    folder = remote.resolved(self._folder)
    self._manager = ocp.CheckpointManager(folder, options=options, item_names=("state", "about"))

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

  def loss(self, step: int) -> float:
    """Returns the validation loss of a saved step; inf if it was not computed."""
    return self._manager.metrics(step)["loss"]

  def steps(self) -> list[int]:
    """Returns the saved steps in order."""
    return sorted(self._manager.all_steps())

  def find(self, step: int) -> int:
    """Returns `step`, or the newest saved step for 0; raises a UserError if it is not saved."""
    steps = self.steps()
    if not steps:
      raise UserError(f"--workdir={self._workdir}: no checkpoint there yet; train.py makes one")
    if step and step not in steps:
      raise UserError(f"--step={step}: no such checkpoint; there are {steps}")
    return step or steps[-1]

  def save(self, step: int, state: Any, next_batch: int, loss: float) -> bool:
    """Copies the state to the host; the files are written during the next steps.

    Returns whether it is saved. A state that is not finite is not, since it would take the place of
    one that a run can go on from.

    Args:
      step: the number of steps taken.
      state: the train state, a NamedTuple.
      next_batch: the number of the training batch that follows.
      loss: the validation loss, by which the best steps are kept; inf if it was not computed.

    Raises:
      StorageError: this checkpoint or the one before could not be written.
    """
    arrays, finite = verification.array_digests(state._asdict())
    if not finite:
      return False
    self.wait()
    about = {"arrays": arrays, "next_batch": next_batch, "step": step, "loss": str(loss)}
    stored = files.sealed({"about": about})
    with self._storage_errors():
      self._manager.save(
        step,
        args=ocp.args.Composite(state=ocp.args.PyTreeSave(state), about=ocp.args.JsonSave(stored)),
        metrics={"loss": loss},
        force=True,
      )
    return True

  def restore(self, step: int, abstract_state: Any) -> tuple[Any, int]:
    """Returns the saved state, and the number of the training batch that follows.

    Args:
      step: a saved step.
      abstract_state: shapes and shardings; the mesh may differ from the one that saved the step.

    Raises:
      DamagedError: the checkpoint cannot be read, or is not what was saved.
      UserError: it is whole, and of another model or optimizer.
    """
    fields, about = self._restored(step, abstract_state._asdict(), part=False)
    state = type(abstract_state)(**fields)
    if step != int(state.step):
      raise self._damaged(step, f"the number of the step is {int(state.step)}, not {step}")
    if about:
      return state, about["next_batch"]
    next_batch = verification.next_batch(self._folder / str(step))
    if next_batch is None:
      raise self._damaged(step, "it does not say where the data go on")
    return state, next_batch

  def restore_part(
    self, step: int, needed: dict[str, Any], mesh: jax.sharding.Mesh
  ) -> tuple[int, dict[str, Any]]:
    """Returns a step and some fields of its saved state, sharded over `mesh`.

    Args:
      step: of the checkpoint; 0 is the newest, also where a training puts a newer in its place.
      needed: {field of the state: its shapes}; a model alone needs no moments of an optimizer.
      mesh: may differ from the one that saved the step.

    Raises:
      DamagedError: the checkpoint cannot be read, or is not what was saved.
    """
    fields = abstract(needed, sharding.param_shardings(needed, mesh))
    while True:
      found = self.find(step)
      try:
        return found, self.restore_fields(found, fields)
      except DamagedError:
        self._manager.reload()
        if step or found in self.steps():
          raise

  def restore_fields(self, step: int, fields: dict[str, Any]) -> dict[str, Any]:
    """Returns some fields of the saved state; `fields` gives their shapes and shardings."""
    return self._restored(step, fields, part=True)[0]

  def _restored(
    self, step: int, fields: dict[str, Any], *, part: bool
  ) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the fields, compared with their digests, and what else was saved with these.

    Unless they are a part, the state has to have no other arrays.
    """
    about = self._about(step, fields)
    args = ocp.checkpoint_utils.construct_restore_args(fields)
    state = ocp.args.PyTreeRestore(fields, restore_args=args, partial_restore=part)
    restored = self._read(step, state=state)["state"]
    if not about:
      notice(f"note: checkpoint {step} is not verified: it was saved without digests")
      return restored, about
    read, _ = verification.array_digests(restored)
    wrong = [name for name, digest in read.items() if about["arrays"].get(name) != digest]
    if wrong:
      raise self._damaged(step, f"other values than were saved in {few(wrong)}")
    return restored, about

  def _read(self, step: int, **items: Any) -> Any:
    """Returns the items of a step; whatever goes wrong in the libraries is a DamagedError.

    Where the system or a store does not let it be read, it may be whole: that is a StorageError.
    """
    local = not remote.is_remote(self._folder)
    if local and any(path.is_fifo() for path in (self._folder / str(step)).rglob("*")):
      raise self._damaged(step, "a pipe is in the place of a file")  # the libraries would wait
    try:
      return self._manager.restore(step, args=ocp.args.Composite(**items))
    except Exception as error:  # of many types, from three libraries
      if remote.is_remote(self._folder) and is_storage(error):
        raise remote.unreachable(self._folder / str(step), error) from error
      if why := why_unread(error):
        raise files.unread(self._folder / str(step), why) from error
      cause = error.__cause__ or error  # Orbax wraps it in all it knows of the array
      raise self._damaged(step, f"{type(cause).__name__}: {cause}") from None

  def _about(self, step: int, fields: dict[str, Any]) -> dict[str, Any]:
    """Returns the digests of a step; {} for a checkpoint of before there were digests.

    Raises a UserError where it has no arrays of the names, types and shapes of `fields`.
    """
    if not verification.has_digests(self._folder / str(step)):
      return {}
    stored = self._read(step, about=ocp.args.JsonRestore())["about"]
    if not isinstance(stored, dict) or stored.get("digest") != files.digest(stored):
      raise self._damaged(step, "its digests are not what was written")
    about = stored["about"]
    here, there = verification.kinds(fields), about["arrays"]
    other = [name for name, kind in here.items() if there.get(name, "").split(" ")[0] != kind]
    if other:
      saved = there.get(other[0], "absent").split(" ")[0]
      raise UserError(
        f"{self._folder / str(step)} is of another model or optimizer: {other[0]} is {saved} there "
        f"and {here[other[0]]} in this config ({len(other)} arrays differ); it is not this run's"
      )
    return about

  def _damaged(self, step: int, why: str) -> DamagedError:
    steps = workdir_lib.saved_steps(self._workdir)
    why = f"is damaged ({' '.join(why.split())[:160]})" if step in steps else "is there no more"
    others = [other for other in steps if other != step] or "none"
    return DamagedError(f"{self._folder / str(step)} {why}; other checkpoints there: {others}")

  def set_aside(self, step: int, why: str) -> None:
    """Moves a damaged checkpoint to the folder of those that no run uses, and says so.

    Raises:
      DamagedError: it is the only one; then it stays where it is.
    """
    self._move_away(step, why)
    self._manager.reload()

  def _move_away(self, step: int, why: str) -> None:
    others = [other for other in workdir_lib.saved_steps(self._workdir) if other != step]
    if not others:
      raise DamagedError(
        f"{why}; put a whole checkpoint there, or begin again from step 0 with --resume_step=0"
      )
    workdir_lib.set_aside(self._workdir, step, why)
    workdir_lib.record_saved(self._workdir, others[-1])

  def go_back(self, step: int) -> None:
    """Sets aside all checkpoints that are newer than a step; all of them for step 0.

    Raises:
      UserError: there is no checkpoint of that step.
    """
    steps = self.steps()
    if step and step not in steps:
      raise UserError(f"--resume_step={step}: no such checkpoint; there are {steps}")
    if jax.process_index() == 0:
      for newer in (other for other in steps if other > step):
        workdir_lib.set_aside(self._workdir, newer, f"--resume_step={step}")
      workdir_lib.record_saved(self._workdir, step)
    self._manager.reload()

  def reached_preemption(self, step: int) -> bool:
    """Returns whether the scheduler has asked this job to stop; all processes get one answer."""
    return self._manager.reached_preemption(step)

  def wait(self) -> None:
    """Waits until all files are written, and records the newest step.

    Raises:
      StorageError: a checkpoint could not be written.
    """
    with self._storage_errors():
      self._manager.wait_until_finished()
    newest = self.latest_step()
    if self._writes and newest is not None:
      workdir_lib.record_saved(self._workdir, newest)
    if self._deletions:
      self._deletions.submit(_delete_all, self._folder.glob(f"{_DELETED}/*"))

  def close(self) -> None:
    """Ends Orbax's threads; the object cannot be used any more."""
    with contextlib.suppress(Exception):  # `wait` has said what is wrong
      self._manager.close()
    if self._deletions:
      self._deletions.shutdown()
      with contextlib.suppress(OSError):  # there is none
        (self._folder / _DELETED).rmdir()

  @contextlib.contextmanager
  def _storage_errors(self) -> Iterator[None]:
    try:
      yield
    except StorageError:
      raise
    except Exception as error:  # of many types, from three libraries, for a full disk alone
      if remote.is_remote(self._folder):
        raise remote.unreachable(self._folder, error, "cannot write a checkpoint to") from error
      full, why = os.strerror(errno.ENOSPC), " ".join(str(error).split())
      raise StorageError(
        f"cannot write a checkpoint in {self._folder} ({full if full in why else why[:200]}); the "
        f"checkpoints of steps {workdir_lib.saved_steps(self._workdir)} are intact, and the same "
        "command goes on from there once this can be written"
      ) from error


def _rank(metrics: dict[str, float]) -> float:
  """Returns the validation loss; inf in place of nan, which cannot be compared."""
  return math.inf if math.isnan(metrics["loss"]) else metrics["loss"]


def abstract(tree: Any, shardings: Any) -> Any:
  """Returns the shapes and types of a tree's arrays, each with its sharding."""
  return jax.tree.map(
    lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, shardings
  )


def _delete_all(paths: Iterable[pathlib.Path]) -> None:
  for path in paths:
    shutil.rmtree(path, ignore_errors=True)


@functools.cache  # once
def _silence_late_answers() -> None:
  """Ignores what is still printed of other arrays, and Orbax's warning for whoever only reads."""
  logging.getLogger("asyncio").setLevel(logging.CRITICAL)
  logging.getLogger("absl").addFilter(lambda record: "is read only" not in str(record.msg))

  def without_late_answers(hook: Callable[..., Any], *error: Any) -> None:
    if "Event loop is closed" not in str(error):  # to which TensorStore answers late
      hook(*error)

  for name in ("unraisablehook", "excepthook"):  # a library in C++ may call either
    setattr(sys, name, functools.partial(without_late_answers, getattr(sys, name)))
