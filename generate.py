"""Continues text: python generate.py --workdir=runs/tiny_moe --prompt="def "

Reads only the workdir. Prints a single continuation while it is generated; several continuations
are printed when all are complete, each under a line with its number. Prompts can also come from a
file or from stdin:

  python generate.py --workdir=runs/tiny_moe --prompt_file=start.py
  head -3 questions.txt | python generate.py --workdir=runs/tiny_moe --prompt_file=- --lines

With --chat a prompt is a message to an imported chat model, and only the answer is printed;
--system=TEXT and --messages=FILE stand before it.
"""

import itertools
import json
import os
import signal
import sys
import types
from typing import Any

from absl import flags

from moe_jax import command_line
from moe_jax import workdir as workdir_lib
from moe_jax.config import UserError
from moe_jax.data import text_files
from moe_jax.options import GENERATION, check_generation

_WORKDIR = flags.DEFINE_string("workdir", "", "a run of train.py")
_STEP = flags.DEFINE_integer("step", 0, "checkpoint to use; 0 is the newest", lower_bound=0)
_PROMPT = flags.DEFINE_multi_string("prompt", [], "text to continue; may be given several times")
_FILE = flags.DEFINE_string("prompt_file", "", "a file with a prompt; - is stdin")
_CHAT = flags.DEFINE_bool(
  "chat", False, "each prompt is a user's message, in the chat template that an import came with"
)
_SYSTEM = flags.DEFINE_string("system", "", "with --chat: the system's message")
_MESSAGES = flags.DEFINE_string(
  "messages", "", 'with --chat: a file with [{"role": ..., "content": ...}, ...]: earlier turns'
)
_LINES = flags.DEFINE_bool("lines", False, "each line of --prompt_file is a prompt")
flags.DEFINE_integer("max_new_tokens", 256, "the most tokens of each continuation")
flags.DEFINE_float("temperature", 1.0, "0 takes the most probable token")
flags.DEFINE_integer("top_k", 0, "draw from the k most probable tokens; 0: from all")
flags.DEFINE_float("top_p", 1.0, "draw from the fewest tokens with this probability")
flags.DEFINE_integer("seed", 0, "the same seed draws the same text")
flags.DEFINE_integer("num_samples", 1, "continuations of each prompt")
_MULTIHOST, _PEER_TIMEOUT = command_line.multihost_flags()


def main() -> None:
  """Continues the prompts that the flags name."""
  # Until there is text, Ctrl-C ends the program at once, also inside a compiler.
  heed = not _MULTIHOST.value and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN  # nohup
  if heed:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
  if not _WORKDIR.value:
    raise UserError("--workdir is missing: name a run of train.py")
  options = {name: flags.FLAGS[name].value for name in GENERATION}
  check_generation(options)
  workdir_lib.read_config(workdir_lib.open_path(_WORKDIR.value))  # before any device is asked
  if _MULTIHOST.value and _FILE.value == "-":
    raise UserError("--prompt_file=-: with --multihost give a file that every host has")
  if not _CHAT.value and (_SYSTEM.value or _MESSAGES.value):
    raise UserError("--system and --messages go with --chat")
  prompts = read_prompts()
  from moe_jax import startup

  with startup.together(_MULTIHOST.value, _PEER_TIMEOUT.value):
    generate(prompts, options, heed)


def generate(prompts: list[str], options: dict[str, Any], heed: bool) -> None:
  """Prints the continuations; with `heed`, Ctrl-C ends them where they are."""
  import jax

  import moe_jax

  model = moe_jax.load(_WORKDIR.value, _STEP.value)
  given: list[Any] = list(prompts)
  if _CHAT.value:
    from moe_jax.inference import chat

    template = chat.Template(workdir_lib.open_path(_WORKDIR.value) / workdir_lib.HF)
    turns = earlier_turns()
    given = [
      model.tokenizer.encode_special(template.render([*turns, {"role": "user", "content": prompt}]))
      for prompt in prompts
    ]
  chunks = model.stream(given, **options)
  # Nothing is made or printed before the first tokens, because the sizes may be refused.
  ids = next(chunks)
  rows = [prompt for prompt in prompts for _ in range(options["num_samples"])]
  printed = 0  # characters of the text
  stops: list[int] = []

  def stop(number: int, _: types.FrameType | None) -> None:
    """Ends the text after the tokens that are being drawn; a second Ctrl-C ends it at once."""
    stops.append(number)
    signal.signal(signal.SIGINT, signal.SIG_DFL)

  if heed:
    signal.signal(signal.SIGINT, stop)
  if len(rows) == 1 and not _CHAT.value:
    show(rows[0])
  for chunk in itertools.chain([[[] for _ in rows]], chunks):
    for row, new in zip(ids, chunk, strict=True):
      row.extend(new)
    if len(rows) == 1:
      text = model.completion(rows[0], ids[0]).text.rstrip("\N{REPLACEMENT CHARACTER}")
      show(text[printed:])
      printed = max(printed, len(text))
    if stops:
      break
  texts = [model.completion(prompt, row).text for prompt, row in zip(rows, ids, strict=True)]
  if len(rows) == 1:
    show(texts[0][printed:])  # a last character that stayed incomplete
  else:
    for number, (prompt, text) in enumerate(zip(rows, texts, strict=True)):
      show(f"--- {number + 1} of {len(rows)}\n{'' if _CHAT.value else prompt}{text}\n")
  show("\n")
  if jax.process_index() == 0:
    print(model.speed(), file=sys.stderr)
  if stops:
    sys.exit(128 + signal.SIGINT)


def read_prompts() -> list[str]:
  """Returns the prompts of --prompt and --prompt_file; raises UserError if there are none."""
  prompts = []
  for prompt in _PROMPT.value:
    try:
      prompts.append(os.fsencode(prompt).decode())  # the bytes of the shell, in any locale
    except UnicodeDecodeError:
      raise UserError(f"--prompt={prompt}: this is not UTF-8 text; convert it") from None
  if _FILE.value:
    text = text_files.read_text("--prompt_file", _FILE.value)
    prompts += text_files.lines(text) if _LINES.value else [text]
  if not prompts:
    raise UserError("no prompt: give --prompt=TEXT or --prompt_file=FILE (- is stdin)")
  return prompts


def earlier_turns() -> list[dict[str, str]]:
  """Returns the messages of --system and --messages; raises UserError for what is none."""
  turns = [{"role": "system", "content": _SYSTEM.value}] if _SYSTEM.value else []
  if _MESSAGES.value:
    try:
      given = json.loads(text_files.read_text("--messages", _MESSAGES.value))
      for turn in given:
        whole = {**turn, "role": turn["role"], "content": turn["content"]}
        turns.append({name: value for name, value in whole.items() if value is not None})
    except (KeyError, RecursionError, TypeError, ValueError):
      raise UserError(
        f'--messages={_MESSAGES.value}: not a JSON list of {{"role": ..., "content": ...}}'
      ) from None
  return turns


def show(text: str) -> None:
  """Prints text at once, without a newline."""
  print(text, end="", flush=True)


if __name__ == "__main__":
  command_line.run(main)
