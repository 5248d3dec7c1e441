"""The benchmark of served exports, with transformers as the server."""

import sys

import pytest

from benchmarks import serve

pytest.importorskip("transformers", reason="compares with Hugging Face: pip install -e '.[hf]'")

_TOY = {
  "model.num_layers": 2,
  "model.dim": 32,
  "model.head_dim": 16,
  "model.moe.expert_dim": 32,
  "train.steps": 40,
  "train.eval_every": 40,
  "train.checkpoint_every": 40,
  "train.log_every": 40,
  "eval.batches": 1,
}


@pytest.mark.benchmark
def test_a_served_export_gives_the_tokens_of_our_logits(tmp_path, monkeypatch):
  monkeypatch.setenv("MOE_JAX_CACHE", str(tmp_path / "cache"))
  monkeypatch.setattr(serve, "FAMILIES", {"gpt_oss": serve.FAMILIES["gpt_oss"]})
  result = serve.run(tmp_path / "out", "transformers", sys.executable, "", _TOY)
  (row,) = result["rows"]
  assert all(target["met"] for target in result["targets"]), row
  assert row["equal"] == 160 and row["distinct"] > 3 and row["margin"] > 0
