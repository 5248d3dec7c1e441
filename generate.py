"""Continues text: python generate.py --workdir=runs/tiny_moe --prompt="def "

Reads only the workdir. Prints a single continuation while it is generated; several continuations
are printed when all are complete, each under a line with its number. Prompts can also come from a
file or from stdin:

  python generate.py --workdir=runs/tiny_moe --prompt_file=start.py
  head -3 questions.txt | python generate.py --workdir=runs/tiny_moe --prompt_file=- --lines

With --chat a prompt is a message to an imported chat model, and only the answer is printed;
--system=TEXT and --messages=FILE stand before it.
"""

import argparse
import itertools
import json
import os
import signal
import sys
import types
from typing import Any

from moe_jax.data import text_files
from moe_jax.errors import UserError
from moe_jax.inference.options import GENERATION, check_generation
from moe_jax.start import command_line
from moe_jax.storage import workdir as workdir_lib

_PARSER = command_line.Parser(__doc__)
_PARSER.flag("workdir", "", "a run of train.py")
_PARSER.flag("step", 0, "checkpoint to use; 0 is the newest", at_least=0)
_PARSER.add_argument(
  "--prompt", action="append", default=[], help="text to continue; may be given several times"
)
_PARSER.flag("prompt_file", "", "a file with a prompt; - is stdin")
_PARSER.flag("chat", False, "a prompt is a user's message, in the chat template of an import")
_PARSER.flag("system", "", "with --chat: the system's message")
_PARSER.flag("messages", "", 'with --chat: earlier turns, a file of [{"role", "content"}, ...]')
_PARSER.flag("lines", False, "each line of --prompt_file is a prompt")
_PARSER.flag("max_new_tokens", 256, "the most tokens of each continuation")
_PARSER.flag("temperature", 1.0, "0 takes the most probable token")
_PARSER.flag("top_k", 0, "draw from the k most probable tokens; 0: from all")
_PARSER.flag("top_p", 1.0, "draw from the fewest tokens with this probability")
_PARSER.flag("seed", 0, "the same seed draws the same text")
_PARSER.flag("num_samples", 1, "continuations of each prompt")
_PARSER.multihost_flags()


def main() -> None:
  """Continues the prompts that the command line names."""
  args = _PARSER.read()
  # Until there is text, Ctrl-C ends the program at once, also inside a compiler.
  heed = not args.multihost and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN  # nohup
  if heed:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
  if not args.workdir:
    raise UserError("--workdir is missing: name a run of train.py")
  options = {name: getattr(args, name) for name in GENERATION}
  check_generation(options)
  config = workdir_lib.read_config(
    workdir_lib.open_path(args.workdir)
  )  # before any device is asked
  if args.multihost and args.prompt_file == "-":
    raise UserError("--prompt_file=-: with --multihost give a file that every host has")
  if not args.chat and (args.system or args.messages):
    raise UserError("--system and --messages go with --chat")
  prompts = read_prompts(args)
  from moe_jax.start import startup

  with startup.together(args.multihost, args.heartbeat_timeout, config):
    generate(args, prompts, options, heed)


def generate(
  args: argparse.Namespace, prompts: list[str], options: dict[str, Any], heed: bool
) -> None:
  """Prints the continuations; with `heed`, Ctrl-C ends them where they are."""
  import jax

  import moe_jax

  model = moe_jax.load(args.workdir, args.step)
  given: list[Any] = list(prompts)
  if args.chat:
    from moe_jax.inference import chat

    template = chat.Template(workdir_lib.open_path(args.workdir) / workdir_lib.HF)
    turns = earlier_turns(args)
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
  if len(rows) == 1 and not args.chat:
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
      show(f"--- {number + 1} of {len(rows)}\n{'' if args.chat else prompt}{text}\n")
  show("\n")
  if jax.process_index() == 0:
    print(model.speed(), file=sys.stderr)
  if stops:
    sys.exit(128 + signal.SIGINT)


def read_prompts(args: argparse.Namespace) -> list[str]:
  """Returns the prompts of --prompt and --prompt_file; raises UserError if there are none."""
  prompts = []
  for prompt in args.prompt:
    try:
      prompts.append(os.fsencode(prompt).decode())  # the bytes of the shell, in any locale
    except UnicodeDecodeError:
      raise UserError(f"--prompt={prompt}: this is not UTF-8 text; convert it") from None
  if args.prompt_file:
    text = text_files.read_text("--prompt_file", args.prompt_file)
    prompts += text_files.lines(text) if args.lines else [text]
  if not prompts:
    raise UserError("no prompt: give --prompt=TEXT or --prompt_file=FILE (- is stdin)")
  return prompts


def earlier_turns(args: argparse.Namespace) -> list[dict[str, str]]:
  """Returns the messages of --system and --messages; raises UserError for what is none."""
  turns = [{"role": "system", "content": args.system}] if args.system else []
  if args.messages:
    try:
      given = json.loads(text_files.read_text("--messages", args.messages))
      for turn in given:
        whole = {**turn, "role": turn["role"], "content": turn["content"]}
        turns.append({name: value for name, value in whole.items() if value is not None})
    except (KeyError, RecursionError, TypeError, ValueError):
      raise UserError(
        f'--messages={args.messages}: not a JSON list of {{"role": ..., "content": ...}}'
      ) from None
  return turns


def show(text: str) -> None:
  """Prints text at once, without a newline."""
  print(text, end="", flush=True)


if __name__ == "__main__":
  command_line.one_line_errors(main)
