"""The flags of the compilers and libraries of this process's chips: flags.toml, before jax starts.

They change results, not only speed, so that kernels are compared with the reference under them.
What the user has set stays as it is, and --platform_flags=off sets none.
"""

import importlib.metadata
import os
import pathlib
import re
import tomllib
from typing import Any, NamedTuple

import jax
from jax._src import hardware_utils

from moe_jax.config import Config, Dispatch, Exchange
from moe_jax.config.fields import spelled
from moe_jax.start import command_line

# Versions of jax, from the first to before the second: XLA ends at a flag that it does not know.
TRIED = ((0, 10, 2), (0, 13))
TABLE = tomllib.loads(pathlib.Path(__file__).with_name("flags.toml").read_text())["rows"]
HERE: dict[str, Any] = {}  # {"chip", "note", "flags"} of this process, for its workdir


class Flag(NamedTuple):
  """A flag, and why it is set."""

  name: str
  value: bool | int | str
  reason: str
  source: str

  @property
  def place(self) -> str:
    """A variable that holds several flags, or "environment" or "jax.config"."""
    kinds = {"jax_": "jax.config", "xla_gpu_": "XLA_FLAGS", "xla_": "LIBTPU_INIT_ARGS"}
    kinds["megascale_"] = "LIBTPU_INIT_ARGS"
    return next((kinds[k] for k in kinds if self.name.startswith(k)), "environment")


def flags_of(chip: str, config: Config, slices: int = 1) -> list[Flag]:
  """Returns the flags of a run on chips such as v6e or h200; none for a chip without a row."""
  moe, mesh = config.model.moe, config.mesh
  grouped = moe.num_experts > 0 and moe.dispatch is Dispatch.GROUPED
  words = {
    "experts": moe.num_experts > 0,
    "split weights": mesh.fsdp * mesh.expert > 1,
    "fsdp": mesh.fsdp > 1,
    "several slices": slices > 1,
    "step timeout": config.train.step_timeout > 0,
    "ragged exchange": grouped and moe.exchange is Exchange.RAGGED and mesh.expert > 1,
  }
  words |= {"": True} | {f"not {word}": not holds for word, holds in words.items()}
  rows = [r for r in TABLE if target_of(chip) in r["targets"] and words[r.get("when", "")]]

  def of_run(value: Any) -> Any:
    timeout = config.train.step_timeout
    return value.format(step_timeout=timeout) if isinstance(value, str) else value

  return [
    Flag(n, of_run(v), row["reason"], row["source"]) for row in rows for n, v in row["set"].items()
  ]


def target_of(chip: str) -> str:
  """Returns the target of a chip: hopper for "h200" or "NVIDIA H200", and v6e for "v6e"."""
  family = re.search(r"\bG?([AHB])\d{2,3}\b", chip.upper())
  return {"A": "ampere", "H": "hopper", "B": "blackwell"}[family[1]] if family else chip


def compiler_options(flags: list[Flag]) -> dict[str, bool | int | str]:
  """Returns those of the flags that `lowered.compile(compiler_options=...)` takes."""
  options = {f.name.removeprefix("jax_"): f.value for f in flags if f.place != "environment"}
  return {name: value for name, value in options.items() if not name.startswith("megascale_")}


def chip_here() -> str:
  """Returns the chip that jax will run on, "" for a CPU; asks the machine's files, no driver."""
  platform = (jax.config.values["jax_platforms"] or "cuda").split(",")[0]
  if platform == "tpu":  # as `import jax` sets it where it finds chips and libtpu
    version = hardware_utils.num_available_tpu_chips_and_device_id()[1]
    return "TPU" if version is None else version.name
  gpus = sorted(pathlib.Path("/proc/driver/nvidia/gpus").glob("*/information"))
  plugins = importlib.metadata.entry_points(group="jax_plugins").names
  if platform not in ("cuda", "gpu") or not gpus or not any("cuda" in name for name in plugins):
    return ""
  model = re.search(r"^Model:\s*(.+)$", gpus[0].read_text(), re.M)
  return model[1] if model else "NVIDIA"


def set_flags(config: Config, chip: str) -> None:
  """Sets the flags of a run, before jax's backend starts; a later call does nothing."""
  if not chip or HERE:
    return
  slices, (first, end) = int(os.environ.get("MEGASCALE_NUM_SLICES", "1")), TRIED
  flags, note = flags_of(chip, config, slices), "--platform_flags=off sets none"
  if os.environ.get(command_line.PLATFORM_FLAGS) == "off":
    flags, note = [], "none, by --platform_flags=off"
  elif not first <= jax.__version_info__ < end:
    flags, note = [], f"none, because none has been tried with jax {jax.__version__}"
  elif not flags:
    note = "none, because flags.toml has none for it"
  HERE.update(chip=chip, note=note, flags=[_set(flag) for flag in flags])


def _set(flag: Flag) -> dict[str, Any]:
  """Sets a flag that the user has not set; returns its record for the workdir."""
  name, place, value = flag.name, flag.place, spelled(flag.value)
  # jaxlib refuses the old and the new name of a variable together.
  named = {name, name.upper(), name.replace("XLA_", "XLA_PYTHON_")} & os.environ.keys()
  holder = os.environ.get(place, "")
  if named or re.search(rf"--{name}\b", holder):
    return flag._asdict() | {"place": place, "set_by": "the user"}
  if place == "jax.config":
    jax.config.update(name, flag.value)
  elif place == "environment":
    os.environ[name] = value
  else:
    os.environ[place] = f"{holder} --{name}={value}".lstrip()
  return flag._asdict() | {"place": place, "set_by": "moe_jax"}


def lines() -> list[str]:
  """Returns what to print of the flags of this process; nothing on a CPU."""
  told = [f"platform flags     {HERE['chip']}: {HERE['note']}"] if HERE else []
  for flag in HERE.get("flags", []):
    mine = f"={spelled(flag['value'])}" if flag["set_by"] == "moe_jax" else ", as the user set it"
    told.append(f"  {flag['name']}{mine}: {flag['reason']} ({flag['source']})")
  return told
