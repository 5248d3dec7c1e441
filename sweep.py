"""Runs an ablation: python sweep.py --sweep=configs/sweeps/balance.py --out=runs/balance

Every arm and seed of the sweep file is trained and evaluated in a separate workdir. After an
interruption the same command continues. --launcher=slurm runs them as jobs of a cluster, in
launch/sweep.sbatch; --dry-run prints the commands, for another scheduler. --config.train.steps=20
changes a field in every arm. A sweep file is a Python program, and is run.
"""

import os
import pathlib
import sys

from moe_jax.errors import UserError
from moe_jax.start import command_line
from moe_jax.training import tracker

_PARSER = command_line.Parser(__doc__, fields=True)
_PARSER.flag("sweep", "", "a Python file with a question and get_sweep()")
_PARSER.flag("out", "", "the folder of the runs, created if it does not exist")
_PARSER.flag("jobs", 1, "runs at a time on this machine", at_least=1, at_most=1000)
_PARSER.flag("launcher", "local", "what runs them", ["local", "slurm"])
_PARSER.flag("slots", 0, "with --launcher=slurm: runs at a time; by default all", at_least=0)
_PARSER.flag("tracker", "", "a copy of each run's metrics goes there", ["", *tracker.NAMES])
_PARSER.flag("dry-run", False, "print the commands and do nothing")
_PARSER.flag("arms", [], "the arms to run; all by default")
_PARSER.flag("seeds", [], "the seeds to run; by default those of the sweep file")


def main() -> None:
  """Runs the sweep that the command line names."""
  args = _PARSER.read()
  for flag in ("sweep", "out"):
    if not getattr(args, flag):
      raise UserError(f"--{flag} is missing: --sweep=configs/sweeps/NAME.py --out=runs/NAME")
  if "://" in args.out:
    raise UserError(f"--out={args.out}: a sweep keeps its runs on this machine; name a folder")
  if not all(seed.isdecimal() for seed in args.seeds):
    raise UserError(f"--seeds={','.join(args.seeds)} are not integers from 0 up, 0,1,2")
  slurm = args.launcher == "slurm"
  if args.slots and not slurm:
    raise UserError(f"--slots={args.slots} belongs to --launcher=slurm; here it is --jobs")
  tracker.check(args.tracker)
  if args.tracker:
    os.environ[tracker.VARIABLE] = args.tracker  # which its runs inherit
  if not args.dry_run:
    command_line.check_folder("out", args.out)
  from moe_jax.sweep import runner  # imports jax

  code = runner.run_sweep(
    args.sweep,
    pathlib.Path(args.out),
    jobs=args.slots if slurm else args.jobs,
    dry_run=args.dry_run,
    arms=args.arms,
    seeds=[int(seed) for seed in args.seeds],
    overrides=args.overrides,
    cache_dir=args.cache_dir,
    tracker=args.tracker,
    slurm=slurm,
  )
  sys.exit(code)


if __name__ == "__main__":
  command_line.one_line_errors(main)
