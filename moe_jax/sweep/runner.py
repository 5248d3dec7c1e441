"""Runs a plan, one run after another or several at once, and keeps sweep.json up to date."""

import contextlib
import datetime
import os
import pathlib
import shlex
import signal
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Iterator, Sequence
from typing import Any

import filelock
import jax

from moe_jax.errors import BusyError, StorageError, UserError
from moe_jax.report import page
from moe_jax.start import progress
from moe_jax.storage import files, lock
from moe_jax.storage import workdir as workdir_lib
from moe_jax.sweep import plan as plan_lib
from moe_jax.sweep import record as record_lib
from moe_jax.sweep.job import Job, Machine
from moe_jax.sweep.plan import Plan, PlannedRun
from moe_jax.sweep.slurm import QueuedRun, Slurm

_LOCK = "sweep.lock"
_POLL_SECONDS = 0.2
_PROGRESS_SECONDS = 30.0
_CHEAP_REPORT_SECONDS = 5.0
_LAST_SECONDS = 60.0  # to save in, for runs of a sweep that an error ends
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Runner:
  """Runs the jobs of a plan and writes their states into the record."""

  def __init__(self, plan: Plan, record: dict[str, Any], launcher: Machine | Slurm):
    self._plan, self._record, self._out = plan, record, plan.out
    self._launcher: Any = launcher  # whose jobs are its own
    self._entries = {entry["workdir"]: entry for entry in record["runs"]}
    self._stops = 0  # how many signals to stop have come
    self._signal = 0
    self._full: StorageError | None = None  # why nothing more is started
    self._report_seconds = 0.0
    self._reported: page.Report | None = None  # that of now

  def run(self) -> int:
    """Runs all jobs.

    Returns the exit code: 0 if all runs are finished, 1 if any is not, that of the report if it
    lacks the target arm, 128 + the number of the signal that stopped the sweep.

    Raises:
      StorageError: a disk is full. Runs have saved where they could.
    """
    waiting = [r for r in self._plan.runs if self._entries[r.workdir]["status"] != "finished"]
    done = len(self._plan.runs) - len(waiting)
    if done:
      say(f"{done} of {len(self._plan.runs)} runs were finished before")
    self._save()
    running: list[Any] = []
    with self._signals():
      try:
        self._loop(waiting, running)
      except BaseException:
        self._launcher.stop(running, 1)
        for job in running:
          with contextlib.suppress(subprocess.TimeoutExpired):
            job.process.wait(_LAST_SECONDS)
        raise
    if not self._signal and self._full is None:
      self._report()
      for note in self._reported.notes if self._reported else []:
        say(note)
    self._progress([])
    if self._signal:
      for entry in self._entries.values():  # of those that a cluster goes on with
        entry["status"] = entry["status"].replace("running", "waiting")
      self._save()
      say("stopped; the same command continues")
      return 128 + self._signal
    if self._full:
      self._save()  # there may be room again
      raise self._full
    finished = all(self._entries[r.workdir]["status"] == "finished" for r in self._plan.runs)
    return self._reported.code if self._reported and finished else 1

  def _loop(self, waiting: list[PlannedRun], running: list[Any]) -> None:
    """Runs what is waiting, until a signal asks to stop or a disk is full."""
    passed_on, last_progress = 0, time.monotonic()
    while running or (waiting and self._goes_on()):
      while waiting and self._goes_on() and (room := self._launcher.room(running)):
        batch, waiting[:room] = waiting[:room], []
        running += self._begin(batch, running)
      time.sleep(_POLL_SECONDS)
      while passed_on < self._stops:
        passed_on += 1
        say(self._launcher.stop(running, passed_on))
      running[:] = [job for job in running if not self._ended(job)]
      if time.monotonic() - last_progress > _PROGRESS_SECONDS:
        last_progress = time.monotonic()
        self._progress(running)

  def _goes_on(self) -> bool:
    return not self._stops and self._full is None

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

  def _begin(self, runs: list[PlannedRun], running: list[Any]) -> list[Any]:
    """Returns the jobs of runs; none if they cannot be started."""
    try:
      jobs = self._launcher.start(runs, running)
    except StorageError as error:
      self._stop_starting(error)
      return []
    except OSError as error:  # no memory, or too many processes
      why = f"cannot start a process: {error}"
      for run in runs:
        self._set(run, "failed", why)
        say(f"{run.workdir} FAILED: {why}")
      return []
    for job in jobs:
      self._follow(job)
    return jobs

  def _follow(self, job: Job | QueuedRun) -> None:
    """Records that a run has begun, or waits again."""
    if self._entries[job.run.workdir]["status"] != job.status:
      self._set(job.run, job.status)
      if job.status == "running":
        say(f"{job.run.workdir} begins: {job.workdir / workdir_lib.LOG}")

  def _ended(self, job: Job | QueuedRun) -> bool:
    """Returns whether the job is over, and sets its status."""
    try:
      ended = job.poll(self._goes_on())
    except StorageError as error:  # it cannot evaluate
      self._stop_starting(error)
      ended = job.poll(False)
    if ended is None:
      self._follow(job)
      return False
    status, lines, code = ended
    last = lines[-1] if lines else ""
    self._entries[job.run.workdir]["seconds"] += job.seconds
    if code == StorageError.code and not self._stops:
      # The log may be on the same disk, and then the run's own words may be missing.
      said = "a disk is full or cannot be written; the same command goes on when it can"
      said = next((x for x in reversed(lines) if x.startswith("error: ")), said)
      self._stop_starting(StorageError(f"{job.run.workdir}: {said.removeprefix('error: ')}"))
    if status != "finished" and self._stops:
      status = "stopped"
    how = {
      "finished": f"finished after {progress.clock(job.seconds)},",
      "stopped": "stopped:",
      "failed": "FAILED:" if code is None else f"FAILED with code {code}:",
    }
    say(f"{job.run.workdir} {how[status]} {last}")
    self._set(job.run, status, "\n".join(lines) if status == "failed" else "")
    self._reported = None
    if self._report_seconds < _CHEAP_REPORT_SECONDS and self._goes_on():
      self._report()
    return True

  def _report(self) -> None:
    """Writes the report if it can, because a failure must not stop the runs."""
    if self._reported:
      return
    start = time.monotonic()
    try:
      self._reported = page.compare(self._out)
    except StorageError as error:
      self._stop_starting(error)
    except Exception as error:
      say(f"no report: {type(error).__name__}: {error}")
    self._report_seconds = time.monotonic() - start

  def _save(self) -> None:
    try:
      files.write_json(self._out / record_lib.SWEEP, self._record)
    except StorageError as error:
      self._stop_starting(error)

  def _stop_starting(self, error: StorageError) -> None:
    """After a disk is full nothing more is started; what runs goes on, and saves if it can."""
    if self._full is None:
      say(f"{error}; no more runs are started")
      self._full = error

  def _set(self, run: PlannedRun, status: str, error: str = "") -> None:
    self._entries[run.workdir].update(status=status, error=error)
    self._save()

  def _progress(self, running: list[Any]) -> None:
    statuses = [self._entries[run.workdir]["status"] for run in self._plan.runs]
    parts = [f"{statuses.count('finished')} of {len(statuses)} finished"]
    parts += [f"{statuses.count(s)} {s}" for s in ("failed", "stopped", "waiting") if s in statuses]
    parts += [job.where() for job in running if job.status == "running"]
    done = (e["seconds"] for e in self._entries.values() if e["status"] == "finished")
    durations = [seconds for seconds in done if seconds]
    if running and durations:
      typical = statistics.fmean(durations)
      remaining = [typical] * statuses.count("waiting")
      remaining += [max(typical - j.seconds, 0.0) for j in running if j.status == "running"]
      seconds = sum(remaining) / min(self._launcher.number, len(remaining))
      parts.append(f"all done in {progress.clock(seconds)}")
    say("; ".join(parts))


