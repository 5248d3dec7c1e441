"""Faults planted one at a time, each of which some test must see: what the tests are worth.

    python -m tests.planted                    # all of them: 10 to 20 minutes on two cores
    python -m tests.planted --only="exchange"  # those with these words in their name or path
    python -m tests.planted --list             # what there is; nothing runs
    python -m tests.planted --clean            # the same tests without a fault: all must pass

Run it before and after a change of the tests, with --clean first. A fault that survives is a hole
in the tests. Each job plants in a copy of the tree, uncommitted changes included.
"""

import argparse
import concurrent.futures
import contextlib
import importlib.util
import os
import pathlib
import queue
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

from tests.support.planted_faults import FAULTS, Fault

ROOT = pathlib.Path(__file__).parents[1]
LIMIT = 300  # seconds after which the tests of a fault count as hanging


class Outcome(NamedTuple):
  """What became of a fault."""

  kind: str  # caught, timeout (caught by the time limit), SURVIVED or BROKEN
  seconds: float
  detail: str  # the test that failed, or why the trial says nothing


def changed(fault: Fault, text: str) -> str:
  """Returns the file with the fault.

  Raises:
    ValueError: the text is not there once, or what takes its place does not compile.
  """
  found = text.count(fault.right)
  if found != 1 or "\n" in fault.right:
    raise ValueError(f"{fault.name}: moe_jax/{fault.path} has {found} times: {fault.right}")
  text = text.replace(fault.right, fault.wrong)
  try:
    compile(text, fault.path, "exec")
  except SyntaxError as error:
    raise ValueError(f"{fault.name}: {error}") from None
  return text


def copy_tree(folder: pathlib.Path) -> None:
  """Copies what git has or would add, as it stands in the working tree."""
  command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
  names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
  for name in filter(None, names.split("\0")):
    if (ROOT / name).is_file():
      (folder / name).parent.mkdir(parents=True, exist_ok=True)
      shutil.copy2(ROOT / name, folder / name)
  # An installed moe_jax must not be the one that is tested.
  command = [sys.executable, "-c", "import moe_jax; print(moe_jax.__file__)"]
  done = subprocess.run(command, cwd="/", env=_environment(folder), capture_output=True, text=True)
  if not done.stdout.startswith(f"{folder}/"):
    sys.exit(f"the tests would import {done.stdout.strip() or done.stderr}, not {folder}")


def _environment(folder: pathlib.Path) -> dict[str, str]:
  return os.environ | {"PYTHONPATH": str(folder)}


def _write(path: pathlib.Path, text: str) -> None:
  path.write_text(text)
  # Python compares times in seconds and sizes, and two faults of a file may agree in both.
  pathlib.Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)


class Trials:
  """Plants faults in copies of the tree, one at a time in each."""

  def __init__(self, parent: pathlib.Path, jobs: int):
    self._processes: set[subprocess.Popen[bytes]] = set()
    self._stopped = False
    self._folders: queue.Queue[pathlib.Path] = queue.Queue()
    for job in range(jobs):
      folder = parent / f"job{job}"
      copy_tree(folder)
      self._folders.put(folder)

  def __call__(self, fault: Fault) -> Outcome:
    folder = self._folders.get()
    path = folder / "moe_jax" / fault.path
    text, start = path.read_text(), time.monotonic()
    try:
      _write(path, changed(fault, text))
      code, output = self._pytest(folder, fault.tests)
    finally:
      _write(path, text)
      self._folders.put(folder)
    seconds = time.monotonic() - start
    # A test, not a file: one that cannot be collected is no test that fails.
    failed = re.search(r"^(?:FAILED|ERROR) (\S+?::\S+)", output, re.MULTILINE)
    if code is None:
      return Outcome("timeout", seconds, failed[1] if failed else f"no answer in {LIMIT} s")
    if code == 1 and failed:
      return Outcome("caught", seconds, failed[1])
    if code == 0:
      return Outcome("SURVIVED", seconds, fault.tests)
    return Outcome("BROKEN", seconds, f"pytest {fault.tests} ended with {code}:\n{output[-2000:]}")

  def _pytest(self, folder: pathlib.Path, tests: str) -> tuple[int | None, str]:
    """Returns the exit code, None for a time-out, and what was printed."""
    command = [
      sys.executable, "-m", "pytest", "-x", "-q", "-m", "", "-p", "no:cacheprovider",
      f"--basetemp={folder}.tmp", *shlex.split(tests),
    ]  # fmt: skip
    # To a file: a pipe stays open as long as anything that the tests have left behind.
    with open(f"{folder}.txt", "w+") as said:
      # In a session of its own, so that what the tests start ends with them.
      process = subprocess.Popen(
        command,
        cwd=folder,
        env=_environment(folder),
        start_new_session=True,
        stdout=said,
        stderr=subprocess.STDOUT,
      )
      self._processes.add(process)
      try:
        if self._stopped:
          _kill(process)
        code: int | None = process.wait(LIMIT)
      except subprocess.TimeoutExpired:
        code = None
      _kill(process)
      process.wait()
      self._processes.discard(process)
      said.seek(0)
      return code, said.read()

  def stop(self) -> None:
    """Ends all tests that run."""
    self._stopped = True
    for process in list(self._processes):
      _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
  """Ends a process and its children; what is left of them, if it has ended."""
  with contextlib.suppress(ProcessLookupError):
    os.killpg(process.pid, signal.SIGKILL)


