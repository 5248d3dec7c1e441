"""The files of a run: their names, how to read and write them, and what a resumed run may change.

Nothing here imports jax, so that a report can read a run on a machine without it.
"""

import contextlib
import json
import os
import pathlib
import re
from typing import Any

from moe_jax.config import Attention, Config, Exchange, GroupedMatmul, checks
from moe_jax.config.run import from_json, override, to_json
from moe_jax.errors import DamagedError, UserError, few, notice
from moe_jax.storage import files, remote

CONFIG = "config.json"  # the resolved config
DATA = "data.json"  # {split: digest of its token stream, "tokenizer": its fingerprint}
KERNELS = "kernels.json"  # {operation: the implementation that computes it in this run}
FLAGS = "flags.json"  # the flags of the compilers and libraries that the newest start set
INIT = "init.json"  # {workdir, step, optimizer} of the run whose parameters this run began with
PLACEMENT = "placement.json"  # the experts that changed places at steps (training/placement.py)
TRACKER = "tracker.json"  # {tracker, id, last line sent} of the record in wandb, trackio or mlflow
METRICS = "metrics.jsonl"  # one line for each logged step
ALARMS = "alarms.jsonl"  # one line for each alarm
EVAL = "eval.json"  # the result of eval.py
EVAL_DATA = "eval_data.json"  # the result of eval.py on other text, --data.path
ROUTING = "routing.json"  # the result of eval.py --routing
SAVED = "saved.json"  # {step: of the newest checkpoint that is complete; 0 before the first one}
LOCK = "train.lock"  # names the process that trains here; there is none if none does
SET_ASIDE = "set_aside"  # checkpoints that cannot be used, as they were found
CHECKPOINTS = "checkpoints"  # one folder for each saved step; its name is the step
TENSORBOARD = "tensorboard"
HF = "hf"  # what came with an imported checkpoint: config, tokenizer
PROFILE = "profile"  # the trace of train.py --profile
LOG = "log.txt"  # the terminal output of a run that a sweep started

# What to do where one of these files is damaged.
_REMEDY = {
  CONFIG: "put it back from a copy, or write it again with the run's own command and another "
  "--workdir, and copy it from there",
  DATA: "delete it, and the next start trusts the text that is on disk",
  KERNELS: "delete it, and the next start chooses the kernels again",
  SAVED: "delete it; the checkpoints that are there then count as all",
  INIT: "put it back from a copy; without it the run no longer knows what it began with",
  TRACKER: "delete it, and the next start begins another record",
  EVAL: "delete it and run eval.py again",
  ROUTING: "delete it and run eval.py --routing again",
}

# What is in those that have the same fields in every run.
_KINDS: dict[str, dict[str, type]] = {
  SAVED: {"step": int},
  INIT: {"workdir": str, "step": int, "optimizer": bool},
  TRACKER: {"tracker": str, "id": str, "last": list, "rewinds": int},
}


open_path = remote.open_path
resolved = remote.resolved  # the same for all names of a workdir


def open_written(workdir: str | os.PathLike[str]) -> pathlib.Path:
  """Returns the path of a workdir; raises a UserError where no checkpoint could be saved in it."""
  path = open_path(workdir)
  if odd := re.search(r"[][*?\\\ud800-\udfff]", str(remote.resolved(path))):
    raise UserError(
      f"--workdir={workdir}: no checkpoint can be saved below a folder with {odd[0]!r} in its name,"
      " which the libraries take for a pattern, or is no UTF-8; name another folder"
    )
  return path


def open_new(workdir: str | os.PathLike[str]) -> pathlib.Path:
  """Returns the path of a workdir; raises a UserError where there are files in it."""
  path = open_written(workdir)
  if path.exists() and any(path.iterdir()):
    raise UserError(f"--workdir={workdir} is not empty; name a new folder")
  return path


def inherit(workdir: pathlib.Path, source: pathlib.Path, tokenizer: str) -> None:
  """Copies what came with the import `source` to a run with its weights and its tokenizer."""
  if files.exists(source / HF) and read_object(source / DATA).get("tokenizer") == tokenizer:
    (workdir / HF).mkdir(exist_ok=True)
    for path in (source / HF).iterdir():
      files.write(workdir / HF / path.name, files.read_bytes(path))


def split_step(text: str) -> tuple[str, int | None]:
  """Returns the workdir and the step of WORKDIR:STEP; None for WORKDIR alone."""
  named = re.fullmatch(r"(.+):([0-9]+)", text)
  return (named[1], int(named[2])) if named else (text, None)


