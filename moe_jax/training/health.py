"""Alarms of a training run: collapse, dead experts, drops, loss spikes, values that are not finite.

They are raised from the metrics that every step computes anyway. The host looks at a step's metrics
while the device computes the next step.
"""

import collections
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from moe_jax.config import Config, OnAlarm, OnNonfinite
from moe_jax.errors import UserError, few
from moe_jax.storage import workdir as workdir_lib


class Alarm(NamedTuple):
  """One line of alarms.jsonl."""

  step: int
  alarm: str  # collapse, dead_experts, drop_rate, loss_spike, nonfinite, skip or rewind
  layer: int  # the layer's index in the network, from 0; -1 for the whole model
  value: float  # the value that is over the limit
  limit: float
  message: str
  rows: Sequence[int] = ()  # of a step that is not finite: its rows' numbers in the split

  def line(self) -> dict[str, Any]:
    """Returns what alarms.jsonl holds."""
    values = self._asdict()
    return values if self.rows else {k: v for k, v in values.items() if k != "rows"}


class StopAlarm(UserError):
  """An alarm that ends the run, as config.health says."""

  code = 6


class NotFiniteAlarm(StopAlarm):
  """The same, raised because a metric is not finite."""


class Rewind(Exception):
  """Training is to go on from the newest checkpoint, with rows that follow those of a bad step."""

  def __init__(self, alarm: Alarm):
    super().__init__(alarm.message)
    self.alarm = alarm
    self.next_batch = 0  # number of the batch that follows; the loop knows it


class Monitor:
  """Looks at the metrics of every step. A resumed run has no memory of the steps before."""

  def __init__(self, config: Config, layers: list[int], workdir: pathlib.Path, resume_step: int):
    """Opens the alarms of a run.

    Args:
      config: of the run.
      layers: the index in the network of each MoE layer.
      workdir: the folder of alarms.jsonl.
      resume_step: the last step before this start; alarms of later steps are deleted.
    """
    self._health, self._moe, self._layers = config.health, config.model.moe, layers
    self._path = workdir / workdir_lib.ALARMS
    self._writes = jax.process_index() == 0  # all processes look, since all have to stop
    if self._writes:
      workdir_lib.keep_lines(self._path, resume_step)
    self._losses: collections.deque[float] = collections.deque(maxlen=self._health.window)
    self._steps_over: collections.Counter[tuple[str, int]] = collections.Counter()
    self._nonfinite = 0  # steps in a row
    lines = workdir_lib.read_lines(self._path)
    self.skipped = sum(line.get("alarm") == "skip" for line in lines)  # updates of the whole run

  def __call__(
    self, step: int, values: dict[str, np.ndarray], rows: Callable[[int], Sequence[int]]
  ) -> list[Alarm]:
    """Returns the alarms that this step raises, and writes them to alarms.jsonl.

    Args:
      step: the number of the step.
      values: its metrics.
      rows: the numbers of a step's rows in the training split.

    Raises:
      StopAlarm: an alarm is to end the run; NotFiniteAlarm where a metric is not finite.
      Rewind: the run is to go on from its newest checkpoint.
    """
    broken = self._not_finite(step, values)
    self._nonfinite = self._nonfinite + 1 if broken else 0
    if broken:
      return self._act_on_nonfinite(broken._replace(rows=[int(row) for row in rows(step)]))
    alarms = self._balance(step, values) + self._spike(step, float(values["loss"]))
    for alarm in alarms if self._health.on_alarm is not OnAlarm.OFF else ():
      self._write(alarm)
      if self._health.on_alarm is OnAlarm.STOP:
        raise StopAlarm(alarm.message)
    return alarms

  def _act_on_nonfinite(self, alarm: Alarm) -> list[Alarm]:
    action = self._health.on_nonfinite
    if action is OnNonfinite.SKIP:
      self.skipped += 1
      message = f"update skipped ({self.skipped} in this run): {alarm.message}"
      self._write(alarm._replace(alarm="skip", message=message))
      if self._nonfinite >= self._health.skip_limit:
        raise NotFiniteAlarm(
          f"config.health.skip_limit={self._health.skip_limit} updates in a row were skipped: "
          f"{alarm.message}"
        )
    elif action is OnNonfinite.OFF or (action is OnNonfinite.WARN and self._nonfinite > 1):
      return []
    else:
      self._write(alarm)
    if action is OnNonfinite.REWIND:
      raise Rewind(alarm)
    if action is OnNonfinite.STOP:
      raise NotFiniteAlarm(alarm.message)
    return [alarm]

  def _write(self, alarm: Alarm) -> None:
    if self._writes:
      workdir_lib.append_line(self._path, alarm.line())
      print(f"alarm: {alarm.message}", flush=True)

  def _not_finite(self, step: int, values: dict[str, np.ndarray]) -> Alarm | None:
    broken = [name for name, value in values.items() if not np.all(np.isfinite(value))]
    if not broken:
      return None
    layer, where = -1, ""
    if "router_z_Z" in broken:
      layer = self._layers[int(np.argmin(np.isfinite(values["router_z_Z"])))]
      where = f"; first in the router of layer {layer}"
    # The loss is named first, since it is the metric that people know.
    names = sorted(broken, key=lambda name: (name != "loss", name))
    message = f"not finite at step {step}: {few(names, 6)}{where}"
    message += f"; --replay={step} looks into it"
    return Alarm(step, "nonfinite", layer, float(values["loss"]), 0.0, message)

  def _balance(self, step: int, values: dict[str, np.ndarray]) -> list[Alarm]:
    if "window_load_ZE" not in values:
      return []
    health, moe = self._health, self._moe
    share_Z = np.minimum(values["load_ZE"].max(axis=-1) * moe.top_k, 1)
    always = moe.top_k / moe.num_experts >= health.token_share  # true of a balanced layer, too
    alarms = []
    for name, value_Z, limit, what in (
      ("collapse", share_Z, 0 if always else health.token_share, "of the tokens go to one expert"),
      (
        "dead_experts",
        values["window_dead_experts_Z"] / moe.num_experts,
        health.dead_fraction,
        "of the experts are dead",
      ),
      (
        "drop_rate",
        values["drop_fraction_Z"],
        health.drop_fraction,
        "of the assignments are dropped",
      ),
    ):
      for layer, value in zip(self._layers, value_Z, strict=True):
        over = self._steps_over
        over[name, layer] = over[name, layer] + 1 if limit and value > limit else 0
        if over[name, layer] == health.patience:  # one alarm, until the value has been below again
          message = (
            f"{name} in layer {layer} at step {step}: {100 * value:.0f}% {what}, over "
            f"{100 * limit:.0f}% for {health.patience} steps"
          )
          alarms.append(Alarm(step, name, layer, float(value), limit, message))
    return alarms

  def _spike(self, step: int, loss: float) -> list[Alarm]:
    limit, losses, alarms = self._health.loss_spike, self._losses, []
    if limit and len(losses) == losses.maxlen:
      rise = loss - float(np.mean(losses))
      over = self._steps_over
      over["loss_spike", -1] = over["loss_spike", -1] + 1 if rise > limit else 0
      if over["loss_spike", -1] == 1:
        message = (
          f"loss_spike at step {step}: {loss:.3f} is {rise:.2f} nats above the mean of the last "
          f"{len(losses)} steps"
        )
        alarms.append(Alarm(step, "loss_spike", -1, rise, limit, message))
    losses.append(loss)
    return alarms
