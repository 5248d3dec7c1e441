"""Trains a model: python train.py --config=configs/tiny_moe.py --workdir=runs/tiny

Any field can be overridden, as in --config.model.moe.num_experts=16. The same command resumes a run
that was interrupted. --config=WORKDIR takes the config of another run. --describe prints
parameters, FLOPs and memory and trains nothing; --diff prints what differs from the defaults.
"""

from absl import flags
from ml_collections import config_flags

from moe_jax.config import Config, checks
from moe_jax.errors import UserError
from moe_jax.start import command_line


class _Parser(flags.ArgumentParser):
  """Reads a config with the same function as all other commands."""

  def parse(self, path: str) -> Config:
    return command_line.load_file(path)


_CONFIG = config_flags.DEFINE_config_file(
  "config", help_string="a Python config file, or the workdir of a run or an import"
)
flags.FLAGS["config"].parser = _Parser()
_WORKDIR = flags.DEFINE_string("workdir", "", "the run's folder; created if it is missing")
_DESCRIBE = flags.DEFINE_bool("describe", False, "print the model's size and cost, then exit")
# GB of memory, from the vendors' data sheets.
_GB = {"": 0, "v4": 32, "v5e": 16, "v5p": 95, "v6e": 32, "A100": 80, "H100": 80, "H200": 141}
_DEVICE = flags.DEFINE_enum(
  "device", "", list(_GB), "with --describe: say whether the run fits this device"
)
_DIFF = flags.DEFINE_bool("diff", False, "print what differs from the defaults, then exit")
_MULTIHOST, _HEARTBEAT = command_line.multihost_flags()
_INIT_FROM = flags.DEFINE_string(
  "init_from", "", "begin a new run with another run's parameters: WORKDIR or WORKDIR:STEP"
)
_INIT_OPTIMIZER = flags.DEFINE_bool(
  "init_optimizer", False, "with --init_from: take that run's optimizer state, too"
)
_RESUME_STEP = flags.DEFINE_integer(
  "resume_step", -1, "go on from this checkpoint, and set newer ones aside; 0 begins again",
  lower_bound=-1,
)  # fmt: skip
_REPLAY = flags.DEFINE_integer(
  "replay", 0, "take this step again and say where it is not finite; writes nothing", lower_bound=0
)
_PROFILE = flags.DEFINE_string(
  "profile", "", "trace the steps FIRST:LAST, both included, into WORKDIR/profile"
)


def main() -> None:
  config = _CONFIG.value
  if config is None:
    raise UserError("--config is missing: name a file, --config=configs/tiny_moe.py")
  checks.check(config)  # all that can be said before jax is imported
  if _DEVICE.value and not _DESCRIBE.value:
    raise UserError(f"--device={_DEVICE.value} belongs to --describe; add it, or drop --device")
  if _DIFF.value:
    print(command_line.difference(config))
    return
  if _DESCRIBE.value:
    config.mesh.data = max(config.mesh.data, 1)  # no device is asked for
    from moe_jax.model import cost
    from moe_jax.moe import validation
    from moe_jax.training import optimizers

    validation.validate(config)
    state = optimizers.abstract_state(config)
    print(cost.report(config, state, _DEVICE.value, _GB[_DEVICE.value]))
    return
  if not _WORKDIR.value:
    raise UserError("--workdir is missing: name the run's folder, --workdir=runs/NAME")
  command_line.check_folder("workdir", _WORKDIR.value)
  with command_line.importing():
    from moe_jax.moe import validation  # imports jax, as the others do
    from moe_jax.start import startup
    from moe_jax.training import replay, run

    validation.validate(config)

  with startup.together(_MULTIHOST.value, _HEARTBEAT.value, saves=not _REPLAY.value):
    if _REPLAY.value:
      replay.replay(config, _WORKDIR.value, _REPLAY.value)
      return
    run.run(
      config,
      _WORKDIR.value,
      init_from_flag=_INIT_FROM.value,
      init_optimizer=_INIT_OPTIMIZER.value,
      named=config_flags.get_override_values(flags.FLAGS["config"]),
      profile=_PROFILE.value,
      resume_step=_RESUME_STEP.value,
    )


if __name__ == "__main__":
  command_line.run(main)