def fetched(workdir: str, folder: pathlib.Path) -> pathlib.Path:
  """Returns a workdir on this machine: of one in an object store, a copy of what a report reads.

  The copy is in `folder`, below BUCKET/FOLDER.
  """
  path = open_path(workdir)
  if not remote.is_remote(path):
    return path
  copy = folder.joinpath(*path.parts[2:])
  copy.mkdir(parents=True, exist_ok=True)
  for name in (CONFIG, METRICS, ALARMS, EVAL, ROUTING):
    with contextlib.suppress(FileNotFoundError):
      files.write(copy / name, files.read_bytes(path / name))
  return copy


def read_config(workdir: pathlib.Path) -> Config:
  """Returns the validated config of a run; raises a UserError where the workdir has none."""
  path = workdir / CONFIG
  if not files.exists(path):
    raise UserError(
      f"--workdir={workdir}: no {CONFIG} there, so no run; train one first with train.py"
    )
  config = _config_of(path)
  tokenizer = pathlib.Path(config.data.tokenizer)
  beside = workdir / HF / tokenizer.name
  if config.data.tokenizer != "bytes" and not tokenizer.exists() and files.exists(beside):
    config = override(config, {"data.tokenizer": str(beside)})  # an import's workdir has moved
  try:
    checks.check(config)
  except UserError as error:
    raise UserError(f"{path}: {error}") from None
  return config


def stored_config(workdir: pathlib.Path) -> Config | None:
  """Returns the config of a run as it was written, or None; a newer program may refuse it."""
  path = workdir / CONFIG
  return _config_of(path) if path.exists() else None


def _config_of(path: pathlib.Path) -> Config:
  values = read_object(path)  # names what is wrong with the file
  try:
    return from_json(json.dumps(values))
  except UserError:
    raise
  except Exception as error:  # a value of another type than the field's, in any of many ways
    raise DamagedError(f"{path} is damaged ({error}); {_REMEDY[CONFIG]}") from None


def write_config(workdir: pathlib.Path, config: Config) -> None:
  files.write_json(workdir / CONFIG, files.sealed(json.loads(to_json(config))))


def check_same_data(workdir: pathlib.Path, digests: dict[str, str]) -> None:
  """Raises a UserError if the text is not the text that the run was started with.

  `digests` is {split: digest of the token stream that is read now}. The text is another one after a
  change of the files, or of Python and its standard library.
  """
  recorded = read_object(workdir / DATA)
  changed = [split for split, digest in digests.items() if recorded.get(split, digest) != digest]
  if changed:
    raise UserError(
      f"--workdir={workdir}: the {' and '.join(changed)} text is not the one this run was trained "
      "with (another Python version, or changed files?); use the same text, or a new workdir"
    )


def check_same_tokenizer(workdir: pathlib.Path, fingerprint: str) -> None:
  """Raises a UserError if the tokenizer is not the one that the run was started with."""
  if read_object(workdir / DATA).get("tokenizer", fingerprint) != fingerprint:
    raise UserError(
      f"--workdir={workdir}: the file of config.data.tokenizer is not the one that this run was "
      "trained with (changed or damaged?), or those beside it name other special tokens; put that "
      "file back in its place"
    )


def read_kernels(workdir: pathlib.Path) -> dict[str, Any]:
  """Returns {operation: the implementation that computes it in this run}; {} for a new run.

  Raises:
    DamagedError: the file names no device, or no known implementation of an operation.
  """
  path = workdir / KERNELS
  kernels = read_object(path)
  if not kernels:
    return {}
  try:
    if not isinstance(kernels["device"], str):
      raise TypeError("its device is no text")
    Attention(kernels["attention"])
    GroupedMatmul(kernels["grouped_matmul"])
    Exchange(kernels.get("exchange", "auto"))
  except (KeyError, TypeError, ValueError) as error:
    raise DamagedError(f"{path} is damaged ({error!r}); {_REMEDY[KERNELS]}") from None
  return kernels


def saved_steps(workdir: pathlib.Path) -> list[int]:
  """Returns the steps whose checkpoints are complete, in order; [] where there is none.

  Orbax renames a checkpoint's folder to the step only when all its files are written. In an object
  store, where nothing is renamed, it then writes one more file.
  """
  with remote.errors(workdir):
    found = [p for p in (workdir / CHECKPOINTS).glob("*") if re.fullmatch("0|[1-9][0-9]*", p.name)]
    if remote.is_remote(workdir):
      found = [path for path in found if (path / "commit_success.txt").exists()]
    return sorted(int(path.name) for path in found)


def make(workdir: pathlib.Path) -> None:
  """Makes the folder of a run, if it is missing."""
  with files.storage_errors(workdir):
    workdir.mkdir(parents=True, exist_ok=True)


