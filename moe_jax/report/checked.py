"""Reads the files of runs and sweeps, and refuses what no run and no sweep has written.

The rest of the report knows nothing of damage: what is returned here has the types and the shapes
that it takes. Every file must be inside the folder that the user named, because a downloaded folder
may hold symbolic links, and a report must not show what they lead to.
"""

import contextlib
import os
import pathlib
import shlex
from collections.abc import Iterator
from typing import Any, NamedTuple

from moe_jax import config as config_lib
from moe_jax import files
from moe_jax import workdir as workdir_lib
from moe_jax.errors import DamagedError, UserError
from moe_jax.report import kinds
from moe_jax.report.kinds import (
  ANYTHING,
  COUNT,
  FACTOR,
  LAYER,
  NUMBER,
  SCALAR,
  TEXT,
  TRUTH,
  Kind,
  Mapping,
  Object,
  Sizes,
  Table,
  WrongError,
)  # fmt: skip

SWEEP = "sweep.json"
SWEEP_FORMAT = 1  # a file without a number is older, and has the same names
# What to do about a damaged file.
_REMEDY = {
  workdir_lib.CONFIG: "put it back from a copy",
  workdir_lib.METRICS: "put it back from a copy, or delete the line",
  workdir_lib.ALARMS: "put it back from a copy, or delete the line",
  workdir_lib.EVAL: "run eval.py again",
  workdir_lib.ROUTING: "run eval.py --routing again",
  SWEEP: "move it away and start the sweep again, which finds the finished runs",
}
_TAIL_LINES = 20  # of log.txt, to explain a failure
_TAIL_BYTES = 1 << 16
_DEEPEST = 4  # sections of a config inside each other

_CONFIG = {
  "format": COUNT, "model": {"moe": {}}, "data": {"batch_size": COUNT, "seq_len": COUNT},
  "train": {"steps": COUNT, "seed": COUNT},
}  # fmt: skip
_METRICS = Object({"step": COUNT}, {...: NUMBER})
_ALARM = Object({"step": COUNT}, {"alarm": TEXT, "layer": LAYER, "message": TEXT})
_LOSSES = {"loss": NUMBER, "bits_per_byte": NUMBER, "teacher_forced_loss": NUMBER, "gap": NUMBER}
_EVAL = {
  "step": COUNT, "split": TEXT, "tokens": COUNT, "layers": Table("Z", COUNT, empty=True),
  "parameters": COUNT, "active_parameters": COUNT, "flops_per_token": NUMBER,
  "capacity": [Object({"capacity_factor": FACTOR, "loss": NUMBER}, {})],
  "domains": Mapping(_LOSSES), "causal": _LOSSES, **_LOSSES,
}  # fmt: skip
_TEXT_LAYER = {
  "experts": Table("T", [COUNT]), "gates": Table("T", [NUMBER]), "kept": Table("T", [TRUTH])
}  # fmt: skip
_TEXT = {
  "tokens": Table("T", TEXT), "domain": Table("T", TEXT),
  "layers": Table("Z", Object(_TEXT_LAYER, {})),
}  # fmt: skip
_ROUTING = Object(
  {"layers": Table("Z", COUNT), "top_tokens_ZE": Table("ZE", [[SCALAR]])},
  {
    "domains": [TEXT], "repeat_random": NUMBER, "repeat_any_random": NUMBER,
    "saturation": [Object({"step": COUNT, "overlap_Z": Table("Z", NUMBER)}, {})],
    "text": Object(_TEXT, {}),
  },
)  # fmt: skip
_STATUS = ("waiting", "running", "finished", "failed", "stopped")
_SWEEP = Object(
  {"arms": [Object({"name": TEXT}, {"overrides": {}, "notes": [TEXT]})], "runs": [ANYTHING]},
  dict.fromkeys(("question", "sweep", "base", "target_arm", "published", "band"), TEXT),
)
_COMMAND = Kind("a command line", lambda v: isinstance(v, str) and _is_command(v))
_ENTRY = Object(
  {
    "arm": TEXT, "seed": COUNT, "workdir": TEXT, "command": _COMMAND, "evaluate": _COMMAND,
    "status": Kind(f"one of {', '.join(_STATUS)}", lambda v: v in _STATUS),
    "seconds": NUMBER, "error": TEXT,
  }, {},
)  # fmt: skip


class RunFiles(NamedTuple):
  """What the files of a run hold besides its config; empty where there is no file yet."""

  metrics: list[dict[str, Any]]
  alarms: list[dict[str, Any]]
  eval: dict[str, Any]
  routing: dict[str, Any]
  sizes: Sizes  # how many MoE layers (Z) and experts (E) all of them agree on


def is_inside(path: pathlib.Path, root: pathlib.Path) -> bool:
  """Returns whether a path stays inside a folder when all links of both are followed."""
  try:
    return pathlib.Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))
  except (OSError, ValueError):  # such as a name with a NUL
    return False


def read_config(workdir: pathlib.Path, root: pathlib.Path) -> dict[str, Any]:
  """Returns {"model.moe.top_k": 1, ...}; {} if the run has no config yet.

  Raises:
    DamagedError: it is damaged or leads out of `root`, or a newer moe_jax has written it.
  """
  path = workdir / workdir_lib.CONFIG
  values = _object(path, root)
  with _named(path):
    _flat(values)
    kinds.check(values, _CONFIG, "", {})
  try:
    return _flat(config_lib.upgraded(values))
  except UserError as error:  # of a newer moe_jax
    raise DamagedError(f"{workdir}: {error}") from None


