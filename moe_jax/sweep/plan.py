"""Expands a Sweep into its runs: each arm's config, which is checked, and each run's commands."""

import difflib
import pathlib
import shlex
from collections.abc import Sequence
from typing import Any, NamedTuple

from moe_jax.config import Config
from moe_jax.config.fields import LARGEST_SEED, spelled
from moe_jax.config.run import SEEDS, changes, override, to_json
from moe_jax.errors import UserError
from moe_jax.moe import validation
from moe_jax.start import command_line
from moe_jax.sweep import language, matching
from moe_jax.sweep.language import Arm, Sweep, Transform

_FLAGS_OF_EXPERTS = ("--routing", "--capacity_factors")  # eval.py refuses them for a dense model


class PlannedArm(NamedTuple):
  """An arm whose config is made and checked."""

  name: str
  overrides: dict[str, Any]  # {field: value} where it differs from the base, without the seeds
  notes: list[str]
  config: Config


class PlannedRun(NamedTuple):
  """One arm with one seed."""

  arm: str
  seed: int
  workdir: str  # relative to the sweep's folder
  command: str  # a shell's command line that trains
  evaluate: str  # a shell's command line that evaluates
  config: Config


class Plan(NamedTuple):
  """All runs of a sweep."""

  question: str
  path: str  # of the sweep file
  sweep: Sweep
  base: Config
  out: pathlib.Path  # folder of the runs
  arms: list[PlannedArm]  # all arms of the sweep
  runs: list[PlannedRun]  # of the selected arms and seeds


def make_plan(
  path: str,
  out: pathlib.Path,
  *,
  arms: Sequence[str] = (),
  seeds: Sequence[int] = (),
  overrides: dict[str, Any],
) -> Plan:
  """Expands and checks every arm and seed of a sweep file.

  Args:
    arms: names of the arms to run; () for all.
    seeds: seeds to run; () for the sweep's.
    overrides: fields for every arm, which replace the arms' own and are set before any match.

  Raises:
    UserError: an arm is no valid config or equals another arm, or there is no arm of a given name.
  """
  question, sweep = language.load_sweep(path)
  names = [a.name for a in sweep.arms]
  _check_sweep(path, sweep, names, seeds)
  for name in arms:
    _check_name(f"--arms={name}", name, names)
  base = command_line.load_file(sweep.base)
  validation.validate(base)  # before comparisons, because train.py compares validated configs
  planned = [_planned(path, a, base, overrides) for a in sweep.arms]
  same: dict[str, str] = {}
  for a in planned:
    first = same.setdefault(to_json(a.config), a.name)
    if first != a.name:
      raise UserError(f"{path}: the arms {first} and {a.name} are the same config; drop one")
  plan = Plan(question=question, path=path, sweep=sweep, base=base, out=out, arms=planned, runs=[])
  chosen = [a for a in planned if a.name in (arms or names)]
  return plan._replace(runs=[make_run(plan, a, s) for a in chosen for s in seeds or sweep.seeds])


def _check_sweep(path: str, sweep: Sweep, names: list[str], seeds: Sequence[int]) -> None:
  if not names:
    raise UserError(f"{path}: arms is empty; a sweep needs at least one")
  if twice := [name for name in names if names.count(name) > 1]:
    raise UserError(f"{path}: two arms are called {twice[0]}; rename one")
  if sweep.target:
    _check_name(f"{path}: target={sweep.target}", sweep.target, names)
  for numbers in (sweep.seeds, seeds):
    known = all(type(seed) is int and 0 <= seed <= LARGEST_SEED for seed in numbers)
    if not known or len(set(numbers)) < len(numbers) or not sweep.seeds:
      raise UserError(
        f"{path}: seeds={tuple(numbers)} must be different integers from 0 to {LARGEST_SEED}"
      )


def _check_name(what: str, name: str, names: list[str]) -> None:
  if name not in names:
    near = difflib.get_close_matches(name, names, 1)
    choices = f"the nearest is {near[0]}" if near else f"there are {', '.join(names)}"
    raise UserError(f"{what}: no arm has that name; {choices}")


def _planned(path: str, a: Arm, base: Config, overrides: dict[str, Any]) -> PlannedArm:
  where, notes = f"{path}: arm {a.name}", list(a.notes)
  if seeded := [name for name in SEEDS if name in a.fields]:
    raise UserError(f"{where}: the sweep sets config.{seeded[0]}; use its seeds")
  config = override(base, a.fields | overrides, where)
  try:
    validation.validate(config)
    for transform in a.transforms:
      if isinstance(transform, matching.Match):
        config, note = transform.solve(config)
        notes.append(note)
      else:
        config = _transformed(transform, config)
    validation.validate(config)
  except UserError as error:
    raise UserError(f"{where}: {error}") from None
  return PlannedArm(a.name, changes(base, config), [*notes, matching.sizes(config)], config)


def _transformed(transform: Transform, config: Config) -> Config:
  try:
    changed = transform(config)
  except UserError:
    raise
  except Exception as error:  # a function of the user's
    raise UserError(f"its transform ended with {type(error).__name__}: {error}") from None
  if not isinstance(changed, Config):
    raise UserError(f"its transform returned {changed!r}, not a Config")
  return changed


def make_run(plan: Plan, a: PlannedArm, seed: int) -> PlannedRun:
  """Returns the run of an arm with a seed, and its command lines."""
  config = override(a.config, dict.fromkeys(SEEDS, seed), a.name)
  workdir = f"{a.name}/seed{seed}"
  where = f"--workdir={plan.out / workdir}"
  fields = command_line.words(plan.base, config)
  train = ["python", "train.py", f"--config={plan.sweep.base}", *fields, where]
  flags = plan.sweep.evaluate
  if not config.model.moe.num_experts:
    flags = [flag for flag in flags if flag.partition("=")[0] not in _FLAGS_OF_EXPERTS]
  evaluate = ["python", "eval.py", where, *flags]
  return PlannedRun(a.name, seed, workdir, shlex.join(train), shlex.join(evaluate), config)


def describe_plan(plan: Plan) -> str:
  """Describes the plan for people: the question, the arms and their sizes."""
  selected = {run.arm for run in plan.runs}
  seeds = ", ".join(dict.fromkeys(str(run.seed) for run in plan.runs))
  count = f"{len(plan.runs)} runs, {len(selected)} arms with seeds {seeds}, on {plan.sweep.base}"
  lines = [*plan.question.splitlines(), "", f"{plan.path}: {count}"]
  for a in plan.arms:
    if a.name in selected:
      changed = " ".join(f"{name}={spelled(value)}" for name, value in a.overrides.items())
      lines += [f"{a.name}: {changed or 'the base'}", *(f"    {note}" for note in a.notes)]
  return "\n".join(lines)


def dry_run(plan: Plan, flags: str = "", of_training: str = "") -> str:
  """Returns `describe_plan` as comments, then both commands of each run, which end with `flags`."""
  comments = [f"# {line}".rstrip() for line in describe_plan(plan).splitlines()]
  commands = (f"{run.command}{of_training}{flags} && {run.evaluate}{flags}" for run in plan.runs)
  return "\n".join([*comments, *commands])