def try_all(faults: list[Fault], jobs: int, clean: bool) -> int:
  """Tries the faults, prints a line for each, and returns the exit code."""
  good, others, start = "SURVIVED" if clean else "caught", [], time.monotonic()
  with tempfile.TemporaryDirectory(prefix="planted-") as parent:
    trials = Trials(pathlib.Path(parent).resolve(), jobs)
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
      running = {pool.submit(trials, fault): fault for fault in faults}
      try:
        for number, future in enumerate(concurrent.futures.as_completed(running), 1):
          fault, outcome = running[future], future.result()
          left = (time.monotonic() - start) / number * (len(faults) - number)
          if outcome.kind != good:
            others.append((outcome.kind, f"{outcome.kind}  {fault.name}  [{outcome.detail}]"))
          word = "passed" if clean and outcome.kind == good else outcome.kind
          print(
            f"{number:>3}/{len(faults)}  {word:<8} {outcome.seconds:>5.1f} s  {fault.name}"
            f"  [{outcome.detail}]  {left / 60:.0f} min left",
            flush=True,
          )
      except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        trials.stop()
        raise
  for _, line in others:
    print(line)
  # A test that hangs sees a fault; of many, the machine is slow and the tests have seen nothing.
  slow = sum(kind == "timeout" for kind, _ in others)
  bad = len(others) - (0 if clean else slow)
  print(
    f"{len(faults) - bad} of {len(faults)} {'passed' if clean else 'caught'}"
    + (f", {slow} of them by the time limit of {LIMIT} s" if slow and not clean else "")
    + f"; {(time.monotonic() - start) / 60:.0f} min"
  )
  return int(bad > 0)


def main() -> int:
  """Reads the command line."""
  parser = argparse.ArgumentParser(prog="python -m tests.planted", description=__doc__)
  parser.add_argument("--only", default="", help="words of a name or a path")
  parser.add_argument("--jobs", type=int, default=2)
  parser.add_argument("--list", action="store_true")
  parser.add_argument("--clean", action="store_true", help="plant nothing")
  args = parser.parse_args()
  faults = [f for f in FAULTS if args.only in f.name or args.only in f.path]
  if not faults:
    parser.error(f"--only={args.only}: no fault has these words in its name or path")
  for fault in faults:
    changed(fault, (ROOT / "moe_jax" / fault.path).read_text())
  if args.clean:  # the same tests once
    faults = list({f.tests: f._replace(name=f.tests, wrong=f.right) for f in faults}.values())
  if args.list:
    print(*(f"{f.path}: {f.name}  [{f.tests}]" for f in faults), sep="\n")
    return 0
  for ends in (signal.SIGINT, signal.SIGTERM):  # a shell's background job begins without Ctrl-C
    signal.signal(ends, signal.default_int_handler)
  try:
    return try_all(faults, args.jobs, args.clean)
  except KeyboardInterrupt:
    return 130


if __name__ == "__main__":
  sys.exit(main())
