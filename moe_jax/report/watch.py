"""One line for each run below some folders: what it does now. Imports neither jax nor NumPy."""

import functools
import os
import pathlib
import re
import shutil
import sys
import time
from typing import Any

from moe_jax.errors import DamagedError, UserError, shown
from moe_jax.report import reading
from moe_jax.start.progress import clock
from moe_jax.storage import files, lock
from moe_jax.storage import workdir as workdir_lib

# In the order of the table: what somebody has to look at comes first.
_STATES = ("damaged", "hangs", "alarm", "error", "stopped", "trains", "evaluates", "starts",
           "waits", "ended", "weights")  # fmt: skip
_HEAD = ["run", "state", "step", "loss", "validation", "steps/s", "ETA", "silent for"]
_EVERY = 3.0  # seconds between two looks
_MOST = 1 << 23  # bytes of metrics.jsonl that are searched, from its end
_METRICS = ("step", "train/loss", "validation/loss", "train/steps_per_s")

Found = dict[str, Any] | UserError  # a run's entry in sweep.json, or what is wrong with that


def watch(folders: list[str]) -> None:
  """Prints the table of the runs: once, or in a terminal again and again."""
  paths = [pathlib.Path(folder).resolve() for folder in folders]
  if missing := [name for name, path in zip(folders, paths, strict=True) if not path.is_dir()]:
    raise UserError(f"{missing[0]}: no folder on this machine; name one that has runs below it")
  root = pathlib.Path(os.path.commonpath(paths))
  while True:
    runs = {path: entry for folder in paths for path, entry in _find(folder).items()}
    rows = [
      [shown(str(path.relative_to(root)) if path != root else root.name), *_cells(path, entry)]
      for path, entry in runs.items()
    ]
    rows.sort(key=lambda cells: (_STATES.index(cells[1]), cells[0]))
    if not sys.stdout.isatty():
      return print("\n".join(_table(rows, 1 << 20, 1 << 20)))
    print("\x1b[H\x1b[J" + "\n".join(_table(rows, *shutil.get_terminal_size())), flush=True)
    time.sleep(_EVERY)


def _find(folder: pathlib.Path) -> dict[pathlib.Path, Found]:
  """Returns the workdirs below a folder, with those that a sweep has not begun yet."""
  runs: dict[pathlib.Path, Found] = {}
  for name, inner, names in os.walk(folder):
    here = pathlib.Path(name)
    if reading.SWEEP in names:
      try:
        entries = reading.read_run_files(here / reading.SWEEP, here, {})["runs"]
        read = [reading.read_entry(here, number, entry) for number, entry in enumerate(entries)]
        runs |= {here / entry["workdir"]: entry for entry in read}
      except UserError as error:
        runs[here / reading.SWEEP] = error
    if workdir_lib.CONFIG in names or workdir_lib.LOCK in names:
      runs.setdefault(here, {})
      inner.clear()  # no run is in another one
  return runs


def _table(rows: list[list[str]], width: int, height: int) -> list[str]:
  """Returns the lines of the table, as many and as much of each as fits."""
  table = [_HEAD, *rows[: height - 3]]
  widths = [max(len(row[i]) for row in table if i < 3 or len(row) > 4) for i in range(len(_HEAD))]
  widths[0] = min(widths[0], max(12, width - sum(widths[1:]) - 2 * len(widths)))
  parts = [[row[0][-widths[0] :], *row[1:]] for row in table]
  lines = ["  ".join(map(str.ljust, row, widths)).rstrip()[: width - 1] for row in parts]
  return lines + ([f"and {len(rows) - height + 3} more"] if len(rows) > height - 3 else [])


def _cells(workdir: pathlib.Path, entry: Found) -> list[str]:
  """Returns the cells of a run after its name; a text in place of the numbers ends the line."""
  try:
    if isinstance(entry, UserError):
      raise entry
    return _state(workdir, entry, lock.owner_lives(workdir))
  except (UserError, OSError, LookupError, TypeError, ValueError) as error:  # of damaged files
    return ["damaged", "", shown(str(error))]


