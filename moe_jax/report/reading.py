"""Reads the files of runs and sweeps; one of another kind is a DamagedError.

Every file must be inside the folder that the user named, because a downloaded folder may hold
symbolic links, and a report must not show what they lead to.
"""

import contextlib
import math
import os
import pathlib
import re
import reprlib
import shlex
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from moe_jax.config.run import upgraded
from moe_jax.errors import DamagedError, StorageError
from moe_jax.storage import files
from moe_jax.storage import workdir as workdir_lib

SWEEP = "sweep.json"
SWEEP_FORMAT = 1  # a file without a number is older, and has the same names
TEXTS = ("question", "sweep", "base", "target_arm", "published", "band")  # of a sweep
LAUNCH = "launch: "  # how the lines of launch/requeue.sh begin in a log
_STATUS = ("waiting", "running", "finished", "failed", "stopped")
_TAIL_LINES, _TAIL_BYTES = 20, 1 << 16  # of log.txt, to explain a failure
_MOST_BYTES = {".json": 1 << 26, ".jsonl": 1 << 30}  # of a file
_LARGE = 1e40  # above every float32 and every count; larger numbers overflow in means and pictures

# Kinds of single values: what one must be, and whether it is. A run that has diverged logs NaN.
_KINDS: dict[Any, tuple[str, Callable[[Any], bool]]] = {
  int: ("an integer from 0 up", lambda v: type(v) is int and 0 <= v < 1 << 53),
  float: ("a number", lambda v: type(v) in (int, float) and not _LARGE <= abs(v) < math.inf),
  str: ("a text", lambda v: isinstance(v, str)),
  bool: ("true or false", lambda v: isinstance(v, bool)),
  None: ("a single value", lambda v: v is None or any(_KINDS[k][1](v) for k in (str, bool, float))),
  "status": (f"one of {', '.join(_STATUS)}", lambda v: v in _STATUS),
  "command": ("a command line", lambda v: isinstance(v, str) and shlex.split(v) is not None),
  object: ("anything", lambda v: True),
  dict: ("an object", lambda v: False),  # _kept asks for these only where they are something else
  list: ("a list", lambda v: False),
}
# What files hold: a kind; [kind], for a list; [letters, kind], for an array, whose dimensions are
# the same in all files of a run; or {name: kind}, an object. With `...`, the kind of all other
# names, it may lack names. An array may have any name that ends in its letters.
_LOSSES: dict[Any, Any] = dict.fromkeys(
  ("loss", "bits_per_byte", "teacher_forced_loss", "gap"), float
)
_LOSSES[...] = object
_ROUTED = {"experts": ["T", [int]], "gates": ["T", [float]], "kept": ["T", [bool]]}
_FILES: dict[str, dict[Any, Any]] = {
  workdir_lib.CONFIG: {
    "train.steps": int, "train.seed": int, "data.batch_size": int, "data.seq_len": int, ...: None,
  },
  workdir_lib.METRICS: {"step": int, ...: float},
  workdir_lib.ALARMS: {"step": int, "alarm": str, "layer": float, "message": str, ...: object},
  workdir_lib.EVAL: _LOSSES | {
    "step": int, "split": str, "tokens": int, "layers": ["Z", int], "parameters": int,
    "active_parameters": int, "flops_per_token": float, "causal": _LOSSES,
    "capacity": [{"capacity_factor": None, "loss": float, ...: object}], "domains": {...: _LOSSES},
  },
  workdir_lib.ROUTING: {
    "layers": ["Z", int], "top_tokens_ZE": ["ZE", [[None]]], "domains": [str],
    "saturation": [{"step": int, "overlap_Z": ["Z", float]}], "repeat_random": float,
    "text": {"tokens": ["T", str], "domain": ["T", str], "layers": ["Z", _ROUTED]},
    "repeat_any_random": float, ...: object,
  },
  SWEEP: {
    "arms": [{"name": str, "overrides": {...: None}, "notes": [str]}], "runs": [object],
    **dict.fromkeys(TEXTS, str),
  },
}  # fmt: skip
_ENTRY = {"arm": str, "seed": int, "workdir": str, "command": "command", "evaluate": "command",
          "status": "status", "seconds": float, "error": str}  # fmt: skip


def is_inside(path: pathlib.Path, root: pathlib.Path) -> bool:
  """Returns whether a path stays inside a folder when all links of both are followed."""
  return pathlib.Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))


