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

from absl import flags

from moe_jax.errors import UserError
from moe_jax.start import command_line
from moe_jax.storage import workdir as workdir_lib

_WORKDIR = flags.DEFINE_string("workdir", "", "a run of train.py")
_STEP = flags.DEFINE_integer("step", 0, "checkpoint to evaluate; 0 is the newest", lower_bound=0)
_SPLITS = ["train", "validation", "test"]
_SPLIT = flags.DEFINE_enum("split", "validation", _SPLITS, "data split")
_ROUTING = flags.DEFINE_bool("routing", False, "write routing.json: the tokens of each expert")
_CAPACITY = flags.DEFINE_list("capacity_factors", [], "evaluation capacities; inf: no drops")
_CAUSAL = flags.DEFINE_bool("causal", False, "also measure the loss with the future hidden")
_MULTIHOST, _HEARTBEAT = command_line.multihost_flags()
_DOCUMENTS = flags.DEFINE_integer("documents", 0, "also of the N largest documents", lower_bound=0)
_DATA = ["data.path", "data.name", "data.text_field", *(f"data.{s}_split" for s in _SPLITS)]
for _name in _DATA:
  flags.DEFINE_string(_name, None, f"other text than the run's: in place of config.{_name}")
_TASKS = flags.DEFINE_list("tasks", [], "tasks of lm-eval to run (pip install 'moe_jax[eval]')")
_TASK_FOLDER = flags.DEFINE_string("task_folder", "", "a folder with YAML files of more tasks")
_FEWSHOT = flags.DEFINE_integer("fewshot", -1, "examples before a question; -1: as the task says")
_LIMIT = flags.DEFINE_integer("limit", 0, "questions of each task; 0: all", lower_bound=0)
_CHAT = flags.DEFINE_bool("apply_chat_template", False, "questions of --tasks as a chat's messages")
_SYSTEM = flags.DEFINE_string("system_instruction", "", "of --tasks: what stands before them")
_MULTITURN = flags.DEFINE_bool(
  "fewshot_as_multiturn", True, "with --apply_chat_template, examples are turns of the chat"
)
_TEXT = flags.DEFINE_string("text", "", "a text file whose perplexity is measured")
_STRIDE = flags.DEFINE_integer(
  "stride", 0, "tokens by which a window of the text moves on; 0: half of it", lower_bound=0
)
_BATCH = flags.DEFINE_integer("batch", 16, "rows of a batch, of --tasks and --text", lower_bound=1)


def main() -> None:
  """Evaluates the checkpoint that the flags name."""
  if not _WORKDIR.value:
    raise UserError("--workdir is missing: name a run of train.py")
  with command_line.importing():
    workdir_lib.read_config(workdir_lib.open_path(_WORKDIR.value))  # before any device is asked
  command_line.check_folder("workdir", _WORKDIR.value)
  factors = capacity_factors()
  if _TASKS.value or _TEXT.value:
    return of_other_text()
  with command_line.importing():
    from moe_jax import report
    from moe_jax.analysis import evaluation, specialisation
    from moe_jax.start import startup

  with startup.together(_MULTIHOST.value, _HEARTBEAT.value):
    result, routing = evaluation.run(
      _WORKDIR.value, _STEP.value, _SPLIT.value, capacity_factors=factors, causal=_CAUSAL.value,
      documents=_DOCUMENTS.value, routing=_ROUTING.value, data=other_data(),
    )  # fmt: skip
  if not result:
    return  # the first of several processes prints
  texts = [report.summary(_WORKDIR.value, result), evaluation.describe(result)]
  if routing:
    texts.append(specialisation.specialisation_table(routing))
  print("\n".join(filter(None, texts)))


def of_other_text() -> None:
  """Prints the results of --tasks and of --text."""
  if _MULTIHOST.value:
    raise UserError("--multihost: --tasks and --text run in one process, on all of its devices")
  from moe_jax.analysis import harness

  if _TEXT.value:
    print(harness.of_text(_WORKDIR.value, _STEP.value, _TEXT.value, _STRIDE.value, _BATCH.value))
  if _TASKS.value:
    chat = {
      "apply_chat_template": _CHAT.value, "fewshot_as_multiturn": _CHAT.value and _MULTITURN.value,
      "system_instruction": _SYSTEM.value or None,
    }  # fmt: skip
    table = harness.run_tasks(
      _WORKDIR.value, _STEP.value, _TASKS.value, _TASK_FOLDER.value, _FEWSHOT.value, _LIMIT.value,
      _BATCH.value, chat,
    )  # fmt: skip
    print(table)


def other_data() -> dict[str, str]:
  """Returns the fields of config.data that --data.path and the like name."""
  fields = {name.removeprefix("data."): flags.FLAGS[name].value for name in _DATA}
  given = {name: value for name, value in fields.items() if value is not None}
  return ({"name": "text"} if "path" in given else {}) | given


def capacity_factors() -> list[float]:
  """Returns the numbers of --capacity_factors; raises UserError for other text."""
  try:
    factors = [float(factor) for factor in _CAPACITY.value]
  except ValueError:
    factors = [0.0]
  if not all(factor > 0 for factor in factors):
    raise UserError(
      f"--capacity_factors={','.join(_CAPACITY.value)}: not a list of numbers above 0, as in "
      "0.5,1,2,inf (inf: no drops)"
    )
  return factors


if __name__ == "__main__":
  command_line.run(main)
