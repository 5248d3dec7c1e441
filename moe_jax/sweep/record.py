"""sweep.json: what the sweep is, and how far each run has come."""

import json
import os
import pathlib
import shlex
from typing import Any

from moe_jax import workdir as workdir_lib
from moe_jax.config import UserError
from moe_jax.sweep import plan as plan_lib
from moe_jax.sweep.matching import Measured
from moe_jax.sweep.plan import Plan, Run


def read(out: pathlib.Path) -> dict[str, Any]:
  """{} before there is one."""
  path = out / "sweep.json"
  return json.loads(path.read_text()) if path.exists() else {}


def write(out: pathlib.Path, record: dict[str, Any]) -> None:
  """Whole, or not at all if this process ends on the way."""
  path = out / "sweep.json"
  new = path.with_suffix(".json.new")
  new.write_text(json.dumps(record, indent=2) + "\n")
  os.replace(new, path)


def make(plan: Plan, old: dict[str, Any], measured: Measured) -> dict[str, Any]:
  """The record of `plan`, with what an older one of the same folder knows of its runs.

  Runs that the older one has and the plan leaves out stay, unless the sweep has changed since.
  """
  known = {(r["arm"], r["seed"]): r for r in old.get("runs", [])}
  arms = {a.name: a for a in plan.arms}
  runs = {(r.arm, r.seed): r for r in plan.runs}
  entries = {key: _entry(run, plan.out, known.get(key)) for key, run in runs.items()}
  for (arm, seed), entry in known.items():
    if (arm, seed) in entries or arm not in arms:
      continue
    again = plan_lib.make_run(plan, arms[arm], seed)
    if _options(again.command) == _options(entry["command"]):
      entries[arm, seed] = entry
  order = list(arms)
  at_work = {name: a for name, a in arms.items() if any(name == arm for arm, _ in entries)}
  return {
    "question": plan.question,
    "sweep": plan.path,
    "base": plan.sweep.base,
    "target_arm": plan.sweep.target if plan.sweep.target in at_work else "",
    "published": plan.sweep.published,
    "band": plan.sweep.band,
    "arms": [
      {"name": a.name, "overrides": a.overrides, "notes": a.notes} for a in at_work.values()
    ],
    "runs": sorted(entries.values(), key=lambda e: (order.index(e["arm"]), e["seed"])),
    "measured": measured,
  }


def _entry(run: Run, out: pathlib.Path, known: dict[str, Any] | None) -> dict[str, Any]:
  return {
    "arm": run.arm, "seed": run.seed, "workdir": run.workdir, "command": run.command,
    "evaluate": run.evaluate, "status": "finished" if _is_finished(run, out, known) else "waiting",
    "seconds": known["seconds"] if known else 0.0, "error": "",
  }  # fmt: skip


def _is_finished(run: Run, out: pathlib.Path, known: dict[str, Any] | None) -> bool:
  """Whether the run's workdir holds the evaluation of its last step, made with the same flags.

  If nothing is known of who made it, that was the line of --dry-run.
  """
  evaluated = workdir_lib.read_object(out / run.workdir / workdir_lib.EVAL)
  if evaluated.get("step") != run.config.train.steps:
    return False
  if known and known["status"] != "waiting":
    same = _options(known["evaluate"]) == _options(run.evaluate)
    if known["status"] != "finished" or not same:
      return False
  try:
    workdir_lib.check_same_config(out / run.workdir, run.config)
  except UserError:
    return False  # train.py will refuse it, too, and say why
  return True


def _options(command: str) -> list[str]:
  return [word for word in shlex.split(command) if not word.startswith("--workdir=")]
