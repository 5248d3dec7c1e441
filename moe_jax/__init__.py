"""Switch/Mixtral-style Mixture-of-Experts language models in JAX, with expert parallelism.

import moe_jax
model = moe_jax.load("runs/tiny_moe")
print(model.generate("def ", max_new_tokens=80)[0].text)
"""

from typing import Any


def load(workdir: str, step: int = 0) -> Any:
  """The model of a run of train.py; see moe_jax.inference.generate.load."""
  from moe_jax.inference import generate  # imports jax: only when a model is wanted

  return generate.load(workdir, step)
