"""MXFP4 weights: by hand, against transformers, and as a checkpoint of gpt-oss."""

import jax
import numpy as np
import pytest
import safetensors.numpy

from moe_jax.config import Mesh
from moe_jax.hf import importing, mxfp4
from moe_jax.model import transformer
from tests.support.toys import mesh_of, tokens_of


def packed(seed, E, O, I):  # noqa: E741 (shape letters)
  rng = np.random.default_rng(seed)
  return {
    "_blocks": rng.integers(0, 256, (E, O, I // 32, 16), np.uint8),
    "_scales": rng.integers(119, 125, (E, O, I // 32), np.uint8),
  }


def read(parts, ranges):
  return mxfp4.read("w", (), ranges, lambda name, r: parts[name[1:]][r])


def whole(parts):
  E, O, blocks = parts["_scales"].shape  # noqa: E741
  return read(parts, (slice(0, E), slice(0, 32 * blocks), slice(0, O)))


def test_one_block_by_hand():
  parts = {
    "_blocks": np.zeros((1, 1, 1, 16), np.uint8),
    "_scales": np.full((1, 1, 1), 126, np.uint8),
  }
  parts["_blocks"][0, 0, 0, :2] = [0x2F, 0x7B]  # -6 and 1, then -1.5 and 6, times 2^-1
  np.testing.assert_array_equal(whole(parts)[0, :5, 0], [-3, 0.5, -0.75, 3, 0])


def test_a_range_is_a_part_of_the_whole():
  parts = packed(0, 3, 4, 96)
  values = whole(parts)
  assert values.shape == (3, 96, 4) and values.dtype == np.float32
  ranges = (slice(1, 3), slice(33, 70), slice(2, 4))
  np.testing.assert_array_equal(read(parts, ranges), values[ranges])


def test_the_values_are_those_of_transformers():
  torch = pytest.importorskip("torch", reason="compares with Hugging Face: pip install -e '.[hf]'")
  from transformers.integrations.mxfp4 import convert_moe_packed_tensors

  parts = packed(1, 2, 6, 64)
  want = convert_moe_packed_tensors(*map(torch.tensor, parts.values()), dtype=torch.float32)
  assert len(np.unique(want)) > 30
  np.testing.assert_array_equal(whole(parts), want)


def test_gpt_oss_as_it_is_published(tmp_path):
  """The experts' matrices as blocks and scales, all else as before."""
  pytest.importorskip("torch", reason="compares with Hugging Face: pip install -e '.[hf]'")
  from tests.support import hf_models
  from tests.support.hf_models import torch

  peer = hf_models.build(
    "gpt_oss", tmp_path, hidden_size=64, intermediate_size=32, num_hidden_layers=2
  )
  held = safetensors.numpy.load_file(tmp_path / "model.safetensors")
  for number, name in enumerate([n for n in held if n.endswith(("gate_up_proj", "down_proj"))]):
    E, I, O = held.pop(name).shape  # noqa: E741
    parts = packed(number, E, O, I)
    held |= {name + end: part for end, part in parts.items()}
    with torch.no_grad():
      peer.model.get_parameter(name).copy_(torch.tensor(whole(parts)))
  safetensors.numpy.save_file(held, tmp_path / "model.safetensors")
  made = importing.plan(str(tmp_path), Mesh(data=1))
  ids_BL = hf_models.tokens()
  with jax.set_mesh(mesh_of()):
    weights = importing.read_weights(made, mesh_of())
    logits_BLV = transformer.forward(
      made.config.model,
      weights.params,
      weights.bias_ZE,
      tokens_of(ids_BL),
      jax.random.key(0),
      train=False,
    ).logits_BLV
  with torch.no_grad():
    want = peer.model(torch.tensor(ids_BL)).logits.numpy()
  np.testing.assert_allclose(logits_BLV, want, rtol=0, atol=2e-5 * np.abs(want).max())
  assert made.largest == held["model.layers.0.mlp.experts.gate_up_proj_blocks"].nbytes * 17 // 16
