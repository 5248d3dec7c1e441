"""Devices that a program can be compiled for without them.

`v5p-128` is a name of Google Cloud, which counts v4, v5p and tpu7x by TensorCores, two a chip, and
v5e and v6e by chips; `v5p:4x4x4` names the torus itself. `h200-64` are 8 hosts of 8 GPUs.
"""

import dataclasses
import difflib
import functools
import math
import pathlib
import re
import tomllib
from collections.abc import Sequence
from typing import Any

import jax

from moe_jax.errors import UserError
from moe_jax.kernels.chips import CHIPS, Chip

_HOST = 8  # GPUs of a host, which NVLink connects
# The tori of Google Cloud by their number of chips.
_TORI_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_TORI_3D = (
  *("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16"),
  *("8x16x16", "16x16x16"),
)


@dataclasses.dataclass(frozen=True)
class Target:
  """Some devices of one kind."""

  name: str  # as written
  chip: Chip
  family: str  # of chips.CHIPS
  shape: tuple[int, ...]  # of a slice's torus, in chips; (hosts, GPUs of a host)
  slices: int  # of TPUs, which the data center's network connects

  @property
  def devices(self) -> int:
    """How many devices there are for jax, of which a chip of tpu7x is two."""
    return self.slices * math.prod(self.shape) * _per_chip(self.family)

  def wraps(self, dimension: int) -> bool:
    """Returns whether the torus is closed along a dimension, so that both ways lead round it.

    It is where a slice is made of whole cubes of 4x4x4 (v4, v5p, tpu7x), or has a whole row of 16.
    """
    if len(self.shape) == 3:
      return all(size % 4 == 0 for size in self.shape)
    return self.shape[dimension] == 16

  def __str__(self) -> str:
    torus = "x".join(map(str, self.shape))
    if not self.chip.tpu:
      return f"{self.name}: {self.shape[0]} host(s) of {self.shape[1]} {self.family.upper()}"
    closed = [str(self.shape[d]) for d in range(len(self.shape)) if self.wraps(d)]
    wrap = f", wrapped along {' and '.join(closed)}" if closed else ", no wrap"
    return (
      f"{self.name}: {self.slices} slice(s) of {self.family}:{torus}{wrap}, 4 chips a host, "
      f"{self.devices} devices"
    )


def parse(name: str, slices: int = 1) -> Target:
  """Returns the target of a name such as v5p-128, v5p:4x4x4 or h200-64.

  Raises:
    UserError: there is no such target.
  """
  family, separator, size = re.match(r"([a-z0-9]*)([-:]?)(.*)", name.lower()).groups()  # type: ignore[union-attr]
  chip = CHIPS.get(family)
  if chip is None or not re.fullmatch(r"\d+(x\d+)*", size):
    near = difflib.get_close_matches(family, CHIPS, 1)
    raise UserError(
      f"--topology={name}: write a kind and a size, as v5p-128, v5p:4x4x4 or h200-64; "
      + (f"did you mean {near[0]}?" if near and near[0] != family else f"kinds: {', '.join(CHIPS)}")
    )
  if not chip.tpu:
    if slices > 1:
      raise UserError(f"--slices={slices}: GPUs have hosts, not slices; drop it")
    count = int(size) if separator == "-" and size.isdecimal() else 0
    if not count or (count > _HOST and count % _HOST):
      raise UserError(f"--topology={name}: write up to {_HOST} GPUs, or hosts of {_HOST}: h200-64")
    return Target(name, chip, family, (max(count // _HOST, 1), min(count, _HOST)), 1)
  tori = _TORI_2D if family in ("v5e", "v6e") else _TORI_3D
  by_name = {f"{family}-{_cores(family) * _chips(torus)}": torus for torus in tori}
  torus = size if separator == ":" else by_name.get(f"{family}-{size}", "")
  if torus.count("x") != tori[0].count("x"):
    raise UserError(f"--topology={name}: no such slice; there are {', '.join(by_name)}")
  return Target(name, chip, family, tuple(map(int, torus.split("x"))), slices)


def of_chips(family: str, chips: int) -> Target:
  """Returns the target of so many chips of a kind: the slice, or the hosts of GPUs.

  Raises:
    UserError: there is no such kind, or no such slice.
  """
  chip = CHIPS.get(family)
  return parse(f"{family}-{chips * (_cores(family) if chip and chip.tpu else 1)}")


def all_sizes(target: Target) -> list[Target]:
  """Returns the targets of the same kind, the smallest first, up to 4,096 chips."""
  if target.chip.tpu:
    tori = _TORI_2D if target.family in ("v5e", "v6e") else _TORI_3D
    return [of_chips(target.family, _chips(torus)) for torus in tori]
  return [of_chips(target.family, 2**n) for n in range(11)]


def _cores(family: str) -> int:
  return 1 if family in ("v5e", "v6e") else 2


def _per_chip(family: str) -> int:
  return 2 if family == "tpu7x" else 1


def _chips(torus: str) -> int:
  return math.prod(map(int, torus.split("x")))


@functools.cache
def devices(target: Target) -> Sequence[jax.Device]:
  """Returns the devices, which can be compiled for and nothing else.

  Raises:
    UserError: the compiler is not installed, or knows no such devices.
  """
  from jax.experimental import topologies

  extra = "tpu" if target.chip.tpu else "cuda"
  try:
    if not target.chip.tpu:
      # jax would check this process's own GPU, not the one that it compiles for.
      from jax._src.cudnn import fused_attention_stablehlo

      fused_attention_stablehlo.check_compute_capability = lambda capability: True
      hosts, gpus = target.shape
      described = topologies.get_topology_desc(
        platform="cuda",
        target_config=_described()["description"].format(**_described()[target.family]),
        topology=f"1x{hosts}x{gpus}",
      )
    else:
      options: dict[str, Any] = {"num_slices": target.slices} if target.slices > 1 else {}
      if target.family == "v4":
        options["chip_config_name"] = "megacore"  # a chip is one device, as it is on a v5p
      torus = "x".join(map(str, target.shape))
      described = topologies.get_topology_desc(
        platform="tpu", topology_name=f"{target.family}:{torus}", **options
      )
  except (ImportError, RuntimeError, AttributeError) as error:
    why = (str(error).splitlines() or [type(error).__name__])[0][:200]
    raise UserError(
      f"--topology={target.name}: no compiler for it ({why}); pip install -e '.[{extra}]'"
    ) from None
  return described.devices


@functools.cache
def _described() -> dict[str, Any]:
  return tomllib.loads(pathlib.Path(__file__).with_name("gpus.toml").read_text())
