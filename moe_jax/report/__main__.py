"""Compares runs: python -m moe_jax.report SWEEP_OUT | WORKDIR... [--out=DIR] [--target=ARM]
              python -m moe_jax.report --watch DIR...

Writes report.md and report.html. The report of a sweep is written into its folder. Without a sweep,
workdirs that differ only in their seeds are one arm, and the report is written into --out, by
default the folder that contains the workdirs. --watch writes nothing: it prints what each run below
the folders does now, in a terminal every few seconds.
"""

import pathlib
import sys
import tempfile

from moe_jax import errors
from moe_jax.errors import UserError
from moe_jax.report import watch
from moe_jax.start import command_line
from moe_jax.storage import workdir as workdir_lib

_PARSER = command_line.Parser(__doc__)
_PARSER.add_argument("workdirs", nargs="+", metavar="WORKDIR")
_PARSER.flag("out", "", "folder for the report on workdirs")
_PARSER.flag("target", "", "the arm that the others are compared with")
_PARSER.flag("watch", False, "print what each run below the folders does now")


def main() -> int:
  """Writes the report; returns the exit code."""
  args = _PARSER.read()
  if args.watch:
    watch.watch(args.workdirs)
    return 0
  from moe_jax.report import page, runs  # takes a second, for matplotlib

  if "://" in args.out or (not args.out and any("://" in name for name in args.workdirs)):
    raise UserError("--out: name a folder on this machine for the report on runs in a store")
  with tempfile.TemporaryDirectory() as folder:
    workdirs = [workdir_lib.fetched(name, pathlib.Path(folder)) for name in args.workdirs]
    if not (workdirs[0] / "sweep.json").is_file():
      out = pathlib.Path(args.out) if args.out else runs.parent(workdirs)
      report = page.compare_runs(workdirs, out, args.target)
    elif len(workdirs) > 1 or args.out or args.target:
      raise UserError(
        f"{workdirs[0]} is a sweep: name it alone, without --target and --out, which it sets"
      )
    else:
      report = page.compare(workdirs[0])
  for note in report.notes:
    errors.notice(note)
  print(f"wrote {report.page.with_suffix('.md')} and {report.page}")
  return report.code


if __name__ == "__main__":
  command_line.one_line_errors(lambda: sys.exit(main()))
