"""The output of benchmarks: their environment, targets and whether they are met, tables, JSON."""

import datetime
import json
import os
import pathlib
import platform
import time
from typing import Any

from moe_jax.training.tracker import commit

ROOT = pathlib.Path(__file__).parents[1]
_START = time.perf_counter()


def progress(text: str) -> None:
  """Prints a line with the seconds since the start."""
  print(f"[{time.perf_counter() - _START:5.0f} s] {text}", flush=True)


def environment() -> dict[str, Any]:
  """Returns device, versions, commit and date of this run."""
  import jax  # here, because only processes that compute should import it

  device = jax.devices()[0]
  return {
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "platform": device.platform,
    "device": processor() if device.platform == "cpu" else device.device_kind,
    "cpus": len(usable_cpus()),
    "jax": jax.__version__,
    "python": platform.python_version(),
    "commit": commit(),
  }


def usable_cpus() -> list[int]:
  """Returns the CPUs that this process may use."""
  if hasattr(os, "sched_getaffinity"):
    return sorted(os.sched_getaffinity(0))
  return list(range(os.cpu_count() or 1))


def processor() -> str:
  """Returns the name of the CPU."""
  path = pathlib.Path("/proc/cpuinfo")
  lines = path.read_text().splitlines() if path.exists() else []
  names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
  return names[0] if names else platform.processor() or platform.machine()


def target(what: str, measured: float, limit: float, *, at_least: bool = False) -> dict[str, Any]:
  """Returns one target and its verdict: "met", or by how much it is missed."""
  met = measured >= limit if at_least else measured <= limit
  missed = "missed"
  if limit:
    share = 1 - measured / limit if at_least else measured / limit - 1
    missed = f"missed by {100 * share:.0f}%"
  return {
    "what": what,
    "measured": measured,
    "limit": limit,
    "at_least": at_least,
    "met": met,
    "verdict": "met" if met else missed,
  }


def target_table(targets: list[dict[str, Any]]) -> str:
  """Formats the targets."""
  return table(
    ["target", "measured", "limit", ""],
    [
      [
        t["what"],
        f"{t['measured']:.2f}",
        f"{'>=' if t['at_least'] else '<='} {t['limit']:.2f}",
        t["verdict"],
      ]
      for t in targets
    ],
  )


def met(targets: list[dict[str, Any]]) -> str:
  """Returns the last line of a benchmark."""
  return f"met {sum(t['met'] for t in targets)} of {len(targets)} aims"


def table(header: list[str], rows: list[list[str]]) -> str:
  """Formats a table whose columns are as wide as their widest entry; the first is left-aligned."""
  widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
  lines = []
  for row in [header, *rows]:
    first, *rest = (
      f"{x:<{w}}" if i == 0 else f"{x:>{w}}"
      for i, (x, w) in enumerate(zip(row, widths, strict=True))
    )
    lines.append("  ".join([first, *rest]).rstrip())
  return "\n".join(lines)


def write(out: pathlib.Path, name: str, result: dict[str, Any]) -> None:
  """Writes a result as JSON."""
  out.mkdir(parents=True, exist_ok=True)
  (out / name).write_text(json.dumps(result, indent=2) + "\n")
  progress(f"wrote {out / name}")