def read_files(workdir: pathlib.Path, root: pathlib.Path) -> RunFiles:
  """Returns what the other files of a run hold.

  Raises:
    DamagedError: one of them is damaged, or leads out of `root`.
  """
  sizes: Sizes = {}  # what all files have in common
  metrics = _lines(workdir / workdir_lib.METRICS, root, _METRICS, sizes)
  alarms = _lines(workdir / workdir_lib.ALARMS, root, _ALARM, sizes)
  evaluated = _result(workdir / workdir_lib.EVAL, root, _EVAL, sizes)
  routing = _result(workdir / workdir_lib.ROUTING, root, _ROUTING, sizes)
  with _named(workdir / workdir_lib.ROUTING):
    _check_experts(routing, sizes)
  return RunFiles(metrics, alarms, evaluated, routing, sizes)


def read_metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """Returns the lines of metrics.jsonl alone; raises a DamagedError as `read_files` does."""
  return _lines(workdir / workdir_lib.METRICS, workdir, _METRICS, {})


def read_sweep(out: pathlib.Path) -> dict[str, Any]:
  """Returns the record of a sweep; {} if there is none. `check_entry` checks each of its runs.

  Raises:
    DamagedError: it is damaged, of another program, or of a newer moe_jax.
  """
  path = out / SWEEP
  record = _object(path, out)
  if not record and not path.exists():
    return {}
  number = record.get("format", 0)
  if COUNT.holds(number) and number > SWEEP_FORMAT:
    raise DamagedError(f"{path} is of format {number}, made by a newer moe_jax; update this one")
  with _named(path):
    kinds.check(record, _SWEEP, "", {})
  return record


def check_entry(out: pathlib.Path, number: int, entry: Any) -> None:
  """Raises a DamagedError if a sweep's record says of run `number` what no sweep has written."""
  with _named(out / SWEEP, f"runs[{number}]: "):
    kinds.check(entry, _ENTRY, "", {})
    if not is_inside(out / entry["workdir"], out):
      raise WrongError(f"its workdir {entry['workdir']!a} is not in this folder")


def log_tail(workdir: pathlib.Path, root: pathlib.Path) -> str:
  """Returns the last lines of the run's log.txt; '' if there is none inside `root`."""
  path = workdir / workdir_lib.LOG
  if not path.is_file() or not is_inside(path, root):
    return ""
  with path.open("rb") as log:
    log.seek(max(0, log.seek(0, os.SEEK_END) - _TAIL_BYTES))
    return "\n".join(log.read().decode(errors="replace").splitlines()[-_TAIL_LINES:])


def _object(path: pathlib.Path, root: pathlib.Path) -> dict[str, Any]:
  """Returns the object of a file; {} if there is none."""
  _check_place(path, root)
  return files.read_json(path, _remedy(path))


def _result(path: pathlib.Path, root: pathlib.Path, kind: Any, shared: Sizes) -> dict[str, Any]:
  """Returns the object of a file of eval.py; {} if there is none."""
  values, sizes = _object(path, root), Sizes()
  if values:
    with _named(path):
      kinds.check(values, kind, "", sizes)
      _agree(sizes, shared)
  return values


def _lines(path: pathlib.Path, root: pathlib.Path, kind: Object, shared: Sizes) -> list[dict]:
  """Returns the objects of a .jsonl file, without a last line that is being written."""
  _check_place(path, root)
  lines, damaged = files.read_lines(path)
  sizes: Sizes = {}
  with _named(path):
    if damaged:
      raise WrongError(f"line {damaged[0]} is no JSON object")
    if not lines and path.exists() and files.read_bytes(path)[:1] not in (b"", b"{"):
      raise WrongError("it has no lines of JSON")
  for number, line in enumerate(lines, 1):
    with _named(path, f"line {number}: "):
      kinds.check(line, kind, "", sizes)
  with _named(path):
    _agree(sizes, shared)
  return lines


def _check_place(path: pathlib.Path, root: pathlib.Path) -> None:
  """Raises a DamagedError for a file elsewhere."""
  if os.path.lexists(path) and not is_inside(path, root):
    raise DamagedError(f"{path} is a link that leads out of {root}; put a copy in its place")


@contextlib.contextmanager
def _named(path: pathlib.Path, where: str = "") -> Iterator[None]:
  try:
    yield
  except WrongError as error:
    raise DamagedError(f"{path} is damaged ({where}{error}); {_remedy(path)}") from None


def _remedy(path: pathlib.Path) -> str:
  return _REMEDY.get(path.name, "put it back from a copy, or delete it")


def _agree(sizes: Sizes, shared: Sizes) -> None:
  """Checks that a file has as many layers and experts as those before it."""
  for letter, what in (("Z", "MoE layers"), ("E", "experts")):
    if letter in sizes and shared.setdefault(letter, sizes[letter]) != sizes[letter]:
      raise WrongError(f"it has {sizes[letter]} {what}, the files before it {shared[letter]}")


def _check_experts(routing: dict[str, Any], sizes: Sizes) -> None:
  """Checks that the tokens of routing.json went to experts that there are."""
  for layer in routing.get("text", {}).get("layers", []):
    if max((e for token in layer["experts"] for e in token), default=0) >= sizes["E"]:
      raise WrongError(f"a token went to an expert that is none of {sizes['E']}")


def _is_command(text: str) -> bool:
  try:
    return bool(shlex.split(text)) or not text
  except ValueError:  # a quote is not closed
    return False


def _flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  """Flattens the sections of a config: {'model': {'dim': 8}} -> {'model.dim': 8}."""
  if prefix.count(".") > _DEEPEST:
    raise WrongError(f"{prefix[:-1]} is an object, not a single value")
  fields: dict[str, Any] = {}
  for name, value in nested.items():
    if isinstance(value, dict):
      fields |= _flat(value, f"{prefix}{name}.")
    else:
      kinds.check(value, SCALAR, prefix + name, {})
      fields[prefix + name] = value
  return fields
