"""The special tokens of a tokenizer, by the files beside it, as transformers reads them.

tokenizer_config.json names them; special_tokens_map.json and added_tokens.json do where the former
has no table of added tokens; generation_config.json and config.json have ids of the model.
"""

import pathlib
from typing import Any, NamedTuple

from moe_jax.storage import files

CONFIG, MAP = "tokenizer_config.json", "special_tokens_map.json"
MOST = 2**24  # ids of a vocabulary, which has gaps where a file is damaged
_REMEDY = "download it again, or delete it"
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
# In transformers' order, in which those that are new get their ids.
_NAMES = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]


class SpecialTokens(NamedTuple):
  """What the files say; all is empty where there are none."""

  names: dict[str, str]  # {"bos_token": "<s>"}: the variables of a chat template
  # {text: flags, as `tokenizers.AddedToken` has}: of the table; of names, where no file has others.
  table: dict[str, dict[str, Any]]
  named: dict[str, dict[str, Any]]
  begins: bool  # whether a SentencePiece model's begin token stands before a text
  begin: int | None  # the id with which the model's texts begin
  ends: list[int]  # the ids at which the model ends a text


def read_special_tokens(folder: pathlib.Path) -> SpecialTokens:
  """Reads those of the files that a folder has; raises a DamagedError where one is no object."""
  config = files.read_json(folder / CONFIG, _REMEDY)
  if "added_tokens_decoder" not in config:
    config |= files.read_json(folder / MAP, _REMEDY)
    older = files.read_json(folder / "added_tokens.json", _REMEDY)
    config["added_tokens_decoder"] = {i: text for text, i in older.items()}
  table, extra = config["added_tokens_decoder"] or {}, config.get("extra_special_tokens") or []
  names = {k: config.get(k) for k in (*_NAMES, *config) if k.endswith("_token")}
  names |= extra if isinstance(extra, dict) else {}
  special = [*names.values(), *(extra if isinstance(extra, list) else [])]
  parts: list[Any] = []
  for name in ("generation_config", "config"):
    of_model = files.read_json(folder / f"{name}.json", _REMEDY)
    parts += [part for part in (of_model, of_model.get("text_config")) if isinstance(part, dict)]
  begins, ends = (
    next((_ids(part[key]) for part in parts if part.get(key) is not None), [])
    for key in ("bos_token_id", "eos_token_id")
  )
  return SpecialTokens(
    names={k: text for k, v in names.items() for text in _flags(v)},
    table={k: v for i in sorted(table, key=int) for k, v in _flags(table[i]).items()},
    named={k: v | {"special": True} for token in special for k, v in _flags(token).items()},
    begins=config.get("add_bos_token") is True,
    begin=begins[0] if begins else None,
    ends=ends,
  )


def _flags(token: Any) -> dict[str, dict[str, Any]]:
  """Returns {text: flags} of a token, which is a text or an object; {} of anything else."""
  values = {"content": token} if isinstance(token, str) else token
  if not isinstance(values, dict) or not isinstance(values.get("content"), str):
    return {}
  return {values["content"]: {flag: bool(values[flag]) for flag in FLAGS if flag in values}}


def _ids(value: Any) -> list[int]:
  ids = value if isinstance(value, list) else [value]
  return [i for i in ids if type(i) is int and 0 <= i < MOST]
