"""Compares the results of two commits: python benchmarks/compare.py OLD.json NEW.json

A line for each aim that both files have, with its two values and their ratio; then the aims that
only one has. Ends with 1 where an aim that was met is missed now, otherwise with 0.
"""

import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # where this file is run by its path

from benchmarks import results
from moe_jax.errors import UserError
from moe_jax.start import command_line


def aims(result: Any) -> Iterator[dict[str, Any]]:
  """Yields the aims of a result, and of the results in it."""
  if isinstance(result, dict):
    yield from result.get("targets", ())
    for part in result.values():
      yield from aims(part)


def read(path: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
  """Returns the environment of a result, and its aims by name."""
  try:
    result = json.loads(pathlib.Path(path).read_text())
    return result["environment"], {aim["what"]: aim for aim in aims(result)}
  except OSError as error:
    raise UserError(f"{path}: {error.strerror}") from None
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(f"{path} is not a result of `python -m benchmarks` ({error!r})") from None


def compare(old_path: str, new_path: str) -> int:
  """Prints the comparison; returns how many aims that were met are missed now."""
  (old_place, old), (new_place, new) = read(old_path), read(new_path)
  for name in ("commit", "device", "cpus", "jax"):
    before, after = old_place.get(name), new_place.get(name)
    print(f"{name:<8} {before}" + ("" if before == after else f" -> {after}"))
  if old_place.get("device") != new_place.get("device"):
    print("Times of two devices: compare only how far each is from its aims.")
  lines, lost = [], 0
  for what in (name for name in new if name in old):
    before, after = old[what], new[what]
    ratio = after["measured"] / before["measured"] if before["measured"] else float("nan")
    lost += before["met"] and not after["met"]
    was = "met" if before["met"] else "missed"
    verdict = after["verdict"] if before["met"] == after["met"] else f"{was} -> {after['verdict']}"
    bound = f"{'>=' if after['at_least'] else '<='} {after['limit']:.2f}"
    lines.append(
      [
        what,
        f"{before['measured']:.2f}",
        f"{after['measured']:.2f}",
        f"{ratio:.2f}",
        bound,
        verdict,
      ]
    )
  print("\n" + results.table(["aim", "old", "new", "new / old", "limit", ""], lines))
  for path, only in ((old_path, old.keys() - new.keys()), (new_path, new.keys() - old.keys())):
    for what in sorted(only):
      print(f"only in {path}: {what}")
  print(results.met(list(new.values())))
  return lost


def main() -> None:
  """Compares the two files that the command line names."""
  if len(sys.argv) != 3:
    raise UserError("usage: python benchmarks/compare.py OLD.json NEW.json")
  sys.exit(compare(*sys.argv[1:]) > 0)


if __name__ == "__main__":
  command_line.one_line_errors(main)
