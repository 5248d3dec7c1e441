"""Compares runs: python -m moe_jax.report SWEEP_OUT | WORKDIR... [--out=DIR] [--target=ARM]

Writes report.md and report.html. The report of a sweep is written into its folder. Without a sweep,
workdirs that differ only in their seeds are one arm, and the report is written into --out, by
default the folder that contains the workdirs.
"""

import argparse
import pathlib

from moe_jax import command_line
from moe_jax.config import UserError


def main() -> None:
  """Parses the arguments and writes the report."""
  parser = argparse.ArgumentParser(
    prog="python -m moe_jax.report", description=__doc__, allow_abbrev=False,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )  # fmt: skip
  parser.add_argument("workdirs", nargs="+", type=pathlib.Path, metavar="WORKDIR")
  parser.add_argument("--out", type=pathlib.Path, help="folder for the report on workdirs")
  parser.add_argument("--target", default="", help="the arm that the others are compared with")
  args = parser.parse_args()
  from moe_jax.report import compare, compare_runs, runs

  if (args.workdirs[0] / "sweep.json").is_file():
    if len(args.workdirs) > 1 or args.out or args.target:
      raise UserError(
        f"{args.workdirs[0]} is a sweep: name it alone, without --target and --out, which it sets"
      )
    path = compare(args.workdirs[0])
  else:
    out = args.out or runs.parent(args.workdirs)
    path = compare_runs(args.workdirs, out, args.target)
  print(f"wrote {path.with_suffix('.md')} and {path}")


if __name__ == "__main__":
  command_line.one_line_errors(main)
