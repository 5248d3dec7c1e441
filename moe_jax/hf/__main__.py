"""python -m moe_jax.hf import|export|check: weights of Hugging Face checkpoints, in and out.

import --from=DIR --workdir=W   safetensors onto the mesh, piece by piece, and saved as a workdir
                                that eval.py, generate.py and train.py --init_from=W read;
                                --dry-run reads only headers, and says what it would take
export --workdir=W --to=DIR     safetensors, config.json and tokenizer that from_pretrained loads
check --from=DIR                ours and transformers' on one text: KL, top-1 agreement, by layer

docs/checkpoints.md says which families there are, and what is verified.
"""

import argparse
import math
import pathlib
import sys
from typing import Any

from moe_jax.config import Mesh
from moe_jax.errors import UserError
from moe_jax.start import command_line

_TEXT = "The quick brown fox jumps over the lazy dog. def main():\n  return 0\n"


# Commands that have the flag, its name, default and meaning, and the words that it can have.
_FLAGS: tuple[tuple[Any, ...], ...] = (
  ("import check", "from", "", "folder of the checkpoint"),
  ("import check", "mesh.fsdp", 1, "devices along the mesh's fsdp axis"),
  ("import check", "mesh.expert", 1, "devices along the mesh's expert axis"),
  ("import check", "mesh.tensor", 1, "devices along the mesh's tensor axis"),
  ("import export", "workdir", "", "of import a new folder for the run, of export a run"),
  ("import", "dry-run", False, "read headers only"),
  ("check", "text", "", "a text file; else a built-in sentence"),
  ("check", "tokens", 256, "tokens to compare"),
  ("export", "to", "", "new folder for the checkpoint"),
  ("export", "step", 0, "of the checkpoint; 0 is the newest"),
  ("export", "family", "", "whose names to use; else the first that fits"),
  ("export", "dtype", "float32", "of the tensors", ["float32", "bfloat16", "float16"]),
  ("export", "file_gb", 5.0, "size of a file"),
)


def run_import(args: argparse.Namespace) -> None:
  """Imports a checkpoint, or says what that would take."""
  import jax

  from moe_jax import sharding
  from moe_jax.hf import importing
  from moe_jax.start import startup
  from moe_jax.storage import workdir as workdir_lib

  startup.start()
  made = importing.plan(_given(args, "from"), _mesh(args))
  print(importing.import_report(made), flush=True)
  if args.dry_run:
    return
  command_line.check_folder("workdir", _given(args, "workdir"))
  path = workdir_lib.open_new(args.workdir)
  mesh = sharding.make_mesh(made.config.mesh)
  with jax.set_mesh(mesh):
    importing.save_import(made, importing.read_weights(made, mesh), path)
  print(
    f"{path} holds it as step 0: eval.py and generate.py take --workdir={path}, "
    f"train.py --config={path} --init_from={path}"
  )


def run_export(args: argparse.Namespace) -> None:
  """Exports a run's checkpoint."""
  from moe_jax.hf import exporting
  from moe_jax.start import startup

  startup.start()
  target = pathlib.Path(_given(args, "to"))
  loaded = exporting.load_run(_given(args, "workdir"), args.step)
  known = loaded.beside / "family"
  first = known.read_text().strip() if known.is_file() else ""
  family = exporting.choose_family(loaded.config.model, args.family, first)
  exporting.export(loaded, family, target, args.dtype, int(args.file_gb * 1e9))
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
  made = importing.plan(_given(args, "from"), _mesh(args))
  text = text_files.read_text("--text", args.text) if args.text else _TEXT
  ids_L = check.ids_of(made, text, args.tokens)
  mesh = sharding.make_mesh(made.config.mesh)
  with jax.set_mesh(mesh):
    ours = check.streams(made, importing.read_weights(made, mesh), ids_L)
  theirs = check.theirs(made.stored.folder, ids_L)
  print(check.check_report(check.compare_streams(ours, theirs)))


def _given(args: argparse.Namespace, name: str) -> str:
  if not (value := getattr(args, name)):
    raise UserError(f"--{name} is missing: name a folder")
  return value


def _mesh(args: argparse.Namespace) -> Mesh:
  import jax

  axes = {axis: getattr(args, f"mesh.{axis}") for axis in ("fsdp", "expert", "tensor")}
  others = math.prod(axes.values())
  if others < 1 or jax.device_count() < others:
    raise UserError(
      f"--mesh: {' x '.join(f'{axis}={size}' for axis, size in axes.items())} needs {others} "
      f"devices, and there are {jax.device_count()}"
    )
  return Mesh(data=1, **axes)


def main() -> None:
  """Runs the command that the command line names."""
  commands = {"import": run_import, "export": run_export, "check": run_check}
  parser = command_line.Parser(__doc__)
  parser.add_argument("command", choices=commands)
  asked = " ".join(sys.argv[1:2])
  for of, *flag in _FLAGS:
    if asked in of.split() or asked not in commands:  # as with --help
      parser.flag(*flag)
  args = parser.read()
  commands[args.command](args)


if __name__ == "__main__":
  command_line.one_line_errors(main)