def refuse_links(workdir: pathlib.Path) -> None:
  """Raises a UserError for a symbolic link where a run writes or deletes, which leads elsewhere."""
  if remote.is_remote(workdir):
    return  # an object store has none
  tops = (METRICS, ALARMS, LOCK, CHECKPOINTS, SET_ASIDE, TENSORBOARD, PROFILE, LOG)
  for folder, folders, names in os.walk(workdir):  # which follows none below the workdir
    top = folder == os.fspath(workdir)
    for path in (pathlib.Path(folder, name) for name in (tops if top else folders + names)):
      if path.is_symlink():
        raise UserError(
          f"--workdir={workdir}: {path.relative_to(workdir)} is a symbolic link, and a run "
          "writes through none; put the folder or file itself there"
        )
    # Below the folder of a whole checkpoint nothing is written, and it is deleted without links.
    folders[:] = [name for name in folders if (not top or name in tops) and not name.isdecimal()]


def recorded_step(workdir: pathlib.Path) -> int | None:
  """Returns the newest step that the run has saved; None where there is no record."""
  return read_object(workdir / SAVED).get("step")


def rewinds(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """Returns the lines of alarms.jsonl about rewinds: the step each went to, and its next batch."""
  lines, damaged = files.read_lines(workdir / ALARMS)
  if damaged:
    raise DamagedError(
      f"{workdir / ALARMS} is damaged: line {damaged[0]}, which may say where the data go on, has "
      "changed; put the file back from a copy, or delete the line if it is of no rewind"
    )
  return [x for x in lines if x.get("alarm") == "rewind" and isinstance(x.get("next_batch"), int)]


def record_saved(workdir: pathlib.Path, step: int) -> None:
  """Records the newest step whose checkpoint is complete, so that its loss would be noticed."""
  if recorded_step(workdir) != step:
    write_object(workdir / SAVED, {"step": step})


def set_aside(workdir: pathlib.Path, step: int, why: str) -> None:
  """Moves a checkpoint to the folder of those that no run uses, and says so."""
  folder = workdir / SET_ASIDE
  make(folder)
  target = folder / f"{step}.{len(list(folder.glob(f'{step}.*')))}"
  notice(f"checkpoint {step} is set aside as {target}: {why}")
  files.move(workdir / CHECKPOINTS / str(step), target)


def is_trained(workdir: pathlib.Path, steps: int) -> bool:
  """Returns whether the checkpoint of the last step, number `steps`, is there."""
  return steps in saved_steps(workdir)


def read_object(path: pathlib.Path) -> dict[str, Any]:
  """Returns the object of a .json file; {} where there is no file.

  Raises:
    DamagedError: the file holds something else.
  """
  remedy = _REMEDY.get(path.name, "put it back from a copy, or delete it")
  values, kinds = files.read_json(path, remedy), _KINDS.get(path.name)
  if values and kinds and {name: type(value) for name, value in values.items()} != kinds:
    raise DamagedError(f"{path} is damaged (it has other values than {', '.join(kinds)}); {remedy}")
  return values


def write_object(
  path: pathlib.Path, values: dict[str, Any], indent: int | None = 2
) -> dict[str, Any]:
  """Writes a .json file and returns the written object, in which arrays have become lists."""
  files.write_json(path, values, indent)
  return read_object(path)


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
  """Returns the objects of a .jsonl file that have a step; [] where there is no file.

  A last line that is incomplete is left out, since a run may be writing it. Other lines that are
  damaged are left out too, and named on stderr.
  """
  lines, damaged = files.read_lines(path)
  if damaged:
    notice(f"{path} is damaged: line {few(damaged)} left out, {len(lines)} read")
  return [line for line in lines if isinstance(line.get("step"), int)]


def append_line(path: pathlib.Path, values: dict[str, Any]) -> None:
  files.append_line(path, files.sealed(values) if path.name == ALARMS else values)


def keep_lines(path: pathlib.Path, resume_step: int) -> None:
  """Deletes the lines of later steps than `resume_step` from a .jsonl file, if the file exists.

  A run that was killed has logged steps after its last checkpoint. Resumed, it takes and logs these
  steps again. A damaged file is kept beside the new one, under another name.
  """
  if not files.exists(path):
    return
  kept = [line for line in read_lines(path) if line["step"] <= resume_step]
  if files.read_lines(path)[1]:
    files.write(path.with_name(path.name + ".damaged"), files.read_bytes(path))
  files.write(path, "".join(json.dumps(line) + "\n" for line in kept))
