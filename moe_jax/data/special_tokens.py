"""The special tokens of a tokenizer, by the files beside it, as transformers reads them.

tokenizer_config.json names them; special_tokens_map.json does where the former has no table of
added tokens; generation_config.json and config.json have ids of the model.
"""

import pathlib
from typing import Any, NamedTuple

from moe_jax import files

CONFIG, MAP = "tokenizer_config.json", "special_tokens_map.json"
_REMEDY = "download it again, or delete it"


class SpecialTokens(NamedTuple):
  """What the files say; all is empty where there are none."""

  names: dict[str, str]  # {"bos_token": "<s>"}: the variables of a chat template
  added: list[dict[str, Any]]  # the arguments of `tokenizers.AddedToken`, by id
  begins: bool  # whether a SentencePiece model's begin token stands before a text
  begin: int | None  # the id with which the model's texts begin
  ends: list[int]  # the ids at which the model ends a text


def read(folder: pathlib.Path) -> SpecialTokens:
  """Reads those of the files that a folder has; raises a DamagedError where one is no object."""
  config = files.read_json(folder / CONFIG, _REMEDY)
  table = config.get("added_tokens_decoder") or {}
  if not table:
    config |= files.read_json(folder / MAP, _REMEDY)
  # In transformers' order, in which those that are new get their ids.
  first = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
  config = {name: config.get(name) for name in first} | config
  texts = {k: v.get("content") if isinstance(v, dict) else v for k, v in config.items()}
  parts: list[Any] = []
  for name in ("generation_config", "config"):
    of_model = files.read_json(folder / f"{name}.json", _REMEDY)
    parts += [of_model, of_model.get("text_config")]
  begins, ends = (
    next((_ids(part[key]) for part in parts if _has(part, key)), [])
    for key in ("bos_token_id", "eos_token_id")
  )
  return SpecialTokens(
    names={k: v for k, v in texts.items() if k.endswith("_token") and isinstance(v, str)},
    added=[table[i] for i in sorted(table, key=int)],
    begins=config.get("add_bos_token") is not False,
    begin=begins[0] if begins else None,
    ends=ends,
  )


def _has(part: Any, key: str) -> bool:
  return isinstance(part, dict) and part.get(key) is not None


def _ids(value: Any) -> list[int]:
  return [i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)]
