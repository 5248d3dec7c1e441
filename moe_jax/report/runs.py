"""Reads workdirs into plain values; the value of a file that a run has not written yet is empty."""

import dataclasses
import itertools
import json
import os
import pathlib
import re
from typing import Any

import numpy as np

from moe_jax.config.run import SEEDS
from moe_jax.errors import DamagedError, UserError
from moe_jax.report import reading
from moe_jax.storage import workdir as workdir_lib

Curve = tuple[np.ndarray, np.ndarray]  # x and y
_EXPERTS = "model.moe.num_experts"
_NO_ARM = "(of no arm)"  # the arm of runs whose entry in sweep.json names none


@dataclasses.dataclass(kw_only=True)
class Run:
  """The files of one workdir. Names in `train` and `validation` lines are without their prefix."""

  name: str
  seed: int
  # waiting, running, finished, failed, stopped, damaged; without a sweep also unfinished
  status: str
  command: str = ""
  evaluate: str = ""
  error: str = ""
  config: dict[str, Any] = dataclasses.field(default_factory=dict)  # flat: "model.moe.top_k"
  train: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  validation: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  eval: dict[str, Any] = dataclasses.field(default_factory=dict)
  routing: dict[str, Any] = dataclasses.field(default_factory=dict)
  alarms: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  sizes: dict[str, int] = dataclasses.field(default_factory=dict)  # by letter of its arrays

  @property
  def step(self) -> int:
    """The newest step that has a line of metrics."""
    return max((line["step"] for line in self.train[-1:] + self.validation[-1:]), default=0)

  def curve(self) -> Curve:
    """Returns steps and validation losses (nats per token, of the language model alone)."""
    return series(self.validation, "loss")

  def seconds_at(self, steps: np.ndarray) -> np.ndarray | None:
    """Returns the training time at these steps, linear between log lines; None if not logged."""
    logged, seconds = series(self.train, "seconds")
    return np.interp(steps, [0, *logged], [0, *seconds]) if len(logged) else None

  def layers(self) -> list[int]:
    """Returns the index in the model of each MoE layer, or 0, 1, ... before an evaluation."""
    count = len(next((line["load_ZE"] for line in reversed(self.train) if "load_ZE" in line), []))
    return self.routing.get("layers") or self.eval.get("layers") or list(range(count))


@dataclasses.dataclass(kw_only=True, eq=False)
class ArmRuns:
  """The runs of one arm, which differ only in their seeds."""

  name: str
  runs: list[Run]
  notes: list[str] = dataclasses.field(default_factory=list)
  overrides: dict[str, Any] = dataclasses.field(default_factory=dict)  # of a sweep's base
  colour: int = 0  # its place in the study

  def __str__(self) -> str:
    return self.name

  @property
  def finished(self) -> list[Run]:
    """The runs that are usable: finished, and not damaged."""
    return [run for run in self.runs if run.status == "finished"]

  @property
  def drawn(self) -> list[Run]:
    """The runs of its curves: finished runs if any, since a failed one ends the mean."""
    return self.finished or [run for run in self.runs if run.train or run.validation]

  @property
  def is_dense(self) -> bool:
    """Whether it is known that the model has no experts."""
    known = [*(run.config for run in self.runs), self.overrides]
    return next((c[_EXPERTS] for c in known if _EXPERTS in c), None) == 0


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

  def __post_init__(self) -> None:
    for colour, arm in enumerate(self.arms):
      arm.colour = colour

  @property
  def last_step(self) -> float:
    """The newest step of any run."""
    return max((float(run.step) for _, run in self.runs), default=0.0)

  @property
  def runs(self) -> list[tuple[ArmRuns, Run]]:
    """All runs, each with its arm."""
    return [(arm, run) for arm in self.arms for run in arm.runs]

  @property
  def domains(self) -> list[str]:
    """The labelled domains of all evaluations."""
    return list(dict.fromkeys(d for _, run in self.runs for d in run.eval.get("domains", {})))

  @property
  def no_target(self) -> str:
    """Says that the target arm has no usable run; '' if it has one, or if there is no target."""
    said = f"The target arm, {self.target_arm}, has no usable run: no arm is compared with it."
    return "" if self.target_arm in ("", *(a.name for a in self.arms if a.finished)) else said


def series(lines: list[dict[str, Any]], name: str) -> Curve:
  """Returns the steps and the values of one metric, of any shape."""
  points = [(line["step"], line[name]) for line in lines if name in line]
  return np.array([x for x, _ in points], float), np.array([y for _, y in points], float)


