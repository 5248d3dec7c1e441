"""The files that a run's metrics are written to, and the tracker that gets a copy.

Apart from metrics.py, because tensorboardX imports much (torch, where it is installed).
"""

import contextlib
import pathlib
import time
from typing import Any

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from moe_jax.storage import files
from moe_jax.storage import workdir as workdir_lib
from moe_jax.training import placement
from moe_jax.training import tracker as tracker_lib


class Writer:
  """Writes metrics to metrics.jsonl and to TensorBoard.

  metrics.jsonl has one line for each logged step, with arrays as lists. TensorBoard has numbers and
  lists, but no arrays of two dimensions; so has a tracker, which reads metrics.jsonl. Experts that
  have changed places keep their numbers.
  """

  def __init__(self, workdir: pathlib.Path, resume_step: int, tracker: str = ""):
    """Opens both; what they have of steps after `resume_step` is deleted or hidden.

    `tracker` is the name of one, or "" for none.
    """
    self._place_ZE = placement.recorded(workdir, resume_step + 1)
    self._path = workdir / workdir_lib.METRICS
    workdir_lib.keep_lines(self._path, resume_step)
    self._folder = files.growing(workdir / workdir_lib.TENSORBOARD)
    with files.storage_errors(self._folder):
      self._folder.mkdir(exist_ok=True)
      # Not tensorboardX's SummaryWriter: its thread dies of a full disk, and then its queue blocks.
      self._events = EventsWriter(str(self._folder / "events"))
    begin = SessionLog(status=SessionLog.START)  # hides what an earlier start wrote of later steps
    self._add(Event(wall_time=time.time(), step=resume_step + 1, session_log=begin))
    self._tracker = tracker_lib.Tracker(tracker, workdir) if tracker else None

  def write(self, step: int, values: dict[str, Any], prefix: str) -> None:
    """Writes the metrics of a step under the names `prefix`/name.

    Raises:
      StorageError: the disk is full.
    """
    if self._place_ZE is not None:
      found = {n: np.asarray(v) for n, v in values.items() if n.endswith("_ZE")}
      values = values | {n: np.take_along_axis(v, self._place_ZE, 1) for n, v in found.items()}
    plain = {f"{prefix}/{name}": np.asarray(value).tolist() for name, value in values.items()}
    workdir_lib.append_line(self._path, {"step": step, **plain})
    self._add(
      *(
        Event(wall_time=time.time(), step=step, summary=summary.scalar(name, value))
        for name, value in tracker_lib.scalars(plain).items()
      )
    )

  def _add(self, *events: Event) -> None:
    with files.storage_errors(self._folder):
      for event in events:
        self._events.write_event(event)
      self._events.flush()

  def last(self, name: str) -> float:
    """Returns the newest value that metrics.jsonl has of a metric; 0.0 if there is none."""
    lines = workdir_lib.read_lines(self._path)
    return next((x[name] for x in reversed(lines) if isinstance(x.get(name), float)), 0.0)

  def close(self, stopped: bool = False) -> None:
    """Closes both, and the tracker, with less patience where a scheduler has `stopped` the run."""
    with contextlib.suppress(OSError):  # of a full disk, which `write` has told
      self._events.close()
    if self._tracker:
      self._tracker.close(stopped)
