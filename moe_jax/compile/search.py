"""Looks for the layout with which a training step is fastest: ranks all, compiles the best few."""

import hashlib
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from moe_jax import sharding
from moe_jax.compile import expected as expected_lib
from moe_jax.compile import programs, report, targets
from moe_jax.compile.expected import Expected, fields, fits
from moe_jax.compile.targets import Target
from moe_jax.config import Config
from moe_jax.config.run import to_json
from moe_jax.errors import UserError
from moe_jax.model.cost import gib
from moe_jax.moe import validation
from moe_jax.start import progress
from moe_jax.storage import cache, files


class Tried(NamedTuple):
  """A layout that was compiled."""

  expected: Expected
  result: dict[str, Any] | None  # of report.as_json
  refused: str  # why there is none


def search(
  config: Config, target: Target, compiles: int, say: Callable[[str], None]
) -> tuple[list[Expected], list[Tried]]:
  """Ranks all layouts by their expected time, and compiles the best.

  Args:
    config: whose mesh, remat policy, microbatches and exchange are replaced.
    target: the devices.
    compiles: how many layouts to compile; a result is kept in the cache.
    say: prints a line of progress.

  Raises:
    UserError: no layout suits the devices.
  """
  found = expected_lib.ranked(config, target)
  if not found:
    raise UserError(
      f"--chips: no mesh splits data.batch_size={config.data.batch_size} rows and the model over "
      f"{target.devices} devices; change the batch or the number of devices"
    )
  say(f"{len(found)} layouts, of which {sum(fits(e, target) for e in found)} are expected to fit")
  tried: list[Tried] = []
  chosen, start = _distinct(found, target)[:compiles], time.monotonic()
  for number, one in enumerate(chosen):
    each = (time.monotonic() - start) / max(number, 1)
    left = f", ETA {progress.clock(each * (len(chosen) - number))}" if number else ""
    say(f"compiling {number + 1} of {len(chosen)}{left}: {fields(one.config)}")
    tried.append(_compiled(one, target, say))
  check_remat([t.result for t in tried if t.result])
  return found, sorted(tried, key=lambda t: t.result["seconds"]["step"] if t.result else 1e9)


def _distinct(found: list[Expected], target: Target) -> list[Expected]:
  """Returns the best layout of each expert axis, then the others that fit, the best first."""
  fitting = [one for one in found if fits(one, target)] or found
  first = {one.config.mesh.expert: one for one in reversed(fitting)}
  best = sorted(first.values(), key=fitting.index)
  return best + [one for one in fitting if one not in best]


def check_remat(results: list[dict[str, Any]]) -> None:
  """Refuses two remat policies that need the same memory on one mesh: one of them does nothing."""
  for one in results:
    for other in results:
      differ = {name for name, value in one["config"].items() if other["config"][name] != value}
      if differ == {"model.remat"} and one["memory"] == other["memory"]:
        words = " and ".join(r["config"]["model.remat"] for r in (one, other))
        raise UserError(
          f"config.model.remat={words} need the same {gib(one['memory']['peak'])}: one of the two "
          "does nothing"
        )


def _compiled(expected: Expected, target: Target, say: Callable[[str], None]) -> Tried:
  """Compiles a layout, or reads what an earlier search found of it."""
  text = json.dumps([str(target), to_json(expected.config), jax.__version__, _code()])
  folder = cache.directory() / "compiled"
  cache.make(folder)
  path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
  if not path.exists():
    kept: dict[str, Any] = {}
    try:
      compiled = programs.compile_for(expected.config, target, "train", say)
      kept = {"result": report.as_json(compiled, target, "train"), "refused": ""}
    except programs.DoesNotFitError as error:
      kept = {"result": None, "refused": f"does not fit: {error}"}
    files.write_json(path, kept)
  kept = files.read_json(path, "remove it")
  return Tried(expected, kept["result"], kept["refused"])


def _code() -> str:
  """Returns a digest of the package's code: another step is another program."""
  root = pathlib.Path(programs.__file__).parents[1]
  digest = hashlib.sha256()
  for path in sorted(root.rglob("*.py")):
    digest.update(path.read_bytes())
  return digest.hexdigest()


