"""Runs a plan, one run after another or several at once, and keeps sweep.json up to date.

Each run is a subprocess of train.py and then one of eval.py, which write to the workdir's log.txt.
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
from moe_jax.sweep.plan import Plan, PlannedRun
from moe_jax.sweep.slots import MachineSlots

_POLL_SECONDS = 0.2
_PROGRESS_SECONDS = 30.0
_CHEAP_REPORT_SECONDS = 5.0
_TAIL_LINES = 20
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Job:
  """A run that is being trained or evaluated in a slot."""

  def __init__(self, run: PlannedRun, slot: int, out: pathlib.Path, slots: MachineSlots, lock: int):
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
    # In a new session, so that Ctrl-C in the terminal reaches only the sweep, which stops its runs
    # once. A run inherits the lock, so that after this process is killed no other sweep trains in
    # the workdir of a run that is still alive.
    self.process = self._slots.start(
      [sys.executable, *shlex.split(command)[1:]], self.slot, stdin=subprocess.DEVNULL,
      stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True, pass_fds=[self._lock],
    )  # fmt: skip

  def evaluate(self) -> None:
    """Starts eval.py."""
    self.evaluating = True
    self._start(self.run.evaluate)

  def close(self) -> None:
    """Closes the log."""
    self._log.close()

  @property
  def seconds(self) -> float:
    """Seconds since the start."""
    return time.monotonic() - self.started

  def tail(self) -> list[str]:
    """Returns the last lines of the log that this job has written."""
    self._log.seek(max(self._begin, self._log.seek(0, os.SEEK_END) - 8192))
    return self._log.read().splitlines()[-_TAIL_LINES:]

  def is_trained(self) -> bool:
    """Returns whether the last step is trained."""
    return workdir_lib.is_trained(self.workdir, self.run.config.train.steps)

  def where(self) -> str:
    """Describes the job's progress in a few words."""
    name = f"{self.run.arm}/seed{self.run.seed}"
    if self.evaluating:
      return f"{name} evaluating"
    for line in reversed(self.tail()):
      match = re.match(r"step +(\d+/\d+) .*?(ETA \S+)?$", line)
      if match:
        return f"{name} step {match[1]}" + (f" {match[2]}" if match[2] else "")
    return f"{name} starting"