def read_run_files(path: pathlib.Path, root: pathlib.Path, sizes: dict[str, int]) -> dict[str, Any]:
  """Returns the object of a .json file inside `root`; {} if there is none.

  `sizes`, by shape letter, are those of the run's files before it; those of this file are added.
  """
  with _damage(path):
    found = workdir_lib.read_object(_in_place(path, root))
    if path.name == workdir_lib.CONFIG:
      found = upgraded(found)
    elif (number := found.get("format", 0)) > SWEEP_FORMAT:
      raise ValueError(f"it is of format {number}, made by a newer moe_jax; update this one")
    if not found and not (path.name == SWEEP and path.exists()):
      return {}
    found = _kept(found, _FILES[path.name], sizes)
    for point in found.get("capacity", []):  # an older run wrote one without limit as 0
      limit, _ = float(point["capacity_factor"]), point["loss"]
      point["capacity_factor"] = limit or math.inf
    if path.name == workdir_lib.ROUTING:
      experts = range(len(found["top_tokens_ZE"][0]))
      for layer in found["text"]["layers"] if "text" in found else []:
        if not {expert for token in layer["experts"] for expert in token} <= {*experts}:
          raise ValueError(f"a token went to an expert that is none of {len(experts)}")
    return found


def read_lines(path: pathlib.Path, root: pathlib.Path, sizes: dict[str, int]) -> list[dict]:
  """Returns the objects of a .jsonl file, without a last line that is being written."""
  with _damage(path):
    lines, damaged = files.read_lines(_in_place(path, root))
    if damaged or (not lines and path.exists() and path.read_bytes()[:1] not in (b"", b"{")):
      raise ValueError(f"line {[*damaged, 1][0]} is no JSON object")
  for number, line in enumerate(lines):
    with _damage(path, f"line {number + 1}: "):
      lines[number] = {"step": line["step"]} | _kept(line, _FILES[path.name], sizes)
  return lines


def read_entry(out: pathlib.Path, number: int, entry: Any) -> dict[str, Any]:
  """Returns what the record of a sweep says of run `number`."""
  with _damage(out / SWEEP, f"runs[{number}]: "):
    found = _kept(entry, _ENTRY, {})
    if not is_inside(out / found["workdir"], out):
      raise ValueError(f"its workdir {found['workdir']!a} is not in this folder")
    return found


def tail(log: BinaryIO, begin: int = 0) -> list[str]:
  """Returns the last lines of an open log, of what stands after its first `begin` bytes."""
  log.seek(max(begin, log.seek(0, os.SEEK_END) - _TAIL_BYTES))
  return log.read().decode(errors="replace").splitlines()[-_TAIL_LINES:]


def log_tail(workdir: pathlib.Path, root: pathlib.Path) -> str:
  """Returns the last lines of the run's log.txt; '' if there is none inside `root`."""
  path = workdir / workdir_lib.LOG
  if not path.is_file() or not is_inside(path, root):
    return ""
  with path.open("rb") as log:
    return "\n".join(tail(log))


def _in_place(path: pathlib.Path, root: pathlib.Path) -> pathlib.Path:
  """Returns the path; raises a ValueError for what is elsewhere, no file, or too large."""
  if os.path.lexists(path) and not is_inside(path, root):
    raise ValueError(f"it is a link that leads out of {root}")
  most = _MOST_BYTES[path.suffix]
  if os.path.exists(path) and not (path.is_file() and path.stat().st_size <= most):
    raise ValueError(f"it is no file of at most {most:,} bytes")
  return path


@contextlib.contextmanager
def _damage(path: pathlib.Path, where: str = "") -> Iterator[None]:
  """Turns what wrong values raise into a DamagedError, one line that names the file."""
  try:
    yield
  except (DamagedError, StorageError):
    raise
  except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
    why = f"it has no {error}" if isinstance(error, KeyError) else str(error)
    said = f"{path} is damaged ({where}{why[:200]})"
    raise DamagedError("".join(filter(str.isprintable, said))) from None


def _kept(value: Any, kind: Any, sizes: dict[str, int], name: str = "it") -> Any:
  """Returns what there is of a kind in a value; raises an error if it is of another kind."""
  if isinstance(kind, dict) and isinstance(value, dict):
    found: dict[str, Any] = {}
    for n in value if ... in kind else kind:
      own = n in kind or isinstance(kind[...], dict)
      letters = None if own else re.search(r"_([A-Z]+)$", n)
      inner = [letters[1], float] if letters else kind.get(n, kind.get(...))
      found[n] = _kept(value[n], inner, sizes, n)
    return found
  if isinstance(kind, list) and isinstance(value, list):
    *shape, item = kind
    if shape:
      known = sizes.setdefault(shape[0][0], len(value))
      if known != len(value) or not (value or name == "layers"):  # of a dense model
        raise ValueError(f"{name} has {len(value)} items, not {known or 'some'}")
      item = [shape[0][1:], item] if shape[0][1:] else item
    if item is float and {*map(type, value)} == {float} and max(map(abs, value)) < _LARGE:
      return value  # as below, but quicker
    return [_kept(each, item, sizes, f"{name}[{i}]") for i, each in enumerate(value)]
  word, holds = _KINDS[type(kind) if isinstance(kind, dict | list) else kind]
  if not holds(value):
    raise TypeError(f"{name} is {reprlib.repr(value)}, not {word}")
  return value
