"""Decoding beside Hugging Face transformers: the same weights give the same tokens."""

import sys

import pytest

from benchmarks import decode
from moe_jax.errors import UserError
from tests.support.toys import TOY_SIZES

MISSING = "compares with Hugging Face: pip install -e '.[hf]'"
pytest.importorskip("torch", reason=MISSING)
pytest.importorskip("transformers", reason=MISSING)

SIZES = TOY_SIZES | dict(vocab_size=300, layers=2, heads=4, kv_heads=2, experts_count=5, top_k=2)
TOY = decode.Workload("toy", SIZES, 2.0)


@pytest.mark.slow
def test_the_same_tokens_out(tmp_path, monkeypatch):
  monkeypatch.setenv("MOE_JAX_CACHE", str(tmp_path))
  options = dict(rounds=1, peer_python=sys.executable, peer_compile=False)
  result = decode.run(steps=40, workloads=(TOY,), batches=(1, 3), **options)
  rows = {(r["name"], r["batch"]): r for r in result["rows"]}
  peers = ("transformers grouped_mm", "transformers eager")
  assert set(rows) == {(name, batch) for name in ("moe_jax", *peers) for batch in (1, 3)}
  assert len({r["parameters"] for r in rows.values()}) == 1
  for batch in (1, 3):
    ours, theirs = rows["moe_jax", batch], rows[peers[0], batch]
    assert ours["our_speed"] == 1
    assert theirs["our_speed"] == pytest.approx(theirs["cpu_s"] / ours["cpu_s"])
  assert [t["limit"] for t in result["targets"]] == [2.0, 1.0]
  assert all(t["verdict"] in decode.text(result) for t in result["targets"])


def test_another_token_is_refused():
  class Worker:
    def __init__(self, name, tokens):
      self.ready, self.tokens = {"name": name}, tokens

    def ask(self, line):
      return {"tokens": self.tokens}

  workers = [Worker("ours", [[1, 2], [3, 4]]), Worker("theirs", [[1, 2], [3, 5]])]
  with pytest.raises(UserError, match="theirs draws another token than ours in row 1, at place 1"):
    decode._rows(TOY, workers, 2, 1, 2)