def _state(workdir: pathlib.Path, entry: dict[str, Any], alive: bool) -> list[str]:
  config = reading.read_run_files(workdir / workdir_lib.CONFIG, workdir, {})
  if not config:
    return ["starts" if alive else "waits", *[""] * 6]
  began = (workdir / workdir_lib.CONFIG).stat().st_mtime  # each start writes it
  path, newest, wrote = workdir / workdir_lib.METRICS, dict[str, float](), 0.0
  if path.is_file():
    newest = _newest(path, path.stat().st_size, wrote := path.stat().st_mtime)
  folder, saved = workdir / workdir_lib.CHECKPOINTS, workdir_lib.saved_steps(workdir)
  before = [s for s in saved if (folder / str(s)).stat().st_mtime < began]
  step, steps = int(newest.get("step", 0)), config["train.steps"]
  speed, why = newest.get("train/steps_per_s", 0.0), ""
  # The folder's own time is that of a start, a save or an end, which make or replace files.
  silent = max(0.0, time.time() - max(workdir.stat().st_mtime, wrote))
  # A start takes away the lines after its checkpoint, and writes one of the step that follows it.
  if alive and (wrote <= began or step <= max(before, default=0)):
    state = "starts"
  elif alive:
    pace = config.get("train.log_every", 1) / speed if speed else wrote - began
    due = step == steps or 0 in (step % config[f"train.{n}_every"] for n in ("eval", "checkpoint"))
    state = "evaluates" if due and not newest["evaluated"] else "trains"
    longest = due * config.get("train.step_timeout", 0)  # where it may evaluate or save
    limit = max(120, 10 * pace, longest)
    state = "hangs" if silent > limit else state
  elif entry.get("status") != "failed" and (steps in saved or 0 in saved):  # 0: of an import
    state = "ended" if steps in saved else "weights"
  elif why := _alarm(workdir, config, step):
    state = "alarm"
  else:
    lines = (entry.get("error") or reading.log_tail(workdir, workdir)).strip().splitlines()
    why = next((x for x in reversed(lines) if not x.startswith(reading.LAUNCH)), "")
    killed = (workdir / workdir_lib.LOCK).exists()
    state = "stopped" if newest or saved or killed else "waits"
    state = "error" if why.startswith("error: ") or entry.get("status") == "failed" else state
  if state in ("alarm", "error"):
    return [state, f"{step}/{steps}", shown(why)]
  losses = [f"{newest[name]:.4f}" if name in newest else "" for name in _METRICS[1:3]]
  eta = clock((steps - step) / speed) if speed and state in ("trains", "evaluates") else ""
  last = clock(silent) if state != "waits" else ""
  return [state, f"{step}/{steps}", *losses, f"{speed:.3g}" if speed else "", eta, last]


def _alarm(workdir: pathlib.Path, config: dict[str, Any], step: int) -> str:
  """Returns what the alarm says that has ended a run after this step; '' if none has."""
  for alarm in files.read_lines(workdir / workdir_lib.ALARMS)[0][-1:]:
    field = "on_nonfinite" if alarm["alarm"] == "nonfinite" else "on_alarm"
    ends = config[f"health.{field}"] in ("stop", "rewind")  # one that was rewound has another line
    return alarm["message"] if ends and alarm["step"] > step else ""
  return ""


@functools.lru_cache(1 << 12)
def _newest(path: pathlib.Path, size: int, changed: float) -> dict[str, float]:
  """Returns the newest numbers of a metrics.jsonl of this size and time.

  A line may have 100 kB, so no more of them is read than has these numbers.
  """
  length = 1 << 16
  with path.open("rb") as file:
    while True:
      file.seek(max(0, size - length))
      text = file.read(min(size, length))
      text = text[: text.rfind(b"\n") + 1]  # what follows is being written
      at = {name: text.rfind(f'"{name}": '.encode()) for name in _METRICS}
      if min(at.values()) >= 0 or length >= min(size, _MOST):
        break
      length *= 4
  if text and not (text.endswith(b"}\n") and text.rfind(b"\n", 0, -1) + 2 == at["step"]):
    raise DamagedError(f"{path} is damaged: its last line has no step")
  there = {name: text[start + len(name) + 4 :][:40] for name, start in at.items() if start >= 0}
  numbers = {name: float(re.split(b"[,}]", number)[0]) for name, number in there.items()}
  return numbers | {"evaluated": at["validation/loss"] > at["step"]} if text else {}