def run_sweep(
  path: str,
  out: pathlib.Path,
  *,
  jobs: int,
  dry_run: bool,
  arms: Sequence[str],
  seeds: Sequence[int],
  overrides: dict[str, Any],
  cache_dir: str = "",
  tracker: str = "",
  slurm: bool = False,
) -> int:
  """Expands and checks a sweep file, then runs the runs that are not finished.

  Args:
    path, out, arms, seeds, overrides: as of `make_plan`.
    jobs: how many runs at a time.
    dry_run: whether to print the commands instead of running them.
    cache_dir, tracker: for the commands of a dry run; the runs themselves inherit variables.
    slurm: whether Slurm runs them, and not this machine; `jobs` is then 0 for as many as it will.

  Returns:
    The exit code; see Runner.run.

  Raises:
    UserError: the sweep file or an option is wrong, or one of its subclasses: the folder's
      sweep.json is damaged or of something else, another sweep runs there, a disk is full.
  """
  # This process computes shapes only, and leaves the accelerators to the runs.
  jax.config.update("jax_platforms", "cpu")
  for script in ("train.py", "eval.py"):
    if not os.path.isfile(script):
      raise UserError(f"{script} is not in this folder; run sweep.py in the folder that has it")
  if out.exists() and not out.is_dir():
    raise UserError(f"--out={out} is no folder; name another one")
  # A damaged one is refused before anything is planned or written.
  record_lib.read_record(out)
  plan = plan_lib.make_plan(path, out, arms=arms, seeds=seeds, overrides=overrides)
  if dry_run:
    flags = f" --cache_dir={shlex.quote(cache_dir)}" if cache_dir else ""
    print(plan_lib.dry_run(plan, flags, f" --tracker={tracker}" if tracker else ""))
    return 0
  print(plan_lib.describe_plan(plan), flush=True)
  with files.storage_errors(out):
    out.mkdir(parents=True, exist_ok=True)
  with locked(out):
    launcher = Slurm(out, jobs) if slurm else Machine(out, jobs)
    for run in plan.runs:
      if not launcher.has(run):
        _check_place(out / run.workdir)
    # Read again, because another sweep may have ended since.
    record = record_lib.make_record(plan, record_lib.read_record(out))
    return Runner(plan, record, launcher).run()


def _check_place(workdir: pathlib.Path) -> None:
  """Raises a UserError for a link in a run's folder, a BusyError where a run is still training."""
  for path in (workdir.parent, workdir, *workdir.rglob("*")):
    if path.is_symlink():
      raise UserError(f"{path} is a symbolic link, through which nothing is written; remove it")
  if (workdir / workdir_lib.LOCK).exists():
    with lock.held(workdir):
      pass


def say(line: str) -> None:
  """Prints a line with the time of day; the runs go on if nobody can read it any more."""
  try:
    print(f"[{datetime.datetime.now():%H:%M:%S}] {line}", flush=True)
  except OSError:  # the terminal is closed, or the reader of a pipe has ended
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def locked(out: pathlib.Path) -> Iterator[None]:
  """Locks an existing folder for one sweep, until this process ends; or raises a BusyError."""
  with files.storage_errors(out / _LOCK):
    try:
      held = filelock.FileLock(out / _LOCK).acquire(blocking=False)
    except filelock.Timeout:
      said = f"--out={out}: another sweep runs there; wait for its end, or end it"
      raise BusyError(said) from None
  with held:
    yield
