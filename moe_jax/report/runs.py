"""Reads workdirs into plain values; the value of a file that a run has not written yet is empty."""

import dataclasses
import itertools
import json
import os
import pathlib
import re
from typing import Any

import numpy as np

from moe_jax import config as config_lib
from moe_jax import workdir as workdir_lib
from moe_jax.config import SEEDS, UserError
from moe_jax.workdir import read_lines, read_object

_TAIL = 20  # lines of log.txt that explain a failure


@dataclasses.dataclass(kw_only=True)
class Run:
  """The files of one workdir. Names in `train` and `validation` lines are without their prefix."""

  name: str
  seed: int
  status: str  # waiting, running, finished, failed, stopped; without a sweep also unfinished
  command: str = ""
  evaluate: str = ""
  seconds: float = 0.0
  error: str = ""
  config: dict[str, Any] = dataclasses.field(default_factory=dict)  # flat: "model.moe.top_k"
  train: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  validation: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  eval: dict[str, Any] = dataclasses.field(default_factory=dict)
  routing: dict[str, Any] = dataclasses.field(default_factory=dict)
  alarms: list[dict[str, Any]] = dataclasses.field(default_factory=list)

  @property
  def step(self) -> int:
    """The newest step that has a line of metrics."""
    return max((line["step"] for line in self.train[-1:] + self.validation[-1:]), default=0)

  def curve(self) -> tuple[np.ndarray, np.ndarray]:
    """Returns steps and validation losses (nats per token, of the language model alone)."""
    steps, losses = series(self.validation, "loss")
    return np.array(steps, float), np.array(losses, float)

  def seconds_at(self, steps: np.ndarray) -> np.ndarray | None:
    """Returns the training time at these steps, linear between log lines; None if not logged."""
    logged, seconds = series(self.train, "seconds")
    return np.interp(steps, [0, *logged], [0, *seconds]) if logged else None

  def layers(self) -> list[int]:
    """Returns the index in the model of each MoE layer, or 0, 1, ... before an evaluation."""
    count = len(next((line["load_ZE"] for line in reversed(self.train) if "load_ZE" in line), []))
    return self.routing.get("layers") or self.eval.get("layers") or list(range(count))


@dataclasses.dataclass(kw_only=True)
class ArmRuns:
  """The runs of one arm, which differ only in their seeds."""

  name: str
  runs: list[Run]
  overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
  notes: list[str] = dataclasses.field(default_factory=list)

  @property
  def finished(self) -> list[Run]:
    """The runs that are finished."""
    return [run for run in self.runs if run.status == "finished"]


@dataclasses.dataclass(kw_only=True)
class Study:
  """The runs that a report compares: those of a sweep, or workdirs that a user named."""

  title: str
  arms: list[ArmRuns]
  question: str = ""
  published: str = ""
  band: str = ""
  sweep: str = ""
  base: str = ""
  target_arm: str = ""

  @property
  def runs(self) -> list[tuple[ArmRuns, Run]]:
    """All runs, each with its arm."""
    return [(arm, run) for arm in self.arms for run in arm.runs]


def series(lines: list[dict[str, Any]], name: str) -> tuple[list[int], list[Any]]:
  """Returns the steps and the values of one metric."""
  points = [(line["step"], line[name]) for line in lines if name in line]
  return [step for step, _ in points], [value for _, value in points]


def read_run(workdir: pathlib.Path, name: str, **fields: Any) -> Run:
  """Reads a workdir; `fields` of Run, from a sweep's record, replace those read from the files."""
  lines = read_lines(workdir / workdir_lib.METRICS)
  stored = read_object(workdir / workdir_lib.CONFIG)
  config = flat(config_lib.upgraded(stored))
  evaluated = read_object(workdir / workdir_lib.EVAL)
  if "format" not in stored:  # as config_lib.upgraded does
    for point in evaluated.get("capacity", []):
      point["capacity_factor"] = point["capacity_factor"] or "inf"
  run = Run(
    name=name,
    seed=config.get("train.seed", 0),
    status="",
    config=config,
    train=_with_prefix(lines, "train/"),
    validation=_with_prefix(lines, "validation/"),
    eval=evaluated,
    routing=read_object(workdir / workdir_lib.ROUTING),
    alarms=read_lines(workdir / workdir_lib.ALARMS),
  )
  run = dataclasses.replace(run, **fields)
  if not run.status:
    done = run.step >= config.get("train.steps", 1 << 62) and run.validation
    run.status = "finished" if done else "unfinished"
  if run.status in ("failed", "stopped", "unfinished") and not run.error:
    run.error = log_tail(workdir)
  return run


