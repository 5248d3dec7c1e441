"""The decoding benchmark's worker."""

import sys

import numpy as np
import pytest
import safetensors.numpy

from benchmarks import train
from moe_jax.errors import UserError
from tests.support.toys import TOY_SIZES


@pytest.mark.benchmark
def test_a_worker_decodes_every_row_and_writes_its_weights_as_mixtral_has_them(tmp_path):
  sizes = TOY_SIZES | dict(top_k=2)
  sizes = {k: v for k, v in sizes.items() if k not in ("seq_len", "batch_size")}
  command = [sys.executable, "-m", "benchmarks.decode_worker", f"--weights={tmp_path}"]
  command += [f"--{name}={value}" for name, value in sizes.items()] + ["--rows=3"]
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("MOE_JAX_CACHE", str(tmp_path / "cache"))
    worker = train.Worker(train.Command("ours", command))
  try:
    one, three = worker.ask("decode 1 40"), worker.ask("decode 3 40")
    with pytest.raises(UserError, match="is not `decode B N`"):
      worker.ask("decode 1")
  finally:
    worker.close()
  assert one["cpu_s"] > 0 and np.shape(three["tokens"]) == (3, 40)
  assert one["tokens"][0] == three["tokens"][0] and 0 not in np.array(three["tokens"])
  prompts = np.load(tmp_path / "prompts.npy")
  assert prompts.shape == (3, 16) and (prompts[:, 0] == 0).all()  # the separator
  weights = safetensors.numpy.load_file(tmp_path / "mixtral/model.safetensors")
  assert weights["model.layers.0.block_sparse_moe.experts.1.w1.weight"].shape == (16, 16)
  assert weights["model.layers.0.self_attn.k_proj.weight"].shape == (8, 16)
  assert sum(array.size for array in weights.values()) == worker.ready["parameters"]
