"""A run from its start to its end: what it goes on from, and what it does after a bad step."""

import contextlib
import dataclasses
import math
import pathlib
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import grain
import jax

from moe_jax import sharding
from moe_jax.config import Config
from moe_jax.data import mixture, pipeline, tokenizers
from moe_jax.errors import DamagedError, UserError, shown
from moe_jax.kernels import choose
from moe_jax.model import cost
from moe_jax.moe import validation
from moe_jax.start import command_line, flags
from moe_jax.storage import checkpoint, files, lock
from moe_jax.storage import workdir as workdir_lib
from moe_jax.training import health, init_from, optimizers, placement, profiling
from moe_jax.training.evaluator import Evaluator
from moe_jax.training.loop import Loop
from moe_jax.training.setup import Setup, TrainState
from moe_jax.training.step import compile_step

NEWEST = -1  # a resume_step: the newest checkpoint


class Text(NamedTuple):
  """The rows of a run."""

  train: pipeline.Rows
  validation: pipeline.Rows

  def batches(self, setup: Setup) -> grain.DatasetIterator:
    """Returns this process's training batches from the first one on."""
    return pipeline.train_iterator(self.train, setup.config.data, *sharding.feeder(setup.mesh))


def run(
  setup: Setup,
  workdir: str,
  *,
  init_from_flag: str = "",
  init_optimizer: bool = False,
  named: Collection[str] = (),
  profile: str = "",
  resume_step: int = NEWEST,
  place_experts: bool = False,
  tracker: str = "",
) -> None:
  """Trains until config.train.steps, from the newest checkpoint of the workdir if it has one.

  Args:
    setup: what `setup.prepare` returned.
    workdir: the run's folder; created if it is missing.
    init_from_flag: WORKDIR or WORKDIR:STEP of another run, whose parameters a new run begins with.
    init_optimizer: take that run's optimizer state, too.
    named: fields on the command line; see `init_from.find`.
    profile: FIRST:LAST, the steps to trace.
    resume_step: go on from this checkpoint and set newer ones aside; 0 begins again.
    place_experts: spread heavy experts over the devices when the checkpoint is read.
    tracker: the name of the tracker that gets a copy of the metrics, or "" for none.

  Raises:
    UserError: the arguments, the workdir and the text on disk do not fit together.
    BusyError: another training runs in the workdir.
    DamagedError: checkpoints are missing, or none can be read.
    StorageError: the disk is full.
    StopAlarm: an alarm has ended the run.
  """
  window = profiling.parse(profile, setup.config.train.steps)
  path = workdir_lib.open_written(workdir)
  check_same_run(path, setup)
  if place_experts:
    placement.check(setup.config)
  _refuse_weights(path)
  source = init_from.find_source(init_from_flag, init_optimizer, path, setup.config, named)
  text = read_text(setup, path)
  with _alone(path):
    workdir_lib.refuse_links(path)
    if resume_step == NEWEST:
      _check_complete(path)
    if jax.process_index() == 0:
      _record(setup, path, text)
    rewinds = workdir_lib.rewinds(path)
    while True:
      try:
        with jax.set_mesh(setup.mesh):
          return _train(
            setup, path, text, source, window, resume_step, rewinds, place_experts, tracker
          )
      except health.Rewind as rewind:
        resume_step = NEWEST
        rewinds.append(_rewound(setup.config, path, rewind, len(rewinds)))


def check_same_run(path: pathlib.Path, setup: Setup) -> None:
  """Refuses a folder whose run has another config; says what another number of steps does to it."""
  validation.check_same_config(path, workdir_lib.stored_config(path), setup.config)
  steps = workdir_lib.saved_steps(path)
  if not steps or jax.process_index():
    return
  before, now = workdir_lib.read_config(path), setup.config.train.steps
  old = float(optimizers.schedule(before.optimizer, before.train.steps)(steps[-1]))
  new = float(setup.schedule(steps[-1]))
  if not math.isclose(old, new, rel_tol=1e-6):
    print(
      f"config.train.steps={now} (was {before.train.steps}) moves the schedule: the learning rate "
      f"of step {steps[-1] + 1} is {new:.3g}, and was {old:.3g}"
    )


