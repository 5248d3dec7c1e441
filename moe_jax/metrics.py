"""What is measured of a run, and where it is written."""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tensorboardX import SummaryWriter

from moe_jax.statistics import MoeStats

# Dense bfloat16 FLOP/s of one device, by a part of jax's device_kind, from the vendors' sheets.
_PEAK_FLOPS = {
  "H200": 989e12, "H100": 989e12, "B200": 2250e12, "A100": 312e12, "TPU v4": 275e12,
  "TPU v5 lite": 197e12, "TPU v5e": 197e12, "TPU v5p": 459e12, "TPU v5": 459e12,
  "TPU v6 lite": 918e12, "TPU v6e": 918e12,
}  # fmt: skip

DEAD_SHARE = 0.05  # an expert is dead below this part of its fair share, 1/E


def peak_flops(device_kind: str) -> float:
  """0.0 for a device whose peak is not known (a CPU): no MFU is reported there."""
  return next((peak for name, peak in _PEAK_FLOPS.items() if name in device_kind), 0.0)


def moe_metrics(moe: MoeStats) -> dict[str, jax.Array]:
  """Per-layer balance of the experts, from global sums; works on jax and NumPy arrays.

  Returns, with Z MoE layers: load_ZE, shares of the routed assignments that sum to 1;
  drop_fraction_Z, of the assignments; max_vio_Z, max load / mean load - 1 (2408.15664);
  router_entropy_Z, nats per token; dead_experts_Z; overflow_fraction_Z, of the assignments, those
  that a full exchange buffer lost (counted as dropped too).
  """
  num_experts = moe.routed_E.shape[-1]
  routed_Z1 = jnp.maximum(jnp.sum(moe.routed_E, axis=-1, keepdims=True), 1)
  load_ZE = moe.routed_E / routed_Z1
  return {
    "load_ZE": load_ZE,
    "drop_fraction_Z": 1 - jnp.sum(moe.kept_E, axis=-1) / routed_Z1[:, 0],
    "max_vio_Z": jnp.max(load_ZE, axis=-1) * num_experts - 1,
    "router_entropy_Z": moe.entropy / jnp.maximum(moe.tokens, 1),
    "overflow_fraction_Z": moe.overflow / routed_Z1[:, 0],
    "dead_experts_Z": jnp.sum(load_ZE * num_experts < DEAD_SHARE, axis=-1),
  }


class Writer:
  """metrics.jsonl (one line a logged step; arrays as lists) and TensorBoard events (scalars)."""

  def __init__(self, workdir: pathlib.Path, resume_step: int):
    self._path = workdir / "metrics.jsonl"
    # A run killed after its last checkpoint has logged steps that are about to be taken again.
    if self._path.exists():
      lines = self._path.read_text().splitlines()
      kept = [line for line in lines if _step_of(line) <= resume_step]
      self._path.write_text("".join(line + "\n" for line in kept))
    self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=resume_step + 1)

  def write(self, step: int, values: dict[str, Any], prefix: str) -> None:
    plain = {f"{prefix}/{name}": np.asarray(value).tolist() for name, value in values.items()}
    with self._path.open("a") as file:
      file.write(json.dumps({"step": step, **plain}) + "\n")
    for name, value in plain.items():
      if isinstance(value, (int, float)):
        self._events.add_scalar(name, value, step)
      elif "load" not in name:
        for layer, number in enumerate(value):
          self._events.add_scalar(f"{name}/{layer}", number, step)

  def close(self) -> None:
    self._events.close()


def _step_of(line: str) -> int:
  try:
    return json.loads(line)["step"]
  except ValueError:  # the last line of a killed run can be cut short
    return 1 << 62
