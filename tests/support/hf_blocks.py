"""MoE blocks of Hugging Face transformers with random weights, and what compares them with ours."""

import functools
import importlib

import numpy as np
import pytest

MISSING = "compares with Hugging Face: pip install -e '.[hf]'"
torch = pytest.importorskip("torch", reason=MISSING)
pytest.importorskip("transformers", reason=MISSING)
B, L, D = 4, 7, 10


def close(got, want, name=""):
  # float32 on both sides, sums of some tens of terms in another order: the differences measured
  # are below 4e-7 of the largest element, and a wrong gate or token misses by 1e-2 or more.
  want = np.asarray(want)
  largest = np.abs(want).max()
  assert largest > 1e-2, f"{name} is zero on both sides"
  np.testing.assert_allclose(got, want, rtol=0, atol=3e-6 * largest, err_msg=name)


@functools.cache
def arrays():
  """x_BLD with an offset, so that routing is unbalanced; the cotangent; padding."""
  rng = np.random.default_rng(0)
  x_BLD = rng.normal(size=(B, L, D)) + 0.5 * rng.normal(size=D)
  real_BL = np.arange(L)[None] < np.array([[7], [4], [1], [6]])
  return np.float32(x_BLD), np.float32(rng.normal(size=(B, L, D))), real_BL


def build(package, block, config, **fields):
  """A block of transformers with random weights, in evaluation mode."""
  module = importlib.import_module(f"transformers.models.{package}.modeling_{package}")
  config = getattr(importlib.import_module("transformers"), config)(hidden_size=D, **fields)
  config._experts_implementation = "eager"  # a block outside of a model has none, and warns
  block = getattr(module, block)(config).eval()
  rng = np.random.default_rng(1)
  with torch.no_grad():
    for weight in block.parameters():
      weight.copy_(torch.tensor(0.5 * rng.normal(size=weight.shape)))
  return block


def to_ours(tensors):
  """Their names and layouts -> ours; linear, so for gradients too."""
  named = {}
  for name, tensor in tensors.items():
    a = np.swapaxes(tensor.detach().numpy(), -1, -2)  # theirs are [..., out, in]
    if name == "gate.weight":
      named["router_DE"] = a
    elif name == "experts.gate_up_proj":
      named["gate_EDF"], named["up_EDF"] = np.split(a, 2, axis=-1)
    elif name == "experts.down_proj":
      named["down_EFD"] = a
    else:
      named[{"gate": "gate_DF", "up": "up_DF", "down": "down_FD"}[name.split(".")[1][:-5]]] = a
  return named