def read_text(setup: Setup, path: pathlib.Path) -> Text:
  """Returns the rows of the run; raises a UserError if the run was trained on others."""
  config = setup.config
  tokenizers.check_fits(config)  # before hours of tokenising
  text = Text(
    pipeline.load_rows(config.data, "train"), pipeline.load_rows(config.data, "validation")
  )
  workdir_lib.check_same_tokenizer(path, text.train.tokenizer.fingerprint)
  text.batches(setup)  # which refuses a split that is too small
  workdir_lib.check_same_data(path, {name: getattr(text, name).digest for name in Text._fields})
  return text


@contextlib.contextmanager
def _alone(path: pathlib.Path) -> Iterator[None]:
  """Makes the folder and holds its lock, in the first process of the run."""
  with contextlib.ExitStack() as stack:
    if jax.process_index() == 0:
      workdir_lib.make(path)
      stack.enter_context(lock.held(path))
    yield


def _refuse_weights(path: pathlib.Path) -> None:
  """Raises a UserError for weights alone, with which a run does not go on, but can begin."""
  if 0 in workdir_lib.saved_steps(path):
    raise UserError(
      f"--workdir={path} holds weights that were imported or upcycled, without an optimizer's "
      f"state; name a new workdir, which --init_from={path} gives these weights"
    )


def _check_complete(path: pathlib.Path) -> None:
  """Raises a DamagedError where the folder has fewer checkpoints than its run has saved."""
  steps = workdir_lib.saved_steps(path)
  newest = steps[-1] if steps else 0
  recorded = workdir_lib.recorded_step(path)
  logged = workdir_lib.read_lines(path / workdir_lib.METRICS)
  if recorded is None and not steps and (logged or (path / workdir_lib.CONFIG).exists()):
    what = f"metrics up to step {logged[-1]['step']}" if logged else workdir_lib.CONFIG
    raise DamagedError(
      f"--workdir={path} has {what} and no checkpoint; put {workdir_lib.CHECKPOINTS} back, or "
      "begin again from step 0 with --resume_step=0"
    )
  if (recorded or 0) > newest:
    there = f"only {steps}" if steps else "none"
    raise DamagedError(
      f"--workdir={path}: the run has saved step {recorded}, but of its checkpoints {there} is "
      f"there; put them back, or go on from step {newest} with --resume_step={newest}"
    )
  if not steps and logged and jax.process_index() == 0:
    print(
      f"{path} begins again at step 0: it ended after step {logged[-1]['step']}, before its first "
      "checkpoint was complete"
    )


def _record(setup: Setup, workdir: pathlib.Path, text: Text) -> None:
  """Writes what the run is made of to the workdir; prints what is no default, cost and device."""
  if workdir_lib.recorded_step(workdir) is None:  # before the config, which _check_complete sees
    workdir_lib.record_saved(workdir, max([0, *workdir_lib.saved_steps(workdir)]))
  digests = {name: getattr(text, name).digest for name in Text._fields}
  digests["tokenizer"] = text.train.tokenizer.fingerprint
  workdir_lib.write_object(workdir / workdir_lib.DATA, digests)
  workdir_lib.write_config(workdir, setup.config)
  device, config = jax.devices()[0], setup.config
  print(command_line.difference(config), cost.cost_report(config, setup.shapes.opt_state), sep="\n")
  print(f"device             {jax.device_count()} x {device.device_kind}, jax {jax.__version__}")
  for line in mixture.describe(text.train.parts, config.data.batch_size):
    print(line)
  if notice := sharding.split_notice(config.mesh):
    print(f"mesh               {notice}")