class Runner:
  """Runs the jobs of a plan and writes their states into the record."""

  def __init__(self, plan: Plan, record: dict[str, Any], jobs: int, lock: int):
    self._plan, self._record, self._out, self._lock = plan, record, plan.out, lock
    self._slots = MachineSlots(jobs)
    self._entries = {(e["arm"], e["seed"]): e for e in record["runs"]}
    self._stops = 0  # how many signals to stop have come
    self._signal = 0
    self._report_seconds = 0.0
    self._report_is_old = True

  def run(self) -> int:
    """Runs all jobs.

    Returns the exit code: 0 if all runs are finished, 1 if any is not, 128 + the number of the
    signal that stopped the sweep.
    """
    waiting = [r for r in self._plan.runs if self._status(r) != "finished"]
    done = len(self._plan.runs) - len(waiting)
    if done:
      say(f"{done} of {len(self._plan.runs)} runs were finished before")
    record_lib.write(self._out, self._record)
    running: list[Job] = []
    passed_on, last_progress = 0, time.monotonic()
    with self._signals():
      try:
        while running or (waiting and not self._stops):
          free = sorted(set(range(self._slots.number)) - {job.slot for job in running})
          while waiting and free and not self._stops:
            running.append(self._begin(waiting.pop(0), free.pop(0)))
          time.sleep(_POLL_SECONDS)
          if self._stops > passed_on:
            passed_on = self._stops
            self._pass_on(running)
          running = [job for job in running if not self._ended(job)]
          if time.monotonic() - last_progress > _PROGRESS_SECONDS:
            last_progress = time.monotonic()
            self._progress(running)
      finally:
        for job in running:  # empty unless the loop above has raised
          if job.process.poll() is None:
            job.process.terminate()
            self._set(job.run, "stopped")
    self._progress([])
    if self._stops:
      say("stopped; the same command continues")
      return 128 + self._signal
    reported = self._report()
    return 0 if reported and all(self._status(r) == "finished" for r in self._plan.runs) else 1

  @contextlib.contextmanager
  def _signals(self) -> Iterator[None]:
    def ask(number: int, frame: types.FrameType | None) -> None:
      self._stops, self._signal = self._stops + 1, number

    # A signal that nohup has set to be ignored stays ignored.
    caught = [s for s in _SIGNALS if signal.getsignal(s) is not signal.SIG_IGN]
    handlers = {s: signal.signal(s, ask) for s in caught}
    try:
      yield
    finally:
      for number, handler in handlers.items():
        signal.signal(number, handler)

  def _pass_on(self, running: list[Job]) -> None:
    how = "interrupt again to stop without saving" if self._stops == 1 else "not waiting for them"
    say(f"stopping {len(running)} run(s), which save first; {how}")
    for job in running:
      job.process.terminate() if self._stops <= 2 else job.process.kill()

  def _begin(self, run: PlannedRun, slot: int) -> Job:
    job = Job(run, slot, self._out, self._slots, self._lock)
    self._set(run, "running")
    say(f"{run.arm}/seed{run.seed} begins: {job.workdir / workdir_lib.LOG}")
    return job

  def _ended(self, job: Job) -> bool:
    """Returns whether the job is over, and sets its status; a trained job starts to evaluate."""
    code = job.process.poll()
    if code is None:
      return False
    if code == 0 and not job.evaluating and job.is_trained() and not self._stops:
      job.evaluate()
      return False
    name = f"{job.run.arm}/seed{job.run.seed}"
    tail = job.tail()
    self._entries[job.run.arm, job.run.seed]["seconds"] += job.seconds
    if code == 0 and job.evaluating:
      self._set(job.run, "finished")
      loss = workdir_lib.read_object(job.workdir / workdir_lib.EVAL)["loss"]
      say(f"{name} finished after {command_line.clock(job.seconds)}, loss {loss:.4f}")
    elif self._stops or code == 0:  # train.py saves and ends with 0 after a signal to stop
      self._set(job.run, "stopped")
      say(f"{name} stopped: {tail[-1] if tail else ''}")
    else:
      self._set(job.run, "failed", "\n".join(tail))
      say(f"{name} FAILED with code {code}: {tail[-1] if tail else ''}")
    job.close()
    self._report_is_old = True
    if self._report_seconds < _CHEAP_REPORT_SECONDS and not self._stops:
      self._report()
    return True

  def _report(self) -> bool:
    """Writes the report; returns whether it could, because a failure must not stop the runs."""
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

  def _status(self, run: PlannedRun) -> str:
    return self._entries[run.arm, run.seed]["status"]

  def _set(self, run: PlannedRun, status: str, error: str = "") -> None:
    self._entries[run.arm, run.seed].update(status=status, error=error)
    record_lib.write(self._out, self._record)

  def _progress(self, running: list[Job]) -> None:
    statuses = [self._status(run) for run in self._plan.runs]
    parts = [f"{statuses.count('finished')} of {len(statuses)} finished"]
    parts += [f"{statuses.count(s)} {s}" for s in ("failed", "stopped") if s in statuses]
    parts += [job.where() for job in running]
    durations = [e["seconds"] for e in self._entries.values() if e["status"] == "finished"]
    durations = [seconds for seconds in durations if seconds]
    if running and durations:
      typical = sum(durations) / len(durations)
      remaining = [typical] * statuses.count("waiting")
      remaining += [max(typical - job.seconds, 0.0) for job in running]
      seconds = sum(remaining) / min(self._slots.number, len(remaining))
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
  cache_dir: str = "",
) -> int:
  """Expands and checks a sweep file, then runs the runs that are not finished.

  Args:
    path: of the sweep file.
    out: folder of the runs.
    jobs: how many runs at a time.
    dry_run: whether to print the commands instead of running them.
    arms: names of the arms to run; () for all.
    seeds: seeds to run; () for the sweep's.
    overrides: "field=value" for every arm.
    cache_dir: for the commands of a dry run; the runs themselves inherit $MOE_JAX_CACHE.

  Returns:
    The exit code; see Runner.run.

  Raises:
    UserError: the sweep file or an option is wrong, or another sweep runs in the folder.
  """
  # This process computes shapes only, and leaves the accelerators to the runs.
  jax.config.update("jax_platforms", "cpu")
  for script in ("train.py", "eval.py"):
    if not os.path.isfile(script):
      raise UserError(f"{script} is not in this folder; run sweep.py in the folder that has it")
  old = record_lib.read(out)
  measured = old.get("measured", {})
  with MachineSlots(jobs).as_first():
    plan = plan_lib.make_plan(
      path, out, arms=arms, seeds=seeds, overrides=overrides, measured=measured
    )
  if dry_run:
    print(plan_lib.dry_run(plan, f" --cache_dir={shlex.quote(cache_dir)}" if cache_dir else ""))
    return 0
  print(plan_lib.describe_plan(plan), flush=True)
  out.mkdir(parents=True, exist_ok=True)
  with locked(out) as lock:
    return Runner(plan, record_lib.make_record(plan, old, measured), jobs, lock).run()


def say(line: str) -> None:
  """Prints a line with the time of day."""
  print(f"[{_now():%H:%M:%S}] {line}", flush=True)


def _now() -> datetime.datetime:
  return datetime.datetime.now()


@contextlib.contextmanager
def locked(out: pathlib.Path) -> Iterator[int]:
  """Locks an existing folder for one sweep at a time; yields the descriptor with the lock.

  Raises:
    UserError: the folder is locked.
  """
  import fcntl

  descriptor = os.open(out, os.O_RDONLY)
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    os.close(descriptor)
    raise UserError(
      f"--out={out}: another sweep runs there, or a run of a killed sweep is still alive; wait for "
      "its end, or end it"
    ) from None
  except OSError:  # a file system without locks
    pass
  try:
    yield descriptor
  finally:
    os.close(descriptor)
