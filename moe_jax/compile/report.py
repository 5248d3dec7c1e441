"""What a compiled program will cost: a page of text, and the same as JSON."""

import math
from typing import Any

from moe_jax.compile import roofline
from moe_jax.compile.programs import Compiled
from moe_jax.compile.targets import Target
from moe_jax.config.fields import flatten
from moe_jax.errors import si
from moe_jax.model import cost
from moe_jax.model.cost import gib


def as_json(compiled: Compiled, target: Target, mode: str) -> dict[str, Any]:
  """Returns all that is known of a program: bytes, FLOPs, cycles, collectives and seconds."""
  program, memory, mesh = compiled.program, compiled.memory, compiled.mesh
  groups = {one.axes: roofline.group_of(mesh, one.axes, target) for one in program.collectives}
  flops = compiled.flops.total / target.devices
  times = roofline.times(
    flops=flops,
    custom_flops=compiled.flops.kernels / target.devices,
    memory_bytes=program.memory_bytes,
    cycles=sum(program.cycles.values()),
    collectives=program.collectives,
    groups=groups,
    target=target,
  )
  counts = cost.count(compiled.config)
  # Forward and backward, or the forward pass alone.
  useful = counts.flops_per_token * compiled.tokens / (1 if mode == "train" else 3)
  return {
    "target": {"name": str(target), "devices": target.devices, "chip": target.family},
    "mode": mode,
    "config": flatten(compiled.config),
    "mesh": dict(mesh.shape),
    "tokens": compiled.tokens,
    "parameters": {"total": counts.total, "active": counts.active},
    "flags": {flag.name: flag.value for flag in compiled.flags},
    "compile_seconds": round(compiled.seconds, 1),
    "memory": memory._asdict() | {"peak": memory.peak, "of": target.chip.memory},
    "flops": {"model": useful / target.devices, "executed": flops}
    | {"kernels": compiled.flops.kernels / target.devices, "phases": _share(compiled, target)},
    "memory_bytes": program.memory_bytes,
    "cycles": program.cycles,
    "custom_calls": program.custom_calls,
    "collectives": [
      one._asdict()
      | {
        "wire_bytes": roofline.wire_bytes(one, groups[one.axes].devices),
        "seconds": one.times * roofline.seconds(one.kind, one.size, groups[one.axes], target),
      }
      for one in program.collectives
    ],
    "seconds": times._asdict()
    | {"network": {"+".join(axes): took for axes, took in times.network.items()}},
    "mfu_ceiling": roofline.ceiling(useful, times.step, target),
    "tokens_per_second_per_device": compiled.tokens / times.step / target.devices,
  }


def _share(compiled: Compiled, target: Target) -> dict[str, float]:
  return {phase: n / target.devices for phase, n in compiled.flops.phases.items()}


def page(result: dict[str, Any]) -> str:
  """Returns the page of a result of `as_json`, for a terminal."""
  memory, flops, seconds = result["memory"], result["flops"], result["seconds"]
  mesh = " x ".join(f"{axis} {n}" for axis, n in result["mesh"].items() if n > 1) or "one device"
  lines = [
    f"devices        {result['target']['name']}",
    f"program        {result['mode']}, {result['tokens']:,} tokens a step, on {mesh}; compiled in "
    f"{result['compile_seconds']:.0f} s",
    f"memory         {gib(memory['peak'])} of {gib(memory['of'])} on each device: "
    f"{gib(memory['arguments'])} arguments, {gib(memory['temporaries'])} temporaries; of "
    f"{gib(memory['outputs'])} of results {gib(memory['aliased'])} take the place of arguments",
    f"flags          {_flags(result)}",
    f"FLOPs          {si(flops['executed'])} a device, {flops['executed'] / flops['model']:.2f} "
    f"times the model's {si(flops['model'])}; {si(flops['kernels'])} of them in kernels",
    "",
    f"{'collective':<19}{'axes':<22}{'phase':<12}{'times':>6} {'each':>11} {'sent':>11} "
    f"{'time':>10}",
  ]
  for one in sorted(result["collectives"], key=lambda one: -one["seconds"]):
    if one["seconds"] < 1e-3 * seconds["step"]:
      continue
    lines.append(
      f"{one['kind']:<19}{'+'.join(one['axes']):<22}{one['phase'] or '-':<12}{one['times']:>6} "
      f"{gib(one['size']):>11} {gib(one['wire_bytes']):>11} {ms(one['seconds']):>10}"
    )
  small = [one for one in result["collectives"] if one["seconds"] < 1e-3 * seconds["step"]]
  if small:
    count, took = sum(one["times"] for one in small), sum(one["seconds"] for one in small)
    lines.append(f"{'smaller ones':<53}{count:>6} {'':>11} {'':>11} {ms(took):>10}")
  if result["cycles"]:
    lines += ["", *_cycles(result)]
  network = ", ".join(f"{axes} {ms(took)}" for axes, took in seconds["network"].items() if took)
  bounds = [f"compute {ms(seconds['compute'])}", f"memory {ms(seconds['memory'])}"]
  if seconds["compiler"]:
    bounds.append(f"compiler's estimate of both {ms(seconds['compiler'])}")
  if (chunks := result["config"]["model.moe.exchange_chunks"]) > 1:
    lines += ["", f"chunks         {chunks} in turn, of which none overlaps: they gain no time"]
  lines += [
    "",
    f"time           {', '.join(bounds)}",
    f"network        {network or 'nothing'}; the step waits for {ms(seconds['waited'])} of it",
    f"step           {ms(seconds['step'])} predicted, bound by {seconds['bound']}; "
    f"{result['tokens_per_second_per_device']:,.0f} tokens/s a device; "
    f"MFU at most {100 * result['mfu_ceiling']:.1f}%",
  ]
  return "\n".join(lines)


def _flags(result: dict[str, Any]) -> str:
  words = [f"{name}={value}" for name, value in result["flags"].items()]
  return ", ".join(words) or "none"


def _cycles(result: dict[str, Any]) -> list[str]:
  """Returns a table of the compiler's cycles by phase, beside the FLOPs of its products."""
  cycles, phases = result["cycles"], result["flops"]["phases"]
  total = sum(cycles.values())
  lines = [f"{'phase':<19}{'cycles':>10} {'share':>6}   {'FLOPs':>10}"]
  for phase, n in sorted(cycles.items(), key=lambda item: -item[1]):
    flops = phases.get(phase, 0)
    lines.append(
      f"{phase or 'none':<19}{si(n):>10} {n / total:>6.1%}   {si(flops) if flops else '':>10}"
    )
  return lines


def ms(seconds: float) -> str:
  """Formats seconds as milliseconds."""
  return "?" if math.isnan(seconds) else f"{1e3 * seconds:,.1f} ms"
