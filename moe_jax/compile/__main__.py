"""Compiles a run's step for devices that are not here, and says what it will cost there.

python -m moe_jax.compile --config=configs/mixtral_8x7b.py --topology=v5p-128

The step is the real one; a machine without the devices compiles it in a minute or two. Topologies:
v4, v5e, v5p, v6e and tpu7x as Google Cloud names their slices (v5p-128) or by their torus
(v5p:4x4x4), and GPUs by their number (h100-64, h200-8, b200-64).

python -m moe_jax.compile --search --chips=64 --topology=v5p --config=FILE --out=FOLDER

ranks all layouts of the mesh, remat, microbatches and exchange by their expected time, compiles the
best few, says why each loses, and draws the time against the number of devices.
"""

import os
import pathlib

from moe_jax.compile.environment import ENVIRONMENT
from moe_jax.config import checks, override
from moe_jax.errors import UserError, notice
from moe_jax.start import command_line

_PARSER = command_line.Parser(__doc__, fields=True)
_PARSER.flag("config", "", "a Python file, or the workdir of a run")
_PARSER.flag("topology", "", "the devices: v5p-128, v5p:4x4x4, h200-64")
_PARSER.flag("slices", 1, "how many such slices of TPUs", at_least=1)
_PARSER.flag("mode", "train", "the program", ["train", "prefill", "decode"])
_PARSER.flag("search", False, "look for the best layout")
_PARSER.flag("chips", 0, "with --search: how many, of the kind that --topology names", at_least=0)
_PARSER.flag("compiles", 3, "with --search: how many layouts to compile", at_least=0)
_PARSER.flag("out", "", "with --search: a folder for the plot")
_PARSER.flag("json", "", "write the result into this file too")
_PARSER.flag("hlo", "", "write the compiled program's text into this file")


def main() -> None:
  """Does what the command line says."""
  args = _PARSER.read()
  if not args.config or not args.topology:
    raise UserError("--config and --topology are needed: --config=FILE --topology=v5p-128")
  config = override(command_line.load_file(args.config), args.overrides)
  checks.check(config)
  os.environ.update(ENVIRONMENT)  # before jax starts
  os.environ.pop("XLA_FLAGS", None)  # those of another platform
  with command_line.importing():
    from moe_jax.compile import programs, report, search, targets
    from moe_jax.start import flags
    from moe_jax.storage import files

  if args.search:
    target = (targets.of_chips(args.topology, args.chips) if args.chips
              else targets.parse(args.topology, args.slices))  # fmt: skip
    found, tried = search.search(config, target, args.compiles, notice)
    print(search.page(found, tried, target))
    if args.out:
      plot = pathlib.Path(args.out) / "step_time.png"
      plot.parent.mkdir(parents=True, exist_ok=True)
      search.plot(search.curve(config, target), config, target, plot)
      print(f"wrote {plot}")
    return
  target = targets.parse(args.topology, args.slices)
  try:
    set_flags: list[flags.Flag] | None = [] if args.platform_flags == "off" else None
    compiled = programs.compile_for(config, target, args.mode, notice, set_flags)
  except programs.DoesNotFitError as error:
    what = search.remedy(config, target) if args.mode == "train" else "take more devices"
    raise programs.DoesNotFitError(f"does not fit: {error}; {what}") from None
  if args.hlo:
    files.write(pathlib.Path(args.hlo), compiled.hlo)
  result = report.as_json(compiled, target, args.mode)
  if args.json:
    files.write_json(pathlib.Path(args.json), result)
  print(report.page(result))


if __name__ == "__main__":
  command_line.one_line_errors(main)
