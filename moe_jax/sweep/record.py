"""sweep.json: the sweep, and the state of each of its runs."""

import pathlib
import shlex
from typing import Any

from moe_jax.errors import DamagedError, UserError
from moe_jax.moe import validation
from moe_jax.report.reading import SWEEP, SWEEP_FORMAT, read_entry, read_run_files
from moe_jax.storage import workdir as workdir_lib
from moe_jax.sweep import plan as plan_lib
from moe_jax.sweep.plan import Plan, PlannedRun


def read_record(out: pathlib.Path) -> dict[str, Any]:
  """Returns the record in a sweep's folder, {} for none; raises a DamagedError for any other."""
  record = read_run_files(out / SWEEP, out, {})
  for number, entry in enumerate(record.get("runs", [])):
    read_entry(out, number, entry)
  return record


def make_record(plan: Plan, old: dict[str, Any]) -> dict[str, Any]:
  """Returns the record of `plan`, in which the old record of the folder gives the runs' states.

  Runs that are only in the old record, {} for none, are kept unless their commands have changed.
  """
  if old and old["runs"] and not {r["arm"] for r in old["runs"]} & {a.name for a in plan.arms}:
    raise UserError(
      f"--out={plan.out} holds another sweep, of {old.get('sweep')}, which has none of these arms; "
      "name another folder"
    )
  old_entries = {(r["arm"], r["seed"]): r for r in old.get("runs", [])}
  arms = {a.name: a for a in plan.arms}
  runs = {(r.arm, r.seed): r for r in plan.runs}
  entries = {key: _entry(run, plan.out, old_entries.get(key)) for key, run in runs.items()}
  for (arm, seed), entry in old_entries.items():
    if (arm, seed) in entries or arm not in arms:
      continue
    again = plan_lib.make_run(plan, arms[arm], seed)
    if _options(again.command) == _options(entry["command"]):
      # Made again like those that will run, since the file may come from somewhere else.
      made = {"workdir": again.workdir, "command": again.command}
      entries[arm, seed] = entry | made
  with_runs = {name: a for name, a in arms.items() if any(name == arm for arm, _ in entries)}
  return {
    "format": SWEEP_FORMAT,
    "question": plan.question,
    "sweep": plan.path,
    "base": plan.sweep.base,
    "target_arm": plan.sweep.target if plan.sweep.target in with_runs else "",
    "published": plan.sweep.published,
    "band": plan.sweep.band,
    "arms": [
      {"name": a.name, "overrides": a.overrides, "notes": a.notes} for a in with_runs.values()
    ],
    "runs": sorted(entries.values(), key=lambda e: ([*arms].index(e["arm"]), e["seed"])),
  }


def _entry(run: PlannedRun, out: pathlib.Path, old: dict[str, Any] | None) -> dict[str, Any]:
  fields = {name: value for name, value in run._asdict().items() if name != "config"}
  return fields | {
    "status": "finished" if _is_finished(run, out, old) else "waiting",
    "seconds": old["seconds"] if old else 0.0,
    "error": "",
  }


def _is_finished(run: PlannedRun, out: pathlib.Path, old: dict[str, Any] | None) -> bool:
  """Returns whether the workdir has an evaluation of the last step, made with the same flags.

  Without an old entry, the evaluation was made by the command that --dry-run prints.
  """
  try:
    evaluated = workdir_lib.read_object(out / run.workdir / workdir_lib.EVAL)
  except DamagedError:
    return False  # eval.py writes it again
  if evaluated.get("step") != run.config.train.steps:
    return False
  if old:
    same = _options(old["evaluate"]) == _options(run.evaluate)
    if old["status"] not in ("waiting", "finished") or not same:
      return False
  try:
    before = workdir_lib.stored_config(out / run.workdir)
    validation.check_same_config(out / run.workdir, before, run.config)
  except UserError:
    return False  # train.py will refuse the workdir too, and explain why
  return True


def _options(command: str) -> list[str]:
  return [word for word in shlex.split(command) if not word.startswith("--workdir=")]
