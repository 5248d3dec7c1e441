"""Runs an ablation: python sweep.py --sweep=configs/sweeps/balance.py --out=runs/balance

Every arm and seed of the sweep file is trained and evaluated in a separate workdir. After an
interruption the same command continues. --dry-run prints the commands, for a cluster's scheduler.
--config.train.steps=20 changes a field in every arm. A sweep file is a Python program, and is run.
"""

import pathlib
import sys
from typing import Any

from absl import flags

from moe_jax.errors import UserError
from moe_jax.start import command_line

_SWEEP = flags.DEFINE_string("sweep", "", "a Python file with a question and get_sweep()")
_OUT = flags.DEFINE_string("out", "", "the folder of the runs, created if it does not exist")
_JOBS = flags.DEFINE_integer("jobs", 1, "runs at a time", lower_bound=1, upper_bound=1000)
_DRY_RUN = flags.DEFINE_bool("dry-run", False, "print the commands and do nothing")
_ARMS = flags.DEFINE_list("arms", [], "the arms to run; all by default")
_SEEDS = flags.DEFINE_list("seeds", [], "the seeds to run; by default those of the sweep file")


def main(overrides: dict[str, Any]) -> None:
  """Runs the sweep that the flags name."""
  for flag in (_SWEEP, _OUT):
    if not flag.value:
      raise UserError(f"--{flag.name} is missing: --sweep=configs/sweeps/NAME.py --out=runs/NAME")
  if "://" in _OUT.value:
    raise UserError(f"--out={_OUT.value}: a sweep keeps its runs on this machine; name a folder")
  if not all(seed.isdecimal() for seed in _SEEDS.value):
    raise UserError(f"--seeds={','.join(_SEEDS.value)} are not integers from 0 up, 0,1,2")
  if not _DRY_RUN.value:
    command_line.check_folder("out", _OUT.value)
  from moe_jax.sweep import runner  # imports jax

  code = runner.run_sweep(
    _SWEEP.value,
    pathlib.Path(_OUT.value),
    jobs=_JOBS.value,
    dry_run=_DRY_RUN.value,
    arms=_ARMS.value,
    seeds=[int(seed) for seed in _SEEDS.value],
    overrides=overrides,
    cache_dir=flags.FLAGS.cache_dir,
  )
  sys.exit(code)


if __name__ == "__main__":
  command_line.run(main, overrides=True)
