"""The loop over the training steps: it logs metrics, evaluates, saves, and stops when asked to."""

import contextlib
import math
import os
import pathlib
import signal
import sys
import time
import types
from collections.abc import Iterator
from typing import Any, TextIO

import grain
import jax
import numpy as np

from moe_jax import sharding
from moe_jax.config import OnNonfinite
from moe_jax.data import mixture, pipeline
from moe_jax.errors import StorageError
from moe_jax.kernels import chips
from moe_jax.start import progress
from moe_jax.storage import checkpoint, files
from moe_jax.training import health, metrics, writer
from moe_jax.training.evaluator import Evaluator
from moe_jax.training.profiling import Profiler
from moe_jax.training.setup import Setup, TrainState
from moe_jax.training.step import Step
from moe_jax.training.watchdog import Watchdog


class Loop:
  """Takes the steps of a run. Between steps it logs, raises alarms, evaluates, saves, and stops."""

  def __init__(
    self,
    setup: Setup,
    path: pathlib.Path,
    saver: checkpoint.Checkpointer,
    start: int,
    profiler: Profiler,
    batches: grain.DatasetIterator,
    rows: pipeline.Rows,
    tracker: str,
  ):
    """Prepares the loop.

    Args:
      setup: of the run; its kernels are chosen.
      path: the workdir.
      saver: of the workdir's checkpoints; the loop closes it.
      start: the number of steps taken before.
      profiler: traces the steps that were asked for.
      batches: of this process, from the next step on.
      rows: that the batches are made of.
      tracker: the name of one, or "" for none.
    """
    self.config, self.path, self.saver, self.start = setup.config, path, saver, start
    self.profiler = profiler
    self.writer = writer.Writer(path, start, tracker) if jax.process_index() == 0 else None
    self.stop_signal, self.stop_time = 0, -math.inf  # the first signal, and the clock at it
    self.unread = False  # nobody reads what is printed
    self.stopped = False  # before the last step, as somebody has asked
    chip, count = chips.chip_of(jax.devices()[0].device_kind), jax.device_count()
    self.flops_fraction = setup.counts.flops_per_token / (chip.flops * count) if chip else 0.0
    self.monitor = health.Monitor(setup.config, setup.moe_layers, path, start)
    self.watchdog = Watchdog(setup.config.train.step_timeout, start)
    # The seconds of training so far, without compilation, evaluation and saving.
    self.seconds = self.writer.last("train/seconds") if self.writer else 0.0
    # The seconds for which saving has stopped the training so far.
    self.save_seconds = self.writer.last("train/save_seconds") if self.writer else 0.0
    self.batches, self.rows = batches, rows
    self.next_batch = pipeline.next_number(batches)  # number of the batch of the first step
    self.mark = 0.0  # the clock when `seconds` was last updated
    self.window_seconds = self.seconds  # the value of `seconds` at the last line that was logged
    self.window_steps = 0  # steps since that line

  def run(
    self,
    state: TrainState,
    step_fn: Step,
    evaluator: Evaluator,
    *,
    evaluate: bool = False,
  ) -> None:
    """Trains to the last step, or to the step at which the run is asked to stop.

    Args:
      state: the train state after `start` steps; its buffers are given away to the first step.
      step_fn: the compiled step.
      evaluator: computes the validation loss.
      evaluate: whether to begin with an evaluation.

    Raises:
      Rewind: training is to go on from the newest checkpoint.
      StopAlarm: an alarm has ended the run.
      StorageError: the disk is full.
    """
    # Of several processes, jax handles SIGTERM: it tells all of them at which step to stop.
    ours = (signal.SIGINT,) if jax.process_count() > 1 else (signal.SIGINT, signal.SIGTERM)
    handlers = {number: signal.signal(number, self._on_signal) for number in ours}
    try:
      if evaluate:
        self._evaluate(self.start, evaluator, state)
      if not self._is_asked():
        with self.watchdog.watching():
          self._take_steps(state, step_fn, evaluator)
      self.saver.wait()
      files.flush()
    finally:
      for number, handler in handlers.items():
        signal.signal(number, handler)
      self.profiler.close()
      with contextlib.suppress(StorageError):  # already told, by whatever was raised above
        self.saver.wait()
      self.saver.close()
      if self.writer:
        self.writer.close(self.stopped)

  def _take_steps(
    self,
    state: TrainState,
    step_fn: Step,
    evaluator: Evaluator,
  ) -> None:
    train, mesh = self.config.train, jax.sharding.get_mesh()
    pending = None  # (step, its metrics, which the device may still be computing)
    step = self.start
    while step < train.steps:
      self.profiler.before(step + 1, state)
      with jax.profiler.StepTraceAnnotation("train", step_num=step + 1):
        batch = sharding.to_global(next(self.batches), mesh)
        with self._compiling() if step == self.start else contextlib.nullcontext():
          state, step_metrics = step_fn(state, batch)
      step += 1
      self.mark += self.profiler.after(step, state)
      if pending is not None:
        self._finish(*pending)
      pending = (step, step_metrics)
      stop = self._should_stop(step)
      last = step == train.steps
      save = step % train.checkpoint_every == 0 or last
      if step % train.eval_every == 0 or save or stop:
        self._finish(*pending)
        pending = None
        with self.watchdog.paused():
          # A checkpoint is ranked by its validation loss; a run that is to stop has no time for it.
          loss = self._evaluate(step, evaluator, state) if save or not stop else math.inf
          stop = stop or self._is_asked()
          if save or stop:
            begin = time.perf_counter()
            self._save(step, state, loss)
            self.save_seconds += time.perf_counter() - begin
        self.mark = time.perf_counter()
      self.stopped = stop
      if stop and not last:
        with self.watchdog.paused():
          self.saver.wait()
        name = signal.Signals(self.stop_signal).name if self.stop_signal else "preemption"
        saved = self.saver.latest_step() or 0
        self._say(f"{name}: saved step {saved}; the same command resumes the run there")
        if self.unread and not self.stop_signal:
          raise BrokenPipeError
        break

  @contextlib.contextmanager
  def _compiling(self) -> Iterator[None]:
    """Says how long the first step takes, in process 0; no watchdog counts it."""
    says = jax.process_index() == 0
    told = progress.waiting("compiling the step") if says else contextlib.nullcontext()
    with self.watchdog.paused(), told:
      yield

  def _save(self, step: int, state: TrainState, loss: float) -> None:
    """Saves a state if it is finite; of the last step it has to be."""
    files.flush()  # a run that goes on from this step finds all lines of the steps before
    if self.saver.save(step, state, self._batch_number(step) + 1, loss):
      return
    message = f"the state of step {step} is not finite, so it is not saved"
    if step == self.config.train.steps:
      raise health.NotFiniteAlarm(f"{message}; {self._remedy(finite=False)}")
    self._say(f"{message}; the newest checkpoint is of step {self.saver.latest_step() or 0}")

  def _rows(self, step: int) -> list[int]:
    """Returns the numbers of the rows of a step."""
    return pipeline.batch_rows(self.rows, self.config.data, self._batch_number(step))

  def _batch_number(self, step: int) -> int:
    return self.next_batch + step - self.start - 1

  def _on_signal(self, number: int, frame: types.FrameType | None) -> None:
    """Remembers a first signal until the step ends; raises KeyboardInterrupt at a second one."""
    if number == signal.SIGTERM and time.monotonic() < self.stop_time + 0.5:
      return  # some schedulers send it to the process and to its group
    if self.stop_signal:  # the second signal: stop at once; the last checkpoint remains
      signal.signal(signal.SIGINT, signal.default_int_handler)
      raise KeyboardInterrupt
    self.stop_signal, self.stop_time = number, time.monotonic()
    if jax.process_count() > 1:
      signal.raise_signal(signal.SIGTERM)
    words = "\nstopping after this step, which is saved; a second signal stops without saving"
    self._say(words, sys.stderr)

  def _say(self, text: str, stream: TextIO | None = None) -> None:
    """Prints a line. Where nobody reads any more, the run ends after this step, which is saved."""
    stream = stream or sys.stdout
    try:
      print(text, file=stream, flush=True)
    except BrokenPipeError:
      os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # for what is printed after it
      if not self.unread and jax.process_count() > 1:
        signal.raise_signal(signal.SIGTERM)
      self.unread = True

  def _is_asked(self) -> bool:
    """Returns whether this process, if it is the only one, is asked to stop."""
    return jax.process_count() == 1 and (bool(self.stop_signal) or self.unread)

  def _should_stop(self, step: int) -> bool:
    """Returns whether the run is to end after this step."""
    several = jax.process_count() > 1  # all of them agree on the step
    return self.saver.reached_preemption(step) if several else self._is_asked()

  def _finish(self, step: int, step_metrics: dict[str, jax.Array]) -> None:
    """Waits for a step's metrics; counts the step's time, raises its alarms, and may log it."""
    values = {name: np.asarray(v) for name, v in jax.device_get(step_metrics).items()}
    self.watchdog.ended(step)
    self._count_time(step)
    self._raise_alarms(step, values)
    train = self.config.train
    if step % train.log_every == 0 or step in (self.start + 1, train.steps):
      self._log(step, values)

  def _count_time(self, step: int) -> None:
    """Adds the time since the step before to the seconds of training."""
    now = time.perf_counter()
    if step > self.start + 1:  # the first step of a start includes the compilation
      self.seconds += now - self.mark
      self.window_steps += 1
    self.mark = now

  def _raise_alarms(self, step: int, values: dict[str, np.ndarray]) -> None:
    """Lets the monitor look at the step; an alarm that ends the run gets a remedy to its line."""
    try:
      self.monitor(step, values, self._rows)
    except health.Rewind as rewind:
      rewind.next_batch = self._batch_number(step) + 1
      raise
    except health.StopAlarm as alarm:
      with self.watchdog.paused():
        self.saver.wait()
      files.flush()
      finite = not isinstance(alarm, health.NotFiniteAlarm)
      raise type(alarm)(f"{alarm}; {self._remedy(finite)}") from None

  def _remedy(self, finite: bool) -> str:
    """Returns what to do after an alarm: the same command would end in the same way again."""
    newest, best = self.saver.latest_step(), self.saver.best_step()
    lower = f"lower config.optimizer.learning_rate={self.config.optimizer.learning_rate}"
    if best is None:
      return f"no usable checkpoint yet, so {lower} in a new workdir"
    fresh = f"{lower} in a new run that begins with --workdir=NEW --init_from={self.path}:{best}"
    if finite:
      return f"--config.health.on_alarm=warn resumes from step {newest}; or {fresh}"
    return f"{fresh} (newest checkpoint: {newest}, of the lowest validation loss: {best})"

  def _log(self, step: int, values: dict[str, np.ndarray]) -> None:
    """Writes the step's metrics to the workdir, and some of them to the terminal."""
    logged: dict[str, Any] = values | self._speed()
    if self.config.health.on_nonfinite is OnNonfinite.SKIP:
      logged["skipped_updates"] = self.monitor.skipped
    drawn = (self._batch_number(step) + 1) * self.config.data.batch_size
    logged |= mixture.metrics(self.rows.parts, drawn)
    if "load_ZE" in values:
      logged["device_overload_Z"] = metrics.device_overload(
        values["load_ZE"], self.config.mesh.expert
      )
    if self.writer:
      self.writer.write(step, logged, "train")
      self._say(progress_line(step, self.config.train.steps, logged))

  def _speed(self) -> dict[str, float]:
    """Returns the speed since the last call of this function; of the first step, seconds only."""
    speed = {"seconds": self.seconds, "save_seconds": self.save_seconds}
    if self.window_steps:
      steps_per_s = self.window_steps / (self.seconds - self.window_seconds)
      speed["steps_per_s"] = steps_per_s
      # Positions with padding, since the hardware computes padding, too.
      speed["tokens_per_s"] = steps_per_s * self.config.data.batch_size * self.config.data.seq_len
      if self.flops_fraction:
        speed["mfu"] = speed["tokens_per_s"] * self.flops_fraction
      self.window_steps, self.window_seconds = 0, self.seconds
    return speed

  def _evaluate(self, step: int, evaluator: Evaluator, state: TrainState) -> float:
    """Returns the validation loss, after it has logged it; inf if the run is asked to stop."""
    # The next start evaluates the step then. After the last step there is none that would.
    evaluator.stopped = lambda: self._is_asked() and step < self.config.train.steps
    try:
      result = evaluator(state.params, state.bias_ZE)
    except InterruptedError:
      return math.inf
    if self.writer:
      self.writer.write(step, result, "validation")
      self._say(
        f"step {step:>6}  validation loss {result['loss']:.4f}  "
        f"bits per byte {result['bits_per_byte']:.4f}"
      )
    return result["loss"]


def progress_line(step: int, steps: int, values: dict[str, Any]) -> str:
  """Returns the terminal's line of a step, of a run of `steps`."""
  parts = [f"step {step:>6}/{steps}  loss {values['loss']:.4f}"]
  if "drop_fraction_Z" in values:
    parts.append(f"balance {values['load_balance']:.3f}")
    parts.append(f"dropped {100 * np.mean(values['drop_fraction_Z']):.1f}%")
  if "tokens_per_s" in values:
    parts.append(f"{values['steps_per_s']:.2f} steps/s")
    parts.append(f"{values['tokens_per_s'] / 1e3:.1f}k tokens/s")
    if "mfu" in values:
      parts.append(f"MFU {100 * values['mfu']:.1f}%")
    parts.append(f"ETA {progress.clock((steps - step) / values['steps_per_s'])}")
  else:
    parts.append("(compiled)")
  return "  ".join(parts)
