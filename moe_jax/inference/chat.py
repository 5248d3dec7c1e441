"""Prompts for a chat model: messages in the template that came with its tokenizer.

The template is a program of Jinja, in a file of the import. It runs in Jinja's sandbox, where it
can read the messages and make text, and nothing else.
"""

import json
import pathlib
import time
from typing import Any

from moe_jax import workdir as workdir_lib
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.errors import UserError

_FILE, _CONFIG = "chat_template.jinja", "tokenizer_config.json"


def prompt(
  workdir: pathlib.Path, tokenizer: Tokenizer, messages: list[dict[str, str]]
) -> list[int]:
  """Returns the ids after which the model answers.

  Args:
    workdir: of an import whose tokenizer has a template.
    tokenizer: of the workdir.
    messages: [{"role": "user", "content": text}, ...].

  Raises:
    UserError: there is no template, or it refuses the messages.
  """
  return tokenizer.encode_special(render(workdir / workdir_lib.HF, messages))


def render(folder: pathlib.Path, messages: list[dict[str, str]]) -> str:
  """Returns the messages as text, special tokens included, and the begin of an answer.

  Args:
    folder: with the tokenizer's files.
    messages: as of `prompt`.
  """
  try:
    import jinja2
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
  except ImportError:
    raise UserError("--chat needs Jinja: pip install 'moe_jax[tokenizers]'") from None
  config = workdir_lib.read_object(folder / _CONFIG)

  def refuse(why: str) -> None:
    raise jinja2.TemplateError(why)

  environment = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
  )
  environment.filters["tojson"] = lambda value, **options: json.dumps(
    value, ensure_ascii=False, **options
  )
  environment.globals |= {"raise_exception": refuse, "strftime_now": time.strftime}
  special = {
    name: token["content"] if isinstance(token, dict) else token
    for name in ("bos_token", "eos_token", "unk_token", "pad_token")
    if (token := config.get(name))
  }
  try:
    template = environment.from_string(_template(folder, config))
    return template.render(messages=messages, add_generation_prompt=True, **special)
  except jinja2.TemplateError as error:
    raise UserError(f"{folder}: its chat template refuses the messages: {error}") from None


def _template(folder: pathlib.Path, config: dict[str, Any]) -> str:
  if (folder / _FILE).is_file():
    return (folder / _FILE).read_text()
  found = config.get("chat_template")
  if isinstance(found, list):  # several by name
    found = next((t.get("template") for t in found if t.get("name") == "default"), None)
  if not isinstance(found, str):
    raise UserError(
      f"--chat: {folder} has no {_FILE}, and no chat_template in {_CONFIG}; only an import of a "
      "chat model has one"
    )
  return found
