"""Starts a new run with the parameters of another run's checkpoint: --init_from=WORKDIR:STEP."""

import pathlib
from collections.abc import Collection
from typing import Any, NamedTuple

import jax

from moe_jax.config import Config, Model
from moe_jax.config.run import field_names, other_model
from moe_jax.errors import UserError, few
from moe_jax.model import cost
from moe_jax.moe import validation
from moe_jax.storage import checkpoint
from moe_jax.storage import workdir as workdir_lib
from moe_jax.training import optimizers


class Source(NamedTuple):
  """The checkpoint that a run begins with."""

  workdir: str
  step: int
  optimizer: bool  # whether the optimizer's state is taken, too

  def __str__(self) -> str:
    what = "parameters and optimizer state" if self.optimizer else "parameters"
    return f"the {what} of {self.workdir}, step {self.step}"


def find_source(
  text: str, optimizer: bool, workdir: pathlib.Path, config: Config, named: Collection[str] = ()
) -> Source | None:
  """Returns the checkpoint that the run begins or began with; None for a random start.

  A run that was cut off before its first checkpoint begins again as its init.json says.

  Args:
    text: the value of --init_from, WORKDIR or WORKDIR:STEP; "" where the flag is not given.
    optimizer: the value of --init_optimizer.
    workdir: of the run that begins or goes on.
    config: of that run.
    named: its fields on the command line, in which the model may be another one than the source's.

  Raises:
    UserError: there is no such checkpoint; its arrays are of other shapes than the run's, or make
      another function there; or the workdir has its own checkpoint, of a run that began otherwise.
  """
  if optimizer and not text:
    raise UserError("--init_optimizer needs --init_from=WORKDIR: whose optimizer state is meant?")
  values = workdir_lib.read_object(workdir / workdir_lib.INIT)
  recorded = Source(**values) if values else None
  own_steps = workdir_lib.saved_steps(workdir)
  if not text:
    source = recorded
  else:
    name, step = workdir_lib.split_step(text)
    other = workdir_lib.resolved(workdir_lib.open_path(name))
    if own_steps:
      same = recorded and (str(other), optimizer) == (recorded.workdir, recorded.optimizer)
      if not same or (step is not None and recorded and step != recorded.step):
        raise UserError(
          f"--init_from={text}: --workdir={workdir} has a checkpoint of its own, step "
          f"{own_steps[-1]}, and began with {recorded or 'random parameters'}; name a new workdir, "
          "or drop the flag to go on with that run"
        )
      return recorded
    steps = workdir_lib.saved_steps(other)
    if not steps:
      raise UserError(
        f"--init_from={text}: no checkpoint there; name the workdir of a run that has saved one"
      )
    source = Source(str(other), steps[-1] if step is None else step, optimizer)
  if source and not own_steps:
    # A run that was cut off has been asked at its start.
    _check(source, config, named if text else field_names())
  return source


def _check(source: Source, config: Config, named: Collection[str]) -> None:
  """Raises a UserError if the checkpoint is not there, or does not fit the config's model."""
  flag = f"--init_from={source.workdir}:{source.step}"
  path = workdir_lib.open_path(source.workdir)
  steps = workdir_lib.saved_steps(path)
  if source.step not in steps:
    raise UserError(f"{flag}: no checkpoint of that step; there are {steps}")
  other = workdir_lib.read_config(path)
  differing = _differences(other.model, config.model)
  if differing:
    raise UserError(
      f"{flag}: the parameters have other shapes: {differing}; set config.model as that run has "
      f"it, or take its config with --config={source.workdir}"
    )
  known = {*named, *validation.fields_with_equal_values(other, config)}
  fields = other_model(other.model, config.model, "there")
  if unknown := [text for name, text in fields.items() if name not in known]:
    raise UserError(
      f"{flag}: with this config its parameters are another model: {', '.join(unknown)}; take that "
      f"run's with --config={source.workdir}, or name each of these fields on the command line"
    )
  there, here = (
    [path for path, _ in jax.tree_util.tree_leaves_with_path(optimizers.abstract_state(c))]
    for c in (other, config)
  )
  if source.optimizer and there != here:
    raise UserError(
      f"{flag} with --init_optimizer: config.optimizer.name={config.optimizer.name.value} and "
      f"clip_norm={config.optimizer.clip_norm} do not fit the state of that run's "
      f"name={other.optimizer.name.value} and clip_norm={other.optimizer.clip_norm}; set them as "
      "that run has them, or drop --init_optimizer"
    )


def _differences(theirs: Model, ours: Model) -> str:
  """Returns the first parameters whose shapes differ, with both; "" where all are equal."""
  there, here = (
    {".".join(path): list(array.shape) for path, array in cost.parameters(model).items()}
    for model in (theirs, ours)
  )
  lines = [
    f"{name} is {there.get(name, 'absent')} there and {here.get(name, 'absent')} here"
    for name in there | here
    if there.get(name) != here.get(name)
  ]
  return few(lines)


def load_source(source: Source, state: Any, shardings: Any, *, loads: bool = False) -> Any:
  """Returns the new train state with the source's arrays, on whatever mesh they were saved.

  Parameters and the bias of loss-free balancing always come along. The step and the learning rate's
  schedule begin at 0, also where the optimizer's moments come along.

  Args:
    source: as `find` returned it.
    state: a new TrainState; the memory of the arrays that are replaced is freed.
    shardings: of that state.
    loads: take the experts' measured loads, too.
  """
  names = ("params", "bias_ZE", *["opt_state"] * source.optimizer, *["load_ZE"] * loads)
  wanted = {
    name: checkpoint.abstract(getattr(state, name), getattr(shardings, name)) for name in names
  }
  for array in jax.tree.leaves([getattr(state, name) for name in names]):
    array.delete()  # frees the memory for the array that is read in its place
  reader = checkpoint.Checkpointer.reading(workdir_lib.open_path(source.workdir))
  arrays = reader.restore_fields(source.step, wanted)
  reader.close()
  if source.optimizer:
    arrays["opt_state"] = optimizers.restart_schedule(arrays["opt_state"])
  return state._replace(**arrays)
