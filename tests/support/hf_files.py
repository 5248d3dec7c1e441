"""A toy checkpoint in the format of Hugging Face, written by this code; it needs no torch."""

import pathlib

import jax
import numpy as np

from moe_jax.config import Mesh, QKNorm
from moe_jax.hf import exporting, importing
from moe_jax.model import pattern
from moe_jax.storage.weights import Weights
from tests.support.toys import build, toy_config


def toy():
  """As Qwen3-MoE has it, at toy size."""
  return toy_config({"model.qk_norm": QKNorm.HEAD}, num_experts=4, top_k=2)


def loaded(config):
  _, params = build(config)
  bias_ZE = np.zeros(pattern.bias_shape(config.model), np.float32)
  return exporting.Loaded(config, Weights(params, bias_ZE), 7, pathlib.Path("none"))


def exact_leaves():
  return jax.tree.leaves(loaded(toy()).weights.params)


def plan(path, **mesh):
  return importing.plan(str(path), Mesh(**{"data": 1} | mesh))
