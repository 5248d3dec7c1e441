"""The compilers for devices that are not here, where they are installed, and a model for them.

Its experts are larger than any of its other matrices, so that a size tells what was moved.
"""

import importlib.util

import pytest

D, F, E, K, LAYERS, LENGTH, VOCABULARY, HEADS = 256, 1024, 32, 2, 2, 128, 512, 2
FIELDS = {
  "data.batch_size": 64,
  "data.seq_len": LENGTH,
  "model.dim": D,
  "model.num_layers": LAYERS,
  "model.num_heads": HEADS,
  "model.num_kv_heads": HEADS,
  "model.head_dim": 128,
  "model.vocab_size": VOCABULARY,
  "model.tied_head": "false",
  "model.compute_dtype": "bfloat16",
  "model.remat": "full",
  "model.moe.num_experts": E,
  "model.moe.top_k": K,
  "model.moe.expert_dim": F,
  "model.moe.capacity_factor": 1.0,
}
OTHERS = LAYERS * 4 * D * HEADS * 128 + 2 * VOCABULARY * D  # elements of matrices of no expert


def missing(module):
  try:
    return importlib.util.find_spec(module) is None
  except ModuleNotFoundError:  # of the package that it is in
    return True


NO_TPU = missing("libtpu") and "needs libtpu: pip install -e '.[tpu]'"
NO_GPU = (missing("jax_plugins.xla_cuda13") or missing("nvidia.cudnn")) and (
  "needs jax's CUDA 13 plugin and cuDNN: pip install -e '.[cuda]'"
)
# Each compiler's programs are compiled by one of the test's processes, which keeps them.
TPU = [pytest.mark.skipif(bool(NO_TPU), reason=str(NO_TPU)), pytest.mark.xdist_group("tpu")]
GPU = [pytest.mark.skipif(bool(NO_GPU), reason=str(NO_GPU)), pytest.mark.xdist_group("gpu")]
