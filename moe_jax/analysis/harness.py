"""Runs tasks of lm-eval (EleutherAI's harness) on a run, and measures the perplexity of any text.

lm-eval is the extra `eval`. A task reads its data from the Hugging Face hub, or from local files
that a task's YAML file names.
"""

import functools
import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from moe_jax.analysis import scoring
from moe_jax.data import text_files, tokenizers
from moe_jax.errors import UserError, notice
from moe_jax.inference import chat
from moe_jax.inference.generate import TextGenerator
from moe_jax.inference.loaded import LoadedModel
from moe_jax.storage import files
from moe_jax.storage import workdir as workdir_lib

TASKS = "tasks.json"
_LONGEST = 256  # tokens that are generated where a task names no number


def perplexity_of_text(workdir: str, step: int, path: str, stride: int, batch: int) -> str:
  """Measures the perplexity of a text file, and returns a line about it.

  Windows of config.data.seq_len tokens move on by `stride`, 0 for half of it; `batch` of them are
  computed together.
  """
  content = text_files.read_text("--text", path)
  length = workdir_lib.read_config(workdir_lib.open_path(workdir)).data.seq_len
  stride = stride or max(length // 2, 1)
  if stride > length:
    raise UserError(f"--stride={stride} is over config.data.seq_len={length}: it would skip text")
  text = LoadedModel(workdir, step)
  ids = text.tokenizer.encode(content).tolist()
  loss, bits = perplexity(text, ids, length, stride, batch)
  return (
    f"{path}: loss {loss:.4f}, perplexity {math.exp(min(loss, 700)):.4f}, bits per byte "
    f"{bits:.4f} of {len(ids):,} tokens; windows of {length}, stride {stride}"
  )


def perplexity(
  text: TextGenerator, ids: Sequence[int], length: int, stride: int, batch: int
) -> tuple[float, float]:
  """Returns the loss of the ids of a text, in nats per token, and its bits per byte.

  They are scored in windows of `length` that move by `stride`.
  """
  before = text.before or [text.tokenizer.prefix]
  rows = list(scoring.windows(before, ids, length, stride))
  if not rows:
    raise UserError("--text: the file is empty")
  (scores,) = scoring.scores_of_windows(text, [rows], batch, _progress("windows", len(rows)))
  total = -math.fsum(scores.log_probs)
  size = int(text.tokenizer.bytes_V[list(ids)].sum())
  return total / len(ids), total / math.log(2) / size


def _progress(what: str, total: int) -> Any:
  def say(done: int) -> None:
    end = "\n" if done == total else "\r"
    print(f"{done:,} of {total:,} {what}", end=end, file=sys.stderr, flush=True)

  return say


def run_tasks(
  workdir: str,
  step: int,
  tasks: list[str],
  folder: str,
  fewshot: int,
  limit: int,
  batch: int,
  options: Mapping[str, Any],
) -> str:
  """Runs tasks and writes their results to tasks.json in the workdir; returns a table of them.

  Args:
    step: of the checkpoint; 0 is the newest.
    folder: with YAML files of more tasks; "" for none.
    fewshot: examples before each question; -1 for the number that the task names.
    limit: questions of each task; 0 for all.
    batch: rows that are computed together.
    options: further ones of lm_eval.simple_evaluate: apply_chat_template, system_instruction, ...

  Raises:
    UserError: lm-eval is missing, or has no such task.
  """
  try:
    import lm_eval
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table
  except ImportError:
    raise UserError("--tasks needs lm-eval: pip install 'moe_jax[eval]'") from None
  manager = TaskManager(include_path=folder or None)
  if unknown := [task for task in tasks if task not in manager.all_tasks]:
    raise UserError(
      f"--tasks={','.join(tasks)}: lm-eval has no {', '.join(unknown)}; `lm-eval ls tasks` lists "
      "them, and --task_folder names a folder of your own"
    )
  results = lm_eval.simple_evaluate(
    model=language_model(workdir, step, batch),
    tasks=tasks,
    task_manager=manager,
    num_fewshot=None if fewshot < 0 else fewshot,
    limit=limit or None,
    log_samples=False,
    **options,
  )
  kept = {key: results[key] for key in ("results", "versions", "n-shot", "n-samples")}
  path = workdir_lib.open_path(workdir) / TASKS
  files.write(path, json.dumps({"lm_eval": lm_eval.__version__} | kept, indent=2, default=str))
  return make_table(results)


def language_model(workdir: str, step: int, batch: int) -> Any:
  """Returns a run as a language model of lm-eval (lm_eval.api.model.LM).

  Texts begin as in generate.py. An import gets the ids that lm-eval's Hugging Face model would get.
  """
  from lm_eval.api.model import TemplateLM

  text = LoadedModel(workdir, step)
  path = workdir_lib.open_path(workdir)
  length = workdir_lib.read_config(path).data.seq_len
  tokenizer, beside = text.tokenizer, path / workdir_lib.HF
  special = text.imported and isinstance(tokenizer, tokenizers.HuggingFace)
  encode = tokenizer.encode_special if special else tokenizer.encode

  def cut(lengths: list[int]) -> None:
    if count := sum(n > length for n in lengths):
      notice(
        f"note: {count} of {len(lengths)} requests are over config.data.seq_len={length}: "
        "the beginning of their context is cut"
      )

  def scored(texts: Sequence[tuple[scoring.Ids, scoring.Ids]]) -> list[scoring.Scores]:
    before = [tokenizer.prefix]
    rows = [list(scoring.windows(start or before, ids, length, length)) for start, ids in texts]
    say = _progress("windows", sum(map(len, rows)))
    return scoring.scores_of_windows(text, rows, batch, say)

  class Model(TemplateLM):
    """See lm_eval.api.model."""

    eot_token_id = tokenizer.eos
    prefix_token_id = tokenizer.prefix
    max_length = length
    tokenizer_name = str(beside)
    template = functools.cached_property(lambda self: chat.Template(beside))

    def chat_template(self, chat_template: bool | str = False) -> str | None:
      return self.template.text if chat_template else None

    def apply_chat_template(
      self, chat_history: chat.Messages, add_generation_prompt: bool = True
    ) -> str:
      return self.template.render(chat_history, add_generation_prompt)

    def tok_encode(
      self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
      ids = list(map(int, encode(string)))
      whole = add_special_tokens is False or ids[:1] == [tokenizer.prefix]
      return ids if whole else [*text.before, *ids]

    def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
      texts = [(context, continuation) for _, context, continuation in requests]
      cut([len(context) + len(continuation) - 1 for context, continuation in texts])
      return [(math.fsum(s.log_probs), bool(s.best.all())) for s in scored(texts)]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
      texts = [((), self.tok_encode(request.args[0])) for request in requests]
      return [math.fsum(s.log_probs) for s in scored(texts)]

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
      done: dict[int, str] = {}
      say = _progress("texts", len(requests))
      groups: dict[str, list[int]] = {}
      for number, request in enumerate(requests):
        groups.setdefault(repr(sorted(request.args[1].items())), []).append(number)
      for numbers in groups.values():
        for start in range(0, len(numbers), batch):
          chosen = numbers[start : start + batch]
          contexts = [requests[n].args[0] for n in chosen]
          done |= zip(chosen, self._generate(contexts, requests[chosen[0]].args[1]), strict=True)
          say(len(done))
      return [done[n] for n in range(len(requests))]

    def _generate(self, contexts: list[str], options: dict[str, Any]) -> list[str]:
      most = int(options.get("max_gen_toks", options.get("max_new_tokens", _LONGEST)))
      room = length - most
      if room < 1:
        raise UserError(
          f"--tasks: a task generates {most} tokens, and config.data.seq_len={length}"
        )
      until = options.get("until") or []
      until = [until] if isinstance(until, str) else until
      prompts = [self.tok_encode(context) or [tokenizer.prefix] for context in contexts]
      cut([len(prompt) + most for prompt in prompts])
      rows = text.generate(
        [prompt[-room:] for prompt in prompts],
        max_new_tokens=most,
        top_k=int(options.get("top_k") or 0),
        top_p=float(options.get("top_p") or 1.0),
        temperature=float(options.get("temperature", 0.0)) if options.get("do_sample") else 0.0,
      )
      texts = [row.text for row in rows]
      for end in filter(None, until):
        texts = [text.split(end)[0] for text in texts]
      return texts

  return Model()
