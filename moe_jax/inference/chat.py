"""Prompts for a chat model: messages in the template that came with its tokenizer."""

import contextlib
import json
import pathlib
import subprocess
import sys
import threading
from typing import Any

from moe_jax.data import special_tokens, text_files
from moe_jax.errors import UserError
from moe_jax.storage import files

Messages = list[dict[str, str]]  # [{"role": "user", "content": text}, ...]
FILE = "chat_template.jinja"
_SECONDS = 10.0  # of a template, and of the start of the process
_LONGEST = 2**24  # characters of a prompt


class Template:
  """The chat template of a folder with a tokenizer's files; another process renders it."""

  _worker: "subprocess.Popen[str] | None" = None

  def __init__(self, folder: pathlib.Path):
    """Reads the template; raises a UserError where there is none."""
    self._folder, self._special = folder, special_tokens.read_special_tokens(folder).names
    self.text = _template(folder)

  def render(self, messages: Messages, begin_answer: bool = True) -> str:
    """Returns the messages as text, special tokens and the begin of an answer included.

    Raises:
      UserError: the template refuses the messages, fails, or does not end.
    """
    if self._worker is None:
      self._worker = subprocess.Popen(
        [sys.executable, "-P", pathlib.Path(__file__).with_name("chat_worker.py")],
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
      )
    worker = self._worker
    variables: dict[str, Any] = dict(messages=messages, tools=None, documents=None)
    variables = self._special | variables | dict(add_generation_prompt=begin_answer)
    assert worker.stdin and worker.stdout
    timer = threading.Timer(_SECONDS, worker.kill)
    timer.start()
    line = ""
    with contextlib.suppress(OSError):  # its process is gone
      worker.stdin.write(json.dumps({"template": self.text, "variables": variables}) + "\n")
      worker.stdin.flush()
      line = worker.stdout.readline(_LONGEST)
    timer.cancel()
    answer = {"error": f"it does not end in {_SECONDS:.0f} s, or needs too much memory"}
    if line.endswith("\n"):
      answer = json.loads(line)
    else:
      self.close()
    if "error" in answer:
      raise UserError(f"{self._folder}: its chat template refuses the messages: {answer['error']}")
    return answer["text"]

  def close(self) -> None:
    """Ends the process; another `render` starts one again."""
    if self._worker is not None:
      self._worker.kill()
      self._worker.communicate()
      self._worker = None

  __del__ = close


def _template(folder: pathlib.Path) -> str:
  if (folder / FILE).is_file():
    return text_files.read_text("chat template", str(folder / FILE))
  config = files.read_json(folder / special_tokens.CONFIG, "download it again")
  found: Any = config.get("chat_template")
  if isinstance(found, list):  # several by name
    named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
    found = named.get("default")
  if not isinstance(found, str):
    raise UserError(
      f"{folder} has no {FILE}, and no chat_template in {special_tokens.CONFIG}; only an import "
      "of a chat model has one"
    )
  return found