def read_sweep(out: pathlib.Path) -> Study:
  """Reads the study of a folder that sweep.py made.

  Raises:
    UserError: the folder has no sweep.json with arms.
  """
  sweep = read_object(out / "sweep.json")
  if not sweep.get("arms"):
    raise UserError(f"{out}: no sweep.json with arms there; name a sweep's --out, or its workdirs")
  runs: dict[str, list[Run]] = {}
  recorded = ("seed", "command", "evaluate", "status", "seconds", "error")
  for entry in sweep.get("runs", []):
    fields = {name: entry[name] for name in recorded if entry.get(name) is not None}
    run = read_run(out / entry["workdir"], entry["workdir"], **fields)
    runs.setdefault(entry["arm"], []).append(run)
  arms = [
    ArmRuns(
      name=arm["name"], runs=runs.get(arm["name"], []), overrides=arm.get("overrides") or {},
      notes=list(arm.get("notes") or []),
    )
    for arm in sweep["arms"]
  ]  # fmt: skip
  texts = ("question", "published", "band", "sweep", "base", "target_arm")
  return Study(
    title=pathlib.Path(sweep.get("sweep") or out.resolve().name).stem, arms=arms,
    **{name: sweep.get(name) or "" for name in texts},
  )  # fmt: skip


def read_workdirs(workdirs: list[pathlib.Path], target_arm: str = "") -> Study:
  """Reads a study of any workdirs; workdirs that differ only in their seeds are one arm.

  Raises:
    UserError: a folder is no workdir, or there is no such target arm.
  """
  for path in workdirs:
    if not (path / workdir_lib.CONFIG).is_file():
      raise UserError(f"{path}: neither a run (config.json) nor a sweep (sweep.json) is there")
  paths = list(dict.fromkeys(path.resolve() for path in workdirs))
  root = parent(paths)
  groups: dict[str, list[Run]] = {}
  for path in paths:
    run = read_run(path, path.relative_to(root).as_posix())
    settings = {name: value for name, value in run.config.items() if name not in SEEDS}
    groups.setdefault(json.dumps(settings, sort_keys=True), []).append(run)
  arms: dict[str, ArmRuns] = {}
  for runs in groups.values():
    name = common_name([run.name for run in runs])
    name = f"{name} ({runs[0].name})" if name in arms else name
    arms[name] = ArmRuns(name=name, runs=sorted(runs, key=lambda run: run.seed))
  if target_arm and target_arm not in arms:
    raise UserError(f"--target={target_arm}: no such arm; there are: {', '.join(arms)}")
  return Study(title=root.name, arms=list(arms.values()), target_arm=target_arm)


def parent(paths: list[pathlib.Path]) -> pathlib.Path:
  """Returns the deepest folder that contains all of these workdirs."""
  return pathlib.Path(os.path.commonpath([path.resolve().parent for path in paths]))


def common_name(names: list[str]) -> str:
  """Returns what names have in common: 'dense-s0', 'dense-s1' -> 'dense'; one name is returned."""
  if len(names) == 1:
    return names[0]
  same = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
  prefix = "".join(letters[0] for letters in same)
  return re.sub(r"[/_.-]+(seed|s)?[=_-]?\d*$", "", prefix) or names[0]


def log_tail(workdir: pathlib.Path) -> str:
  """Returns the last lines of the run's log.txt, or '' if there is none."""
  path = workdir / workdir_lib.LOG
  if not path.is_file():
    return ""
  return "\n".join(path.read_text(errors="replace").splitlines()[-_TAIL:])


def flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  """Flattens nested dicts: {'model': {'dim': 8}} -> {'model.dim': 8}."""
  fields: dict[str, Any] = {}
  for name, value in nested.items():
    fields |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
  return fields


def _with_prefix(lines: list[dict[str, Any]], prefix: str) -> list[dict[str, Any]]:
  """Returns the lines that have metrics of this prefix, with the prefix removed."""
  result = []
  for line in lines:
    values = {name.removeprefix(prefix): v for name, v in line.items() if name.startswith(prefix)}
    if values:
      result.append({"step": line["step"], **values})
  return result
