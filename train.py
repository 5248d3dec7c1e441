"""Trains a model: python train.py --config=configs/tiny_moe.py --workdir=runs/tiny

Any field can be overridden, as in --config.model.moe.num_experts=16. The same command resumes a run
that was interrupted. --config=WORKDIR takes the config of another run. --describe prints
parameters, FLOPs and memory and trains nothing; --diff prints what differs from the defaults.
--rehearse=N tries the job as N processes on this machine, at toy size (docs/launch.md).
"""

import os

from moe_jax.config import checks, override
from moe_jax.errors import UserError
from moe_jax.kernels.chips import CHIPS
from moe_jax.start import command_line
from moe_jax.training import tracker

_PARSER = command_line.Parser(__doc__, fields=True)
_PARSER.add_argument(
  "--config", action="append", default=[], help="a Python file, or the workdir of a run or import"
)
_PARSER.flag("workdir", "", "the run's folder; created if it is missing")
_PARSER.flag("describe", False, "print the model's size and cost, then exit")
_PARSER.flag("device", "", "with --describe: say whether the run fits this device", ["", *CHIPS])
_PARSER.flag("diff", False, "print what differs from the defaults, then exit")
_PARSER.multihost_flags()
_PARSER.flag("init_from", "", "begin with the parameters of another run: WORKDIR or WORKDIR:STEP")
_PARSER.flag("init_optimizer", False, "with --init_from: take that run's optimizer state, too")
_PARSER.flag(
  "placement",
  "saved",
  "with a checkpoint: where experts stand; balanced spreads heavy ones over devices",
  ["saved", "balanced"],
)
_PARSER.flag(
  "resume_step",
  -1,
  "go on from this checkpoint, and set newer ones aside; 0 begins again",
  at_least=-1,
)
_PARSER.flag(
  "replay", 0, "take this step again and say where it is not finite; writes nothing", at_least=0
)
_PARSER.flag(
  "rehearse", 0, "try the job as so many processes here, at toy size, then exit", at_least=2
)
_PARSER.flag(
  "tracker",
  os.environ.get(tracker.VARIABLE, ""),
  "a copy of the metrics goes there (docs/guide.md)",
  ["", *tracker.NAMES],
)
_PARSER.flag("profile", "", "trace the steps FIRST:LAST, both included, into WORKDIR/profile")


def main() -> None:
  """Does what the command line says."""
  args = _PARSER.read()
  if not args.config:
    raise UserError("--config is missing: name a file, --config=configs/tiny_moe.py")
  if len(args.config) > 1:
    raise UserError(f"--config={args.config[1]}: --config is given twice; name one file")
  config = override(command_line.load_file(args.config[0]), args.overrides)
  checks.check(config)  # all that can be said before jax is imported
  if args.device and not args.describe:
    raise UserError(f"--device={args.device} belongs to --describe; add it, or drop --device")
  if args.rehearse and (args.diff or args.describe):
    flag = "--diff" if args.diff else "--describe"
    raise UserError(f"{flag} with --rehearse={args.rehearse}: drop {flag} to rehearse the job")
  if args.diff:
    print(command_line.difference(config))
    return
  if args.describe:
    # No device is asked for.
    config = override(config, {"mesh.data": max(config.mesh.data, 1)})
    from moe_jax.model import cost
    from moe_jax.moe import validation
    from moe_jax.training import optimizers

    validation.validate(config)
    state = optimizers.abstract_state(config)
    print(cost.cost_report(config, state, args.device))
    return
  tracker.check(args.tracker)
  if not args.workdir:
    raise UserError("--workdir is missing: name the run's folder, --workdir=runs/NAME")
  if not args.rehearse:
    command_line.check_folder("workdir", args.workdir)
  with command_line.importing():
    from moe_jax.moe import validation  # imports jax, as the others do
    from moe_jax.start import rehearsal, startup
    from moe_jax.training import replay, run
    from moe_jax.training import setup as setup_lib

    validation.validate(config)

  if args.rehearse:
    return rehearsal.rehearse(config, args)
  with startup.together(args.multihost, args.heartbeat_timeout, config, saves=not args.replay):
    setup = setup_lib.prepare(config)
    if args.replay:
      replay.replay(setup, args.workdir, args.replay)
      return
    run.run(
      setup,
      args.workdir,
      init_from_flag=args.init_from,
      init_optimizer=args.init_optimizer,
      named=args.overrides,
      profile=args.profile,
      resume_step=args.resume_step,
      place_experts=args.placement == "balanced",
      tracker=args.tracker,
    )


if __name__ == "__main__":
  command_line.one_line_errors(main)
