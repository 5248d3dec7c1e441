"""Random configs of toy models: every word of every field, and numbers within its bounds."""

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from moe_jax.config import Config, override
from moe_jax.config.fields import Choice, walk
from moe_jax.errors import UserError
from tests.support.toys import toy_config

# Sizes of which a step compiles in seconds. Other numbers are near their defaults.
SIZES = {
  "model.vocab_size": (24, 32), "model.num_layers": (1, 2, 3), "model.dim": (8, 12),
  "model.num_heads": (2, 4), "model.num_kv_heads": (1, 2, 4), "model.head_dim": (4, 5, 6),
  "model.ffn_dim": (4, 6, 8), "model.moe.num_experts": (0, 2, 4, 4, 6, 8),
  "model.moe.top_k": (1, 2, 3), "model.moe.expert_dim": (4, 6),
  "model.moe.shared_experts": (0, 1, 2), "model.moe.expert_groups": (1, 2, 4),
  "model.moe.top_groups": (1, 2), "model.moe.group_size": (0, 1, 2, 4, 8, 16, 24, 32),
  "model.moe.exchange_chunks": (1, 1, 2), "model.moe.every": (1, 2), "data.path": ("", "x"),
  "model.moe.first_dense": (0, 1),
  "model.moe.dense_layers": ("", "", "1", "0,2"),
  "data.seq_len": (1, 6, 8, 12), "data.batch_size": (1, 4, 8, 16), "train.accumulation": (1, 2, 4),
  "eval.batch_size": (0, 1, 4, 8), "mesh.data": (-1, 1, 2, 4, 8), "mesh.fsdp": (1, 1, 2),
  "mesh.expert": (1, 2, 4), "mesh.tensor": (1, 1, 2), "model.latent.kv_dim": (0, 0, 5),
  "model.latent.query_dim": (0, 6), "model.latent.rotary_dim": (2, 3),
  "model.latent.value_dim": (3, 4), "model.window": (0, 3), "model.global_every": (0, 2),
}  # fmt: skip
# The text, which validate() does not read.
_TEXT = re.compile(r"data\.(name|mixture|column|tokenizer|.*_split)")


def draw(rng: np.random.Generator, check: Callable[[Config], Config]) -> tuple[Config, list[str]]:
  """Draws a config, and draws the fields that an error names anew until `check` has no error.

  Args:
    rng: what is drawn depends on it alone.
    check: raises a UserError, or returns the config.

  Returns:
    What `check` returns, and the errors on the way.
  """
  config, errors = toy_config(), []
  fields = [field for field in walk(config) if not _TEXT.fullmatch(field[0])]
  # Many fields have to fit the router; it stays as it is drawn, so that no router is rare.
  fixed = "model.moe.router"
  wanted = {fixed, *(name for name, *_ in fields if rng.random() < 0.5)}
  for _ in range(500):
    drawn = {name: _value(rng, name, *of_it) for name, *of_it in fields if name in wanted}
    config = override(config, drawn)
    try:
      return check(config), errors
    except UserError as error:
      errors.append(str(error))
      named = re.findall(r"config\.([a-z_.0-9]*[a-z0-9])", str(error))
      wanted = {name for name, *_ in fields if any(name.startswith(n) for n in named)} - {fixed}
      assert wanted, f"names no field: {error}"
  raise AssertionError(f"the fields that are named do not mend it: {errors[-3:]}")


def _value(rng: np.random.Generator, name: str, field: Any, default: Any) -> Any:
  """Returns a value of a field; one in 50 numbers is the largest of its type."""
  kind, bounds = field.type, field.metadata["bounds"]
  low, high = max(bounds.at_least, bounds.above), min(bounds.at_most, bounds.below)
  if kind in (int, float) and rng.random() < 0.02:
    return kind(1e300) if kind is float else 10**20 if rng.random() < 0.5 else 2**31 - 1
  if name in SIZES:
    values = list(SIZES[name])
  elif issubclass(kind, Choice):
    values = list(kind)
  elif kind is bool:
    values = [True, False]
  elif kind is int:
    values = [int(low), int(low) + 1, default, int(low) + int(rng.integers(20))]
  else:
    middle = low + (high - low) * rng.random() if math.isfinite(high) else default
    values = [default, default / 2, 2 * default, middle, low, high]
  values = [v for v in values if kind not in (int, float) or not bounds.wrong(v)]
  return values[rng.integers(len(values))]
