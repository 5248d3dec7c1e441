"""Switch/Mixtral-style Mixture-of-Experts language models in JAX, with expert parallelism.

import moe_jax
model = moe_jax.load("runs/tiny_moe")
print(model.generate("def ", max_new_tokens=80)[0].text)
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
  import pathlib

  from moe_jax.inference.loaded import LoadedModel


def load(workdir: "str | pathlib.Path", step: int = 0) -> "LoadedModel":
  """Returns the model of a run of train.py, on this machine's devices; docs/api.md is about it.

  The arguments, and what can be wrong with them, are those of LoadedModel.
  """
  from moe_jax.inference import loaded  # imports jax: only when a model is wanted

  return loaded.LoadedModel(workdir, step)
