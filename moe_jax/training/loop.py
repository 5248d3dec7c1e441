"""The loop around the training step: numbers, alarms, evaluation, checkpoints, signals."""

import pathlib
import signal
import sys
import time
import types
from typing import Any

import jax
import numpy as np

from moe_jax import checkpoint, command_line, sharding
from moe_jax import config as config_lib
from moe_jax.model import cost
from moe_jax.model.transformer import moe_layers
from moe_jax.training import health, metrics
from moe_jax.training.evaluator import Evaluator


class Loop:
  """Steps, and what happens between them: numbers, evaluation, checkpoints, signals."""

  def __init__(
    self, config: config_lib.Config, path: pathlib.Path, saver: checkpoint.Checkpointer, start: int
  ):
    self.config, self.path, self.saver, self.start = config, path, saver, start
    self.writer = metrics.Writer(path, start) if jax.process_index() == 0 else None
    self.stop_signal = 0
    peak = metrics.peak_flops(jax.devices()[0].device_kind) * jax.device_count()
    self.flops_fraction = cost.count(config).flops_per_token / peak if peak else 0.0
    self.monitor = health.Monitor(config, moe_layers(config.model), path, start)
    # Of training so far, without compilation, evaluation and saving.
    self.seconds = self.writer.last("train/seconds") if self.writer else 0.0
    self.mark = 0.0  # up to when time is accounted for
    self.window_seconds = self.seconds  # at the last log line
    self.window_steps = 0

  def run(
    self, state: Any, batches: Any, step_fn: Any, evaluator: Evaluator, mesh: jax.sharding.Mesh
  ) -> None:
    train = self.config.train
    handlers = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
    pending = None  # the previous step's metrics, still being computed
    step = self.start
    try:
      while step < train.steps:
        batch = sharding.to_global(next(batches), mesh)
        state, step_metrics = step_fn(state, batch)
        step += 1
        if pending is not None:
          self._look(*pending)
        pending = (step, step_metrics)
        stop = self._should_stop(step)
        last = step == train.steps
        save = step % train.checkpoint_every == 0 or last
        if step % train.eval_every == 0 or save or stop:
          self._look(*pending)
          pending = None
          # A checkpoint is ranked by its validation loss; when told to stop, there is no time.
          loss = self._evaluate(step, evaluator, state) if save or not stop else float("inf")
          if save or stop:
            self.saver.save(step, state, batches, loss)
          self.mark = time.perf_counter()
        if stop and not last:
          self.saver.wait()
          name = signal.Signals(self.stop_signal).name if self.stop_signal else "preemption"
          print(f"{name}: saved step {step}; the same command goes on from there")
          break
    finally:
      for number, handler in handlers.items():
        signal.signal(number, handler)
      self.saver.wait()
      self.saver.close()
      if self.writer:
        self.writer.close()

  def _on_signal(self, number: int, frame: types.FrameType | None) -> None:
    if self.stop_signal:  # asked twice: stop now, the last checkpoint stands
      signal.signal(signal.SIGINT, signal.default_int_handler)
      raise KeyboardInterrupt
    self.stop_signal = number
    print("\nstopping after this step; once more to stop without saving", file=sys.stderr)

  def _should_stop(self, step: int) -> bool:
    if jax.process_count() == 1:
      return bool(self.stop_signal)
    return self.saver.reached_preemption(step)  # all processes agree on the step

  def _look(self, step: int, step_metrics: dict[str, jax.Array]) -> None:
    """Waits for a step's numbers, accounts for its time, raises alarms, and logs some of them."""
    values = {name: np.asarray(v) for name, v in jax.device_get(step_metrics).items()}
    now = time.perf_counter()
    if step > self.start + 1:  # the first one held the compilation
      self.seconds += now - self.mark
      self.window_steps += 1
    self.mark = now
    self._alarm(step, values)
    train = self.config.train
    if step % train.log_every and step not in (self.start + 1, train.steps):
      return
    times = {"seconds": self.seconds}
    if self.window_steps:
      steps_per_s = self.window_steps / (self.seconds - self.window_seconds)
      times["steps_per_s"] = steps_per_s
      # Positions, padding included: the hardware's rate.
      times["tokens_per_s"] = steps_per_s * self.config.data.batch_size * self.config.data.seq_len
      if self.flops_fraction:
        times["mfu"] = times["tokens_per_s"] * self.flops_fraction
      self.window_steps, self.window_seconds = 0, self.seconds
    if "load_ZE" in values:
      values["device_overload_Z"] = metrics.device_overload(
        values["load_ZE"], self.config.mesh.expert
      )
    if self.writer:
      self.writer.write(step, values | times, "train")
      print(progress_line(step, train.steps, values | times), flush=True)

  def _alarm(self, step: int, values: dict[str, np.ndarray]) -> None:
    try:
      self.monitor(step, values)
    except config_lib.UserError as error:
      remedy = ""
      if str(error).startswith("not finite"):
        remedy = f"; lower config.optimizer.learning_rate={self.config.optimizer.learning_rate}"
      raise config_lib.UserError(
        f"{error} (newest checkpoint: {self.saver.latest_step()}){remedy}"
      ) from None

  def _evaluate(self, step: int, evaluator: Evaluator, state: Any) -> float:
    result = evaluator(state.params, state.bias_ZE)
    if self.writer:
      self.writer.write(step, result, "validation")
      print(
        f"step {step:>6}  validation loss {result['loss']:.4f}  "
        f"bits per byte {result['bits_per_byte']:.4f}",
        flush=True,
      )
    return result["loss"]


def progress_line(step: int, steps: int, values: dict[str, Any]) -> str:
  parts = [f"step {step:>6}/{steps}  loss {values['loss']:.4f}"]
  if "drop_fraction_Z" in values:
    parts.append(f"balance {values['load_balance']:.3f}")
    parts.append(f"dropped {100 * np.mean(values['drop_fraction_Z']):.1f}%")
  if "tokens_per_s" in values:
    parts.append(f"{values['steps_per_s']:.2f} steps/s")
    parts.append(f"{values['tokens_per_s'] / 1e3:.1f}k tokens/s")
    if "mfu" in values:
      parts.append(f"MFU {100 * values['mfu']:.1f}%")
    parts.append(f"ETA {command_line.clock((steps - step) / values['steps_per_s'])}")
  else:
    parts.append("(compiled)")
  return "  ".join(parts)
