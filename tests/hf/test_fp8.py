"""FP8 weights: against torch's own numbers, and as a checkpoint of DeepSeek-V3."""

import jax
import numpy as np
import pytest

from moe_jax.config import Mesh
from moe_jax.hf import importing
from moe_jax.model import transformer
from tests.support.toys import mesh_of, tokens_of

torch = pytest.importorskip("torch", reason="compares with Hugging Face: pip install -e '.[hf]'")


@pytest.mark.parametrize(
  ("kind", "dtype"), [("blocks", "float32"), ("rows", "bfloat16"), ("tensor", "bfloat16")]
)
def test_deepseek_as_it_is_published(kind, dtype, tmp_path):
  """Matrices of odd sizes, one of several blocks each way; read whole, and by ranges on a mesh."""
  from safetensors.torch import load_file, save_file

  from tests.support import hf_models

  peer = hf_models.build(
    "deepseek_v3", tmp_path, hidden_size=264, intermediate_size=140, num_hidden_layers=2
  )
  held, scales = load_file(tmp_path / "model.safetensors"), {}
  rng = np.random.default_rng(0)
  wide = [n for n, w in held.items() if w.ndim == 2 and n.endswith("proj.weight")]
  state = peer.model.state_dict()
  for name in wide:
    sizes = held[name].shape
    shape = {"blocks": [-(-n // 128) for n in sizes], "rows": [sizes[0], 1], "tensor": []}[kind]
    scale = torch.tensor(rng.uniform(0.5, 2.0, shape)).to(getattr(torch, dtype))
    held[name], whole = held[name].to(torch.float8_e4m3fn), scale.to(torch.float32)
    if kind == "blocks":
      rows, columns = (torch.arange(n) // 128 for n in sizes)
      whole = whole[rows][:, columns]
    value = held[name].to(torch.float32) * whole
    scales[f"{name}_scale_inv"] = scale
    if name in state:
      state[name].copy_(value)
    else:  # transformers joins the experts' matrices
      put(state, name, value)
  save_file(held | scales, tmp_path / "model.safetensors")
  ids_BL = hf_models.tokens()
  with torch.no_grad():
    want = peer.model(torch.tensor(ids_BL)).logits.numpy()
  for axes in ({}, dict(expert=2, fsdp=2)):
    made = importing.plan(str(tmp_path), Mesh(**{"data": 1} | axes))
    with jax.set_mesh(mesh_of(**axes)):
      weights = importing.read_weights(made, mesh_of(**axes))
    whole = jax.tree.map(np.asarray, weights)
    with jax.set_mesh(mesh_of()):
      logits_BLV = transformer.forward(
        made.config.model,
        whole.params,
        whole.bias_ZE,
        tokens_of(ids_BL),
        jax.random.key(0),
        train=False,
      ).logits_BLV
    np.testing.assert_allclose(logits_BLV, want, rtol=0, atol=2e-5 * np.abs(want).max())


def put(state, name, value):
  """Writes one expert's matrix into the tensor of all experts."""
  start, expert, matrix = name.removesuffix(".weight").rsplit(".", 2)
  whole = state[f"{start}.{'down_proj' if matrix == 'down_proj' else 'gate_up_proj'}"][int(expert)]
  half = whole.shape[0] // 2
  part = {"gate_proj": slice(0, half), "up_proj": slice(half, None)}.get(matrix, slice(None))
  whole[part].copy_(value)
