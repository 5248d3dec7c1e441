"""python -m moe_jax.hf import|export|check: weights of Hugging Face checkpoints, in and out.

import --from=DIR --workdir=W   safetensors onto the mesh, piece by piece, and saved as a workdir
                                that eval.py, generate.py and train.py --init_from=W read;
                                --dry-run reads only headers, and says what it would take
export --workdir=W --to=DIR     safetensors, config.json and tokenizer that from_pretrained loads
check --from=DIR                ours and transformers' on one text: KL, top-1 agreement, by layer

docs/checkpoints.md says which families there are, and what is verified.
"""

import argparse
import pathlib
import sys

from moe_jax.config import Mesh
from moe_jax.errors import UserError
from moe_jax.start import command_line

_TEXT = "The quick brown fox jumps over the lazy dog. def main():\n  return 0\n"


def parse_arguments() -> argparse.Namespace:
  """Parses the command line."""
  parser = argparse.ArgumentParser(
    prog="python -m moe_jax.hf",
    description=__doc__,
    allow_abbrev=False,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  commands = parser.add_subparsers(dest="command", required=True)

  def command(name: str, help: str) -> argparse.ArgumentParser:
    return commands.add_parser(name, help=help, allow_abbrev=False)

  reading = command("import", "read a checkpoint into a new workdir")
  checking = command("check", "compare with transformers on a text")
  for parser_ in (reading, checking):
    parser_.add_argument("--from", dest="folder", required=True, help="folder of the checkpoint")
    for axis in ("fsdp", "expert", "tensor"):
      parser_.add_argument(
        f"--mesh.{axis}",
        dest=axis,
        type=int,
        default=1,
        help=f"devices along the mesh's {axis} axis (1)",
      )
  reading.add_argument("--workdir", help="new folder for the run")
  reading.add_argument("--dry-run", action="store_true", help="read headers only")
  checking.add_argument("--text", default="", help="a text file (a built-in sentence)")
  checking.add_argument("--tokens", type=int, default=256, help="tokens to compare (256)")
  writing = command("export", "write a run's checkpoint for transformers")
  writing.add_argument("--workdir", required=True, help="a run of train.py, or an import")
  writing.add_argument("--to", required=True, help="new folder for the checkpoint")
  writing.add_argument("--step", type=int, default=0, help="of the checkpoint; 0 is the newest")
  writing.add_argument("--family", default="", help="whose names to use (the first that fits)")
  writing.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
  writing.add_argument("--file_gb", type=float, default=5.0, help="size of a file (5)")
  return parser.parse_args()


def run_import(args: argparse.Namespace) -> None:
  """Imports a checkpoint, or says what that would take."""
  import jax

  from moe_jax import sharding
  from moe_jax.hf import importing
  from moe_jax.start import startup
  from moe_jax.storage import workdir as workdir_lib

  startup.start()
  made = importing.plan(args.folder, _mesh(args))
  print(importing.import_report(made), flush=True)
  if args.dry_run:
    return
  if not args.workdir:
    raise UserError("--workdir is missing: name a new folder for the run")
  command_line.check_folder("workdir", args.workdir)
  path = workdir_lib.open_new(args.workdir)
  mesh = sharding.make_mesh(made.config.mesh)
  with jax.set_mesh(mesh):
    importing.save_import(made, importing.read_weights(made, mesh, _progress), path)
  print(
    f"{path} holds it as step 0: eval.py and generate.py take --workdir={path}, "
    f"train.py --config={path} --init_from={path}"
  )


def run_export(args: argparse.Namespace) -> None:
  """Exports a run's checkpoint."""
  from moe_jax.hf import exporting
  from moe_jax.start import startup

  startup.start()
  loaded = exporting.load_run(args.workdir, args.step)
  known = loaded.beside / "family"
  first = known.read_text().strip() if known.is_file() else ""
  family = exporting.choose_family(loaded.config.model, args.family, first)
  target = pathlib.Path(args.to)
  exporting.export(loaded, family, target, args.dtype, int(args.file_gb * 1e9), _progress)
  print(
    f"{target} holds step {loaded.step} as {family.model_type} in {args.dtype}: "
    f"AutoModelForCausalLM.from_pretrained('{target}')"
  )


def run_check(args: argparse.Namespace) -> None:
  """Compares our model with transformers'."""
  import jax

  from moe_jax import sharding
  from moe_jax.data import text_files
  from moe_jax.hf import check, importing
  from moe_jax.start import startup

  startup.start()
  made = importing.plan(args.folder, _mesh(args))
  text = text_files.read_text("--text", args.text) if args.text else _TEXT
  ids_L = check.ids_of(made, text, args.tokens)
  mesh = sharding.make_mesh(made.config.mesh)
  with jax.set_mesh(mesh):
    ours = check.streams(made, importing.read_weights(made, mesh, _progress), ids_L)
  theirs = check.theirs(pathlib.Path(args.folder), ids_L)
  print(check.check_report(check.compare_streams(ours, theirs)))


def _mesh(args: argparse.Namespace) -> Mesh:
  import jax

  others = args.fsdp * args.expert * args.tensor
  if others < 1 or jax.device_count() < others:
    raise UserError(
      f"--mesh: fsdp={args.fsdp} x expert={args.expert} x tensor={args.tensor} needs {others} "
      f"devices, and there are {jax.device_count()}"
    )
  return Mesh(data=1, fsdp=args.fsdp, expert=args.expert, tensor=args.tensor)


def _progress(line: str) -> None:
  print(line, file=sys.stderr, flush=True)


def main() -> None:
  """Runs the command that the command line names."""
  args = parse_arguments()
  command_line.quiet()
  {"import": run_import, "export": run_export, "check": run_check}[args.command](args)


if __name__ == "__main__":
  command_line.one_line_errors(main)