def page(found: list[Expected], tried: list[Tried], target: Target, rows: int = 12) -> str:
  """Returns what a search found: the compiled layouts, then those that lose and why."""
  lines = [str(target), *(["", "compiled, the fastest first"] if tried else [])]
  best = next((t.result for t in tried if t.result), None)
  for layout, result, refused in tried:
    words = fields(layout.config)
    if result is None:
      lines.append(f"  {refused}: {words}")
      continue
    step, memory = result["seconds"]["step"], gib(result["memory"]["peak"])
    lines.append(f"  {report.ms(step):>12}  MFU <= {result['mfu_ceiling']:.1%}  {memory}  {words}")
    lines.append(f"      expected {report.ms(layout.times.step)}; {_why(result, best)}")
  lines += ["", "expected, from shapes alone"]
  first = found[0]
  for one in found[:rows]:
    step, memory = report.ms(one.times.step), gib(one.memory)
    lines.append(f"  {step:>12}  MFU <= {one.mfu:.1%}  {memory}  {fields(one.config)}")
    lines.append(f"      {_loses(one, first, target)}")
  return "\n".join(lines)


def _why(result: dict[str, Any], best: dict[str, Any] | None) -> str:
  seconds = result["seconds"]
  parts = f"bound by {seconds['bound']}, waits {report.ms(seconds['waited'])} for the network"
  if result is best or best is None:
    return parts
  return f"{seconds['step'] / best['seconds']['step'] - 1:+.0%}: {parts}"


def _loses(one: Expected, best: Expected, target: Target) -> str:
  if one is best:
    return f"the best: bound by {one.times.bound}"
  if not fits(one, target):
    return f"does not fit: {gib(one.memory)} of {gib(target.chip.memory)}"
  ours, theirs = one.times, best.times
  reasons = {
    "computes more again": ours.compute - theirs.compute,
    "waits longer for rows or sums": ours.waited - theirs.waited,
    "moves more weights": sum(ours.network.values()) - ours.waited
    - (sum(theirs.network.values()) - theirs.waited),
    "reads more memory": ours.memory - theirs.memory,
  }  # fmt: skip
  if round(ours.step, 3) <= round(theirs.step, 3):
    return f"as fast, but needs {gib(one.memory - best.memory)} more"
  return f"{ours.step / theirs.step - 1:+.0%}: {max(reasons, key=reasons.__getitem__)}"


def remedy(config: Config, target: Target) -> str:
  """Returns what would make a step fit: another layout on the devices, or more devices."""
  refused = expected_lib.expect(validation.resolve_mesh(config, target.devices), target).memory
  ranked = expected_lib.ranked(config, target)
  fitting = [one for one in ranked if fits(one, target) and one.memory < 0.9 * refused]
  if fitting:
    return f"by shapes alone this would fit: {fields(fitting[0].config)}"
  for larger in targets.all_sizes(target):
    if larger.devices <= target.devices:
      continue
    fitting = [one for one in expected_lib.ranked(config, larger) if fits(one, larger)]
    if fitting:
      return f"by shapes alone {larger.name} would do: {fields(fitting[0].config)}"
  return "no layout of it is expected to fit any slice of these chips; choose a smaller model"


def curve(config: Config, target: Target) -> list[tuple[int, Expected]]:
  """Returns (chips, the best layout that fits) of each number of chips that has one."""
  found = []
  for other in targets.all_sizes(target):
    best = next((one for one in expected_lib.ranked(config, other) if fits(one, other)), None)
    if best is not None:
      found.append((other.devices, best))
  return found


def plot(
  points: list[tuple[int, Expected]], config: Config, target: Target, out: pathlib.Path
) -> None:
  """Draws the predicted time of a step against the number of devices."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
  chips = [n for n, _ in points]
  axes.loglog(chips, [one.times.step for _, one in points], "o-", label="predicted")
  axes.loglog(chips, [points[0][1].times.step * chips[0] / n for n in chips], ":", label="ideal")
  for n, one in points:
    mesh = one.config.mesh
    word = " x ".join(f"{a} {getattr(mesh, a)}" for a in sharding.AXES if getattr(mesh, a) > 1)
    axes.annotate(word, (n, one.times.step), textcoords="offset points", xytext=(4, 6), fontsize=7)
  axes.set(xlabel=f"{target.family} devices", ylabel="seconds of a step")
  axes.set_title(f"{config.data.batch_size} x {config.data.seq_len} tokens a step, best layout")
  axes.legend()
  figure.savefig(out, dpi=150)
  pyplot.close(figure)
