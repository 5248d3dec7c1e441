"""Runs a plan, one run after another or several at once, and keeps sweep.json up to date.

Each run is train.py and then eval.py, as subprocesses that write to log.txt in the run's workdir.
"""

import contextlib
import datetime
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator, Sequence
from typing import IO, Any

import jax

from moe_jax import command_line
from moe_jax import workdir as workdir_lib
from moe_jax.config import UserError
from moe_jax.sweep import plan as plan_lib
from moe_jax.sweep import record as record_lib
from moe_jax.sweep.plan import Plan, Run
from moe_jax.sweep.slots import Slots

_POLL_SECONDS = 0.2
_PROGRESS_SECONDS = 30.0
_CHEAP_REPORT_SECONDS = 5.0
_TAIL_LINES = 20
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Job:
  """A run at work in a slot."""

  def __init__(self, run: Run, slot: int, out: pathlib.Path, slots: Slots, lock: int):
    self.run, self.slot, self._slots, self._lock = run, slot, slots, lock
    self.started = time.monotonic()
    self.workdir = out / run.workdir
    self.workdir.mkdir(parents=True, exist_ok=True)
    self._log: IO[str] = (self.workdir / workdir_lib.LOG).open("a+")
    self._begin = self._log.seek(0, os.SEEK_END)
    self.evaluating = False
    self._start(run.command)

  def _start(self, command: str) -> None:
    self._log.write(f"{_now():%Y-%m-%d %H:%M:%S} $ {command}\n")
    self._log.flush()
    # A session of its own: Ctrl-C in the terminal reaches only the sweep, which passes it on once.
    # The lock lives as long as any run, so that nobody trains in a workdir beside an orphan.
    self.process = self._slots.start(
      [sys.executable, *shlex.split(command)[1:]], self.slot, stdin=subprocess.DEVNULL,
      stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True, pass_fds=[self._lock],
    )  # fmt: skip

  def evaluate(self) -> None:
    self.evaluating = True
    self._start(self.run.evaluate)

  def close(self) -> None:
    self._log.close()

  @property
  def seconds(self) -> float:
    return time.monotonic() - self.started

  def tail(self) -> list[str]:
    """The last lines that this attempt has written."""
    self._log.seek(max(self._begin, self._log.seek(0, os.SEEK_END) - 8192))
    return self._log.read().splitlines()[-_TAIL_LINES:]

  def is_trained(self) -> bool:
    return workdir_lib.is_trained(self.workdir, self.run.config.train.steps)

  def where(self) -> str:
    """How far it is, in a few words."""
    name = f"{self.run.arm}/seed{self.run.seed}"
    if self.evaluating:
      return f"{name} evaluating"
    for line in reversed(self.tail()):
      found = re.match(r"step +(\d+/\d+) .*?(ETA \S+)?$", line)
      if found:
        return f"{name} step {found[1]}" + (f" {found[2]}" if found[2] else "")
    return f"{name} starting"


