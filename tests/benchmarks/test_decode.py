"""The decoding benchmark's worker."""

import sys

import numpy as np
import pytest

from benchmarks import train
from moe_jax.config import UserError
from tests.support.toys import TOY_SIZES


@pytest.mark.slow
def test_decoding_worker(tmp_path, monkeypatch):
  """Weights by transformers' names and in its shapes; the same tokens whatever the batch."""
  monkeypatch.setenv("MOE_JAX_CACHE", str(tmp_path / "cache"))
  sizes = {k: v for k, v in TOY_SIZES.items() if k not in ("seq_len", "batch_size")}
  command = [sys.executable, "-m", "benchmarks.decode_worker", f"--weights={tmp_path}"]
  command += [f"--{name}={value}" for name, value in sizes.items()] + ["--rows=3"]
  worker = train.Worker(train.Command("ours", command))
  try:
    one, three = worker.ask("decode 1 40"), worker.ask("decode 3 40")
    assert one["cpu_s"] > 0 and np.shape(three["tokens"]) == (3, 40)
    assert one["tokens"][0] == three["tokens"][0] and 0 not in np.array(three["tokens"])
    with pytest.raises(UserError, match="is not `decode B N`"):
      worker.ask("decode 1")
  finally:
    worker.close()
  written = {path.stem: np.load(path) for path in tmp_path.glob("*.npy")}
  assert written["prompts"].shape == (3, 16) and (written["prompts"][:, 0] == 0).all()
  assert written["model.layers.0.mlp.experts.gate_up_proj"].shape == (2, 32, 16)
  assert written["model.layers.0.self_attn.k_proj.weight"].shape == (8, 16)
  # All but the prompts.
  assert sum(a.size for a in written.values()) - 48 == worker.ready["parameters"]
