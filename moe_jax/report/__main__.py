"""Compares runs: python -m moe_jax.report SWEEP_OUT | WORKDIR... [--out=DIR] [--target=ARM]

Writes report.md and report.html. Without a sweep, workdirs that differ only in their seeds are one
arm; the folder of the report is the one that holds the workdirs, or --out.
"""

import argparse
import pathlib

from moe_jax import command_line
from moe_jax.config import UserError


def main() -> None:
  parser = argparse.ArgumentParser(
    prog="python -m moe_jax.report", description=__doc__, allow_abbrev=False,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )  # fmt: skip
  parser.add_argument("workdirs", nargs="+", type=pathlib.Path, metavar="WORKDIR")
  parser.add_argument("--out", type=pathlib.Path, help="folder of the report of some workdirs")
  parser.add_argument("--target", default="", help="the arm that the others are compared with")
  args = parser.parse_args()
  from moe_jax.report import compare, compare_runs, runs

  if (args.workdirs[0] / "sweep.json").is_file():
    if len(args.workdirs) > 1 or args.out or args.target:
      raise UserError(
        f"{args.workdirs[0]} is a sweep: name it alone, it has its own target and out"
      )
    path = compare(args.workdirs[0])
  else:
    out = args.out or runs.parent(args.workdirs)
    path = compare_runs(args.workdirs, out, args.target)
  print(f"wrote {path.with_suffix('.md')} and {path}")


if __name__ == "__main__":
  command_line.one_line_errors(main)