def read_run(
  workdir: pathlib.Path, name: str, *, root: pathlib.Path | None = None, **fields: Any
) -> Run:
  """Reads a workdir; a damaged one is a run of that status, whose error says why.

  No file may lead out of `root`, by default the workdir. `fields` of Run, from a sweep's record,
  replace those read from the files.
  """
  root, sizes = root or workdir, dict[str, int]()
  run = Run(name=name, seed=0, status="")
  try:
    run.config = reading.read_run_files(workdir / workdir_lib.CONFIG, root, {})
    run.seed = run.config.get("train.seed", 0)
    metrics = reading.read_lines(workdir / workdir_lib.METRICS, root, sizes)
    run = dataclasses.replace(
      run,
      train=_with_prefix(metrics, "train/"),
      validation=_with_prefix(metrics, "validation/"),
      alarms=reading.read_lines(workdir / workdir_lib.ALARMS, root, sizes),
      eval=reading.read_run_files(workdir / workdir_lib.EVAL, root, sizes),
      routing=reading.read_run_files(workdir / workdir_lib.ROUTING, root, sizes),
      sizes=sizes,
    )
  except DamagedError as error:
    fields |= {"status": "damaged", "error": str(error)}
  run = dataclasses.replace(run, **fields)
  if not run.status:
    done = run.step >= run.config.get("train.steps", 1 << 62) and run.validation
    weights = run.eval and not metrics  # imported or upcycled: never to be trained here
    run.status = "finished" if done or weights else "unfinished"
  if run.status in ("failed", "stopped", "unfinished") and not run.error:
    run.error = reading.log_tail(workdir, root)
  return run


def read_sweep(out: pathlib.Path) -> Study:
  """Reads the study of a folder of sweep.py; raises a UserError where sweep.json has no arms."""
  sweep = reading.read_run_files(out / reading.SWEEP, out, {})
  if not sweep.get("arms"):
    raise UserError(f"{out}: no sweep.json with arms there; name a sweep's --out, or its workdirs")
  arms = {arm["name"]: ArmRuns(runs=[], **arm) for arm in sweep["arms"]}
  for number, entry in enumerate(sweep["runs"]):
    try:
      fields = reading.read_entry(out, number, entry)
      del fields["arm"], fields["seconds"]
      place = fields.pop("workdir")
      run = read_run(out / place, place, root=out, **fields)
    except DamagedError as error:
      run = Run(name=f"runs[{number}]", seed=0, status="damaged", error=str(error))
    name = next((n for n in arms if isinstance(entry, dict) and entry.get("arm") == n), _NO_ARM)
    arms.setdefault(name, ArmRuns(name=name, runs=[])).runs.append(run)
  title = pathlib.PurePath(sweep["sweep"] or out.resolve().name).stem
  texts = {name: sweep[name] for name in reading.TEXTS}
  return _checked(Study(title=title, arms=list(arms.values()), **texts))


def read_workdirs(workdirs: list[pathlib.Path], target_arm: str = "") -> Study:
  """Reads a study of any workdirs; workdirs that differ only in their seeds are one arm.

  Raises a UserError where a folder is no workdir, or there is no such target arm.
  """
  for path in workdirs:
    if not os.path.lexists(path / workdir_lib.CONFIG):
      raise UserError(f"{path}: neither a run (config.json) nor a sweep (sweep.json) is there")
  paths = list(dict.fromkeys(path.resolve() for path in workdirs))
  root = parent(paths)
  groups: dict[str, list[Run]] = {}
  for path in paths:
    run = read_run(path, path.relative_to(root).as_posix())
    settings = {name: value for name, value in run.config.items() if name not in SEEDS}
    key = json.dumps(settings, sort_keys=True) if settings else str(path)
    groups.setdefault(key, []).append(run)
  arms: dict[str, ArmRuns] = {}
  for runs in groups.values():
    name = common_name([run.name for run in runs])
    name = f"{name} ({runs[0].name})" if name in arms else name
    arms[name] = ArmRuns(name=name, runs=sorted(runs, key=lambda run: run.seed))
  if target_arm and target_arm not in arms:
    raise UserError(f"--target={target_arm}: no such arm; there are: {', '.join(arms)}")
  return _checked(Study(title=root.name, arms=list(arms.values()), target_arm=target_arm))


def _checked(study: Study) -> Study:
  """Leaves out the runs with other layers or experts than the runs of their arm before them."""
  for arm in study.arms:
    shared: dict[str, int] = {}
    for i, run in enumerate(arm.runs):
      own = {letter: size for letter, size in run.sizes.items() if letter in "ZE"}
      if any(shared.get(letter, size) != size for letter, size in own.items()):
        error = f"{run.name} has other layers or experts than the other runs of its arm"
        arm.runs[i] = Run(name=run.name, seed=run.seed, status="damaged", error=error)
      shared = own | shared
  return study


def parent(paths: list[pathlib.Path]) -> pathlib.Path:
  """Returns the deepest folder that contains all of these workdirs."""
  return pathlib.Path(os.path.commonpath([path.resolve().parent for path in paths]))


def common_name(names: list[str]) -> str:
  """Returns what names have in common: 'dense-s0', 'dense-s1' -> 'dense'; one name is returned."""
  if len(names) == 1:
    return names[0]
  same = itertools.takewhile(lambda letters: len({*letters}) == 1, zip(*names, strict=False))
  prefix = "".join(letters[0] for letters in same)
  return re.sub(r"[/_.-]+(seed|s)?[=_-]?\d*$", "", prefix) or names[0]


def _with_prefix(lines: list[dict[str, Any]], prefix: str) -> list[dict[str, Any]]:
  """Returns the lines that have metrics of this prefix, with the prefix removed."""
  return [
    {"step": line["step"], **{name.removeprefix(prefix): line[name] for name in names}}
    for line in lines
    if (names := [name for name in line if name.startswith(prefix)])
  ]