def _train(
  setup: Setup,
  path: pathlib.Path,
  text: Text,
  source: init_from.Source | None,
  window: profiling.Window | None,
  resume_step: int,
  rewinds: list[dict[str, Any]],
  place_experts: bool,
  tracker: str,
) -> None:
  """Trains from a checkpoint, or from step 0, to the end; raises Rewind where it is to go back."""
  keep = setup.config.train
  saver = checkpoint.Checkpointer.writing(path, keep.keep_latest, keep.keep_best)
  if resume_step != NEWEST:
    saver.go_back(resume_step)
  steps = setup.config.train.steps
  if (saver.latest_step() or 0) >= steps:
    print(f"{path} is finished: step {saver.latest_step()} of {steps}")
    saver.close()
    return
  setup = choose_kernels(setup, path)
  config, abstract = setup.config, checkpoint.abstract(setup.shapes, setup.shardings)
  start, state, next_batch = _restore_newest(saver, abstract)
  if start:
    began = f" from its own checkpoint; it began with {source}" if source else ""
    print(shown(f"resuming {path} at step {start}{began}"))
  else:
    if place_experts and not (source and source.step):
      raise UserError(
        f"--placement=balanced: no loads are measured yet at step 0 of {path}; resume a run, or "
        "name one in --init_from"
      )
    state = begin_state(setup, source, loads=place_experts)
    if source and jax.process_index() == 0:
      print(shown(f"{path} begins with {source}"))
      workdir_lib.write_object(path / workdir_lib.INIT, source._asdict())
      fingerprint = text.train.tokenizer.fingerprint
      workdir_lib.inherit(path, workdir_lib.open_path(source.workdir), fingerprint)
  if jax.process_index() == 0:
    placement.record(path, start)
  if place_experts:
    state = placement.place(state, setup, path, start)
  batches = text.batches(setup)
  pipeline.skip_to(batches, next_after(start, next_batch, rewinds))
  profiler = profiling.Profiler(window, path, start)
  loop = Loop(setup, path, saver, start, profiler, batches, text.train, tracker)
  evaluator = Evaluator(config, text.validation, setup.mesh, config.eval.batches)
  # A run that was asked to stop has saved this step without the evaluation that it was due.
  planned = 0 in (start % config.train.eval_every, start % config.train.checkpoint_every)
  due = planned and start > 0 and math.isinf(saver.loss(start))
  loop.run(state, compile_step(setup), evaluator, evaluate=due)


def begin_state(
  setup: Setup, source: init_from.Source | None, *, loads: bool = False
) -> TrainState:
  """Returns the state of step 0."""
  state = setup.init()
  return init_from.load_source(source, state, setup.shardings, loads=loads) if source else state


def _restore_newest(saver: checkpoint.Checkpointer, abstract_state: Any) -> tuple[int, Any, int]:
  """Returns the newest step that is whole, its state and its next batch; (0, None, 0) for none.

  Damaged checkpoints on the way are set aside.
  """
  while step := saver.latest_step():
    try:
      return step, *saver.restore(step, abstract_state)
    except DamagedError as error:
      # The others may have read it without an error, so processes do not agree on what to do.
      if jax.process_count() > 1:
        raise DamagedError(f"{error}; go on from another one with --resume_step=STEP") from None
      saver.set_aside(step, str(error))
  return 0, None, 0


def next_after(step: int, saved: int, rewinds: list[dict[str, Any]]) -> int:
  """Returns the number of the next batch: as saved, or past those that a rewind has left out."""
  return max([saved, *(rewind["next_batch"] for rewind in rewinds if rewind["step"] == step)])


def _rewound(
  config: Config, path: pathlib.Path, rewind: health.Rewind, before: int
) -> dict[str, Any]:
  """Returns the line of alarms.jsonl about a rewind, after it is written.

  Raises:
    NotFiniteAlarm: the run has been rewound too often.
  """
  steps = workdir_lib.saved_steps(path)
  to = steps[-1] if steps else 0
  if before >= config.health.rewind_limit:
    raise health.NotFiniteAlarm(
      f"{rewind.alarm.message}; that is after config.health.rewind_limit={before} rewinds; lower "
      f"config.optimizer.learning_rate={config.optimizer.learning_rate} in a new run that begins "
      f"with --workdir=NEW" + (f" --init_from={path}:{to}" if to else "")
    )
  message = (
    f"rewind {before + 1} of {config.health.rewind_limit}, to step {to}, and on from batch "
    f"{rewind.next_batch}: {rewind.alarm.message}"
  )
  # Under the step that it goes back to, so that the line stays when later ones are deleted.
  alarm = rewind.alarm._replace(step=to, alarm="rewind", message=message)
  line = alarm.line() | {"next_batch": rewind.next_batch}
  if jax.process_index() == 0:
    workdir_lib.append_line(path / workdir_lib.ALARMS, line)
    print(f"alarm: {message}", flush=True)
  return line


def choose_kernels(setup: Setup, workdir: pathlib.Path, *, write: bool = True) -> Setup:
  """Returns the setup with a kernel in place of each `auto`; the workdir records the kernels."""
  config, chosen, lines = choose.resolve(setup.config, workdir_lib.read_kernels(workdir))
  if jax.process_index() == 0 and write:
    workdir_lib.write_object(workdir / workdir_lib.KERNELS, chosen)
    if flags.HERE or files.exists(workdir / workdir_lib.FLAGS):
      workdir_lib.write_object(workdir / workdir_lib.FLAGS, flags.HERE)
    print("\n".join([*flags.lines(), *lines]))
  return dataclasses.replace(setup, config=config)
