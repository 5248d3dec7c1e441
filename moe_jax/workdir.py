"""The files of a run: their names, how they are read and written, and what may go on in them.

Nothing here imports jax: a report reads a run on a machine without it.
"""

import json
import pathlib
from typing import Any

from moe_jax import config as config_lib
from moe_jax.config import Config, UserError

CONFIG = "config.json"  # the resolved config
DATA = "data.json"  # {split: digest of its token stream}
KERNELS = "kernels.json"  # {operation: the implementation that was chosen at the start}
METRICS = "metrics.jsonl"  # a line for each logged step
ALARMS = "alarms.jsonl"
EVAL = "eval.json"  # of eval.py
ROUTING = "routing.json"  # the same, with --routing
CHECKPOINTS = "checkpoints"  # a folder for each step, named by it
TENSORBOARD = "tensorboard"
LOG = "log.txt"  # what a sweep's run has said

# What may differ when a run goes on: where it runs, how long, and what is watched.
_MAY_CHANGE = (
  "mesh.", "eval.", "train.steps", "train.log_every", "train.eval_every", "train.checkpoint_every",
  "train.keep_", "data.threads", "data.cache_dir",
)  # fmt: skip


def read_config(workdir: pathlib.Path) -> Config:
  """The validated config of a run; UserError where there is none."""
  from moe_jax import validation  # not at the top: a report needs none

  path = workdir / CONFIG
  if not path.is_file():
    raise UserError(
      f"--workdir={workdir}: no {CONFIG} there, so no run; train one first with train.py"
    )
  config = config_lib.from_json(path.read_text())
  validation.validate(config)
  return config


def write_config(workdir: pathlib.Path, config: Config) -> None:
  (workdir / CONFIG).write_text(config_lib.to_json(config) + "\n")


def check_same_config(workdir: pathlib.Path, config: Config) -> None:
  """Refuses to go on with a run under a config that would make it another run."""
  if not (workdir / CONFIG).exists():
    return
  from moe_jax import validation

  stored = config_lib.from_json((workdir / CONFIG).read_text())
  old, new = config_lib.flatten(stored), config_lib.flatten(config)
  idle = validation.without_effect(stored) & validation.without_effect(config)
  changed = [n for n in new if new[n] != old[n] and n not in idle and not n.startswith(_MAY_CHANGE)]
  if changed:
    what = ", ".join(f"config.{n}={new[n]} (was {old[n]})" for n in changed)
    raise UserError(
      f"--workdir={workdir} holds a run with another config: {what}; name a new workdir, or drop "
      "the change to go on with that run"
    )


def check_same_data(workdir: pathlib.Path, digests: dict[str, str]) -> None:
  """Refuses text other than the run's own: another Python's standard library, changed files.

  Args:
    workdir: of the run; its data.json has the digests that it was started with.
    digests: {split: digest of its token stream}.
  """
  recorded = json.loads((workdir / DATA).read_text()) if (workdir / DATA).exists() else {}
  changed = [split for split, digest in digests.items() if recorded.get(split, digest) != digest]
  if changed:
    raise UserError(
      f"--workdir={workdir}: the {' and '.join(changed)} text is not the one this run was trained "
      "with (another Python version, or changed files?); use the same text, or a new workdir"
    )


def read_kernels(workdir: pathlib.Path) -> dict[str, Any]:
  """The implementations that the run was started with; {} before they were chosen."""
  return read_object(workdir / KERNELS)


def write_kernels(workdir: pathlib.Path, chosen: dict[str, Any]) -> None:
  write_object(workdir / KERNELS, chosen)


def is_trained(workdir: pathlib.Path, steps: int) -> bool:
  """Whether the checkpoint of the last step is there; Orbax names its folder when it is whole."""
  return (workdir / CHECKPOINTS / str(steps)).is_dir()


def read_object(path: pathlib.Path) -> dict[str, Any]:
  """A .json file's object; {} where it is missing or half written."""
  try:
    value = json.loads(path.read_text())
  except (OSError, ValueError):
    return {}
  return value if isinstance(value, dict) else {}


def write_object(
  path: pathlib.Path, values: dict[str, Any], indent: int | None = 2
) -> dict[str, Any]:
  """Writes a .json file and returns what it holds: lists in place of arrays."""
  text = json.dumps(values, indent=indent, default=lambda array: array.tolist())
  path.write_text(text + "\n")
  return json.loads(text)


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
  """The objects of a .jsonl file that have a step.

  A cut-off line, the last one of a run that writes or was killed, is left out.
  """
  if not path.is_file():
    return []
  lines = map(_line, path.read_text(errors="replace").splitlines())
  return [line for line in lines if "step" in line]


def append_line(path: pathlib.Path, values: dict[str, Any]) -> None:
  with path.open("a") as file:
    file.write(json.dumps(values) + "\n")


def keep_lines(path: pathlib.Path, resume_step: int) -> None:
  """Drops the lines of later steps from a .jsonl file of a run, which may not be there yet.

  A run killed after its last checkpoint has logged steps that are about to be taken again.
  """
  if path.exists():
    lines = path.read_text().splitlines()
    kept = [line for line in lines if _line(line).get("step", resume_step + 1) <= resume_step]
    path.write_text("".join(line + "\n" for line in kept))


def _line(text: str) -> dict[str, Any]:
  try:
    value = json.loads(text)
  except ValueError:
    return {}
  return value if isinstance(value, dict) else {}