class Runner:
  def __init__(self, plan: Plan, record: dict[str, Any], jobs: int, lock: int):
    self._plan, self._record, self._out, self._lock = plan, record, plan.out, lock
    self._slots = Slots(jobs)
    self._entries = {(e["arm"], e["seed"]): e for e in record["runs"]}
    self._asked = 0  # how often to stop
    self._signal = 0
    self._report_seconds = 0.0
    self._report_is_old = True

  def run(self) -> int:
    """The exit code: 0 if all finished, 1 if any did not, 128 + the signal that stopped it."""
    waiting = [r for r in self._plan.runs if self._status(r) != "finished"]
    done = len(self._plan.runs) - len(waiting)
    if done:
      say(f"{done} of {len(self._plan.runs)} runs were finished before")
    record_lib.write(self._out, self._record)
    running: list[Job] = []
    passed_on, spoke = 0, time.monotonic()
    with self._signals():
      try:
        while running or (waiting and not self._asked):
          free = sorted(set(range(self._slots.number)) - {job.slot for job in running})
          while waiting and free and not self._asked:
            running.append(self._begin(waiting.pop(0), free.pop(0)))
          time.sleep(_POLL_SECONDS)
          if self._asked > passed_on:
            passed_on = self._asked
            self._pass_on(running)
          running = [job for job in running if not self._ended(job)]
          if time.monotonic() - spoke > _PROGRESS_SECONDS:
            spoke = time.monotonic()
            self._progress(running)
      finally:
        for job in running:  # only if this loop has failed
          if job.process.poll() is None:
            job.process.terminate()
            self._set(job.run, "stopped")
    self._progress([])
    if self._asked:
      say("stopped; the same command goes on")
      return 128 + self._signal
    reported = self._report()
    return 0 if reported and all(self._status(r) == "finished" for r in self._plan.runs) else 1

  @contextlib.contextmanager
  def _signals(self) -> Iterator[None]:
    def ask(number: int, frame: types.FrameType | None) -> None:
      self._asked, self._signal = self._asked + 1, number

    # What nohup has set to be ignored stays so.
    caught = [s for s in _SIGNALS if signal.getsignal(s) is not signal.SIG_IGN]
    handlers = {s: signal.signal(s, ask) for s in caught}
    try:
      yield
    finally:
      for number, handler in handlers.items():
        signal.signal(number, handler)

  def _pass_on(self, running: list[Job]) -> None:
    how = "once more to stop without saving" if self._asked == 1 else "not waiting for them"
    say(f"stopping {len(running)} run(s), which save first; {how}")
    for job in running:
      job.process.terminate() if self._asked <= 2 else job.process.kill()

  def _begin(self, run: Run, slot: int) -> Job:
    job = Job(run, slot, self._out, self._slots, self._lock)
    self._set(run, "running")
    say(f"{run.arm}/seed{run.seed} begins: {job.workdir / workdir_lib.LOG}")
    return job

  def _ended(self, job: Job) -> bool:
    """Whether the job is over, after setting its status; a trained one goes on to evaluate."""
    code = job.process.poll()
    if code is None:
      return False
    if code == 0 and not job.evaluating and job.is_trained() and not self._asked:
      job.evaluate()
      return False
    name = f"{job.run.arm}/seed{job.run.seed}"
    tail = job.tail()
    self._entries[job.run.arm, job.run.seed]["seconds"] += job.seconds
    if code == 0 and job.evaluating:
      self._set(job.run, "finished")
      loss = workdir_lib.read_object(job.workdir / workdir_lib.EVAL)["loss"]
      say(f"{name} finished after {command_line.clock(job.seconds)}, loss {loss:.4f}")
    elif self._asked or code == 0:  # train.py saves and ends with 0 when told to stop
      self._set(job.run, "stopped")
      say(f"{name} stopped: {tail[-1] if tail else ''}")
    else:
      self._set(job.run, "failed", "\n".join(tail))
      say(f"{name} FAILED with code {code}: {tail[-1] if tail else ''}")
    job.close()
    self._report_is_old = True
    if self._report_seconds < _CHEAP_REPORT_SECONDS and not self._asked:
      self._report()
    return True

  def _report(self) -> bool:
    """Whether the report could be made; the runs matter more than it."""
    if not self._report_is_old:
      return True
    start = time.monotonic()
    try:
      from moe_jax import report

      report.compare(self._out)
      self._report_is_old = False
    except Exception as error:
      say(f"no report: {type(error).__name__}: {error}")
    self._report_seconds = time.monotonic() - start
    return not self._report_is_old

  def _status(self, run: Run) -> str:
    return self._entries[run.arm, run.seed]["status"]

  def _set(self, run: Run, status: str, error: str = "") -> None:
    self._entries[run.arm, run.seed].update(status=status, error=error)
    record_lib.write(self._out, self._record)

  def _progress(self, running: list[Job]) -> None:
    statuses = [self._status(run) for run in self._plan.runs]
    parts = [f"{statuses.count('finished')} of {len(statuses)} finished"]
    parts += [f"{statuses.count(s)} {s}" for s in ("failed", "stopped") if s in statuses]
    parts += [job.where() for job in running]
    took = [e["seconds"] for e in self._entries.values() if e["status"] == "finished"]
    took = [seconds for seconds in took if seconds]
    if running and took:
      typical = sum(took) / len(took)
      left = [typical] * statuses.count("waiting")
      left += [max(typical - job.seconds, 0.0) for job in running]
      seconds = sum(left) / min(self._slots.number, len(left))
      parts.append(f"all done in {command_line.clock(seconds)}")
    say("; ".join(parts))


def run(
  path: str,
  out: pathlib.Path,
  *,
  jobs: int,
  dry_run: bool,
  arms: Sequence[str],
  seeds: Sequence[int],
  overrides: dict[str, Any],
) -> int:
  """Expands a sweep file, checks all of it, then runs what is not finished, or prints it.

  Returns the exit code; see Runner.run.
  """
  # This process computes shapes only; the accelerators are the runs'.
  jax.config.update("jax_platforms", "cpu")
  for script in ("train.py", "eval.py"):
    if not os.path.isfile(script):
      raise UserError(f"{script} is not in this folder; run sweep.py from its own")
  old = record_lib.read(out)
  measured = old.get("measured", {})
  with Slots(jobs).as_first():
    plan = plan_lib.make(path, out, arms=arms, seeds=seeds, overrides=overrides, measured=measured)
  if dry_run:
    print(plan_lib.dry_run(plan))
    return 0
  print(plan_lib.text(plan), flush=True)
  out.mkdir(parents=True, exist_ok=True)
  with locked(out) as lock:
    return Runner(plan, record_lib.make(plan, old, measured), jobs, lock).run()


def say(line: str) -> None:
  print(f"[{_now():%H:%M:%S}] {line}", flush=True)


def _now() -> datetime.datetime:
  return datetime.datetime.now()


@contextlib.contextmanager
def locked(out: pathlib.Path) -> Iterator[int]:
  """A file descriptor that holds the folder, which must be there, for one sweep at a time."""
  import fcntl

  descriptor = os.open(out, os.O_RDONLY)
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    os.close(descriptor)
    raise UserError(
      f"--out={out}: another sweep works there, or a run of one that was killed; wait, or end it"
    ) from None
  except OSError:  # a file system without locks
    pass
  try:
    yield descriptor
  finally:
    os.close(descriptor)
