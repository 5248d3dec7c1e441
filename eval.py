"""Evaluates a checkpoint: python eval.py --workdir=runs/tiny [--step=N] [--split=test]

Reads only the workdir and the data. Prints the held-out loss, perplexity, bits per byte beside
gzip's, and the routing report; writes eval.json and the plots. Options (docs/specialisation.md):

  --routing                       which expert takes which tokens: routing.json
  --capacity_factors=0.5,1,2,inf  loss and drops with other evaluation capacities (inf: no drops)
  --causal                        the loss with every token's future hidden from the routers
  --documents=10                  the losses of the ten largest documents

  --data.path=FOLDER              other text than the run's: eval_data.json

In place of the split (docs/checkpoints.md):

  --tasks=hellaswag,gsm8k         tasks of lm-eval: tasks.json
  --text=FILE                     the perplexity of a text file, in windows that overlap
"""

import argparse

from moe_jax.errors import UserError
from moe_jax.start import command_line
from moe_jax.storage import workdir as workdir_lib

_SPLITS = ["train", "validation", "test"]
_DATA = ["data.path", "data.name", "data.column", *(f"data.{s}_split" for s in _SPLITS)]

_PARSER = command_line.Parser(__doc__)
_PARSER.flag("workdir", "", "a run of train.py")
_PARSER.flag("step", 0, "checkpoint to evaluate; 0 is the newest", at_least=0)
_PARSER.flag("split", "validation", "data split", _SPLITS)
_PARSER.flag("routing", False, "write routing.json: the tokens of each expert")
_PARSER.flag("capacity_factors", [], "evaluation capacities; inf: no drops")
_PARSER.flag("causal", False, "also measure the loss with the future hidden")
_PARSER.multihost_flags()
_PARSER.flag("documents", 0, "also of the N largest documents", at_least=0)
for _name in _DATA:
  _PARSER.add_argument(f"--{_name}", help=f"other text than the run's, for config.{_name}")
_PARSER.flag("tasks", [], "tasks of lm-eval to run (pip install 'moe_jax[eval]')")
_PARSER.flag("task_folder", "", "a folder with YAML files of more tasks")
_PARSER.flag("fewshot", -1, "examples before a question; -1: as the task says")
_PARSER.flag("limit", 0, "questions of each task; 0: all", at_least=0)
_PARSER.flag("apply_chat_template", False, "questions of --tasks as a chat's messages")
_PARSER.flag("system_instruction", "", "of --tasks: what stands before them")
_PARSER.flag("nofewshot_as_multiturn", False, "examples are no turns of --apply_chat_template")
_PARSER.flag("text", "", "a text file whose perplexity is measured")
_PARSER.flag("stride", 0, "tokens from a window of the text to the next; 0: half", at_least=0)
_PARSER.flag("batch", 16, "rows of a batch, of --tasks and --text", at_least=1)


def main() -> None:
  """Evaluates the checkpoint that the command line names."""
  args = _PARSER.read()
  if not args.workdir:
    raise UserError("--workdir is missing: name a run of train.py")
  with command_line.importing():
    config = workdir_lib.read_config(
      workdir_lib.open_path(args.workdir)
    )  # before any device is asked
  command_line.check_folder("workdir", args.workdir)
  factors = capacity_factors(args)
  if args.tasks or args.text:
    return of_other_text(args)
  with command_line.importing():
    from moe_jax.analysis import evaluation, specialisation
    from moe_jax.report import single
    from moe_jax.start import startup
    from moe_jax.training import tracker

  with startup.together(args.multihost, args.heartbeat_timeout, config):
    result, routing = evaluation.evaluate_run(
      args.workdir,
      args.step,
      args.split,
      capacity_factors=factors,
      causal=args.causal,
      documents=args.documents,
      routing=args.routing,
      data=other_data(args),
    )
  if not result:
    return  # the first of several processes prints
  texts = [single.summary(args.workdir, result), evaluation.describe(result)]
  if routing:
    texts.append(specialisation.specialisation_table(routing))
  print("\n".join(filter(None, texts)))
  tracker.attach_plots(workdir_lib.open_path(args.workdir))


def of_other_text(args: argparse.Namespace) -> None:
  """Prints the results of --tasks and of --text."""
  if args.multihost:
    raise UserError("--multihost: --tasks and --text run in one process, on all of its devices")
  from moe_jax.analysis import harness

  if args.text:
    print(harness.perplexity_of_text(args.workdir, args.step, args.text, args.stride, args.batch))
  if args.tasks:
    chat = {
      "apply_chat_template": args.apply_chat_template,
      "fewshot_as_multiturn": args.apply_chat_template and not args.nofewshot_as_multiturn,
      "system_instruction": args.system_instruction or None,
    }
    table = harness.run_tasks(
      args.workdir,
      args.step,
      args.tasks,
      args.task_folder,
      args.fewshot,
      args.limit,
      args.batch,
      chat,
    )
    print(table)


def other_data(args: argparse.Namespace) -> dict[str, str]:
  """Returns the fields of config.data that --data.path and the like name."""
  given = {n.removeprefix("data."): v for n in _DATA if (v := getattr(args, n)) is not None}
  alone = {"mixture": ""} if given.keys() & {"path", "name"} else {}
  return alone | ({"name": "text"} if "path" in given else {}) | given


def capacity_factors(args: argparse.Namespace) -> list[float]:
  """Returns the numbers of --capacity_factors; raises UserError for other text."""
  try:
    factors = [float(factor) for factor in args.capacity_factors]
  except ValueError:
    factors = [0.0]
  if not all(factor > 0 for factor in factors):
    raise UserError(
      f"--capacity_factors={','.join(args.capacity_factors)}: not a list of numbers above 0, as in "
      "0.5,1,2,inf (inf: no drops)"
    )
  return factors


if __name__ == "__main__":
  command_line.one_line_errors(main)
