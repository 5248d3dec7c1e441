"""What can be asked of a TextGenerator and of generate.py. Imports no jax."""

from typing import Any

from moe_jax.config.fields import LARGEST_SEED, Bounds
from moe_jax.errors import UserError

GENERATION = {
  "max_new_tokens": Bounds(at_least=1),
  "temperature": Bounds(at_least=0),
  "top_k": Bounds(at_least=0),
  "top_p": Bounds(above=0, at_most=1),
  "seed": Bounds(at_least=0, at_most=LARGEST_SEED),
  "num_samples": Bounds(at_least=1, at_most=100_000),
}


def check_generation(values: dict[str, Any]) -> None:
  """Raises a UserError unless each value, by the name of its option, is in its bounds."""
  for name, value in values.items():
    if wrong := GENERATION[name].wrong(value):
      raise UserError(f"{name}={value} {wrong}")
