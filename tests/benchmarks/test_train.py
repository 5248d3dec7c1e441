"""The training benchmark: comparison within rounds, and its worker."""

import os

import pytest

from benchmarks import results, train
from moe_jax.errors import UserError
from tests.support.toys import TOY_SIZES


def test_train_compares_rounds():
  """Of the same round: the second round is slow for all, and the ratio does not see it."""

  def row(kind, *cpu_s):
    return {"kind": kind, "name": f"moe_jax {kind} dots", "rounds_s": list(cpu_s)}

  rows = [row("ffn", 1, 4), row("grouped", 1.1, 4.4), row("peer mixtral", 2.2, 8.8)]
  rows += [row("peer mixtral", 3, 9), row("peer dense", 0.5, 2)]
  rows.append(row("bare", 1.08, 4.4) | {"name": "moe_jax grouped without metrics dots"})
  targets = {t["what"]: t["measured"] for t in train._compare(rows, "small")}
  assert targets == pytest.approx(
    {
      "step / step without metrics": (1.1 / 1.08 + 1) / 2,
      "moe_jax ffn dots speed / moe_jax peer dense dots": 0.5,
      "moe_jax grouped dots time / our dense": 1.1,
      "moe_jax grouped dots speed / moe_jax peer mixtral dots": 2.0,
    }
  )


CPU = results.usable_cpus()[0]


@pytest.mark.benchmark
def test_a_worker_speaks_the_protocol_of_its_peers(tmp_path, monkeypatch):
  """A toy's training process on one CPU, until it is told what it does not know."""
  monkeypatch.setenv("MOE_JAX_CACHE", str(tmp_path))
  commands = train.our_commands(["none"], str(CPU), TOY_SIZES)
  worker = train.Worker(next(c for c in commands if c.kind == "gather"))
  try:
    ready, first, second = worker.ready, worker.ask("step 1"), worker.ask("step 2")
    if hasattr(os, "sched_getaffinity"):
      assert os.sched_getaffinity(worker.process.pid) == {CPU}
    with pytest.raises(UserError, match="is not `step N`"):
      worker.ask("step two")
  finally:
    worker.close()
  assert ready["ready"] and ready["name"] == "moe_jax gather 1 none" and ready["versions"]["jax"]
  # Of two experts one is used; the rest: embedding, head, q, out, k, v, norms, router.
  rest = 2 * 32 * 16 + 2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 + 16 * 2
  assert ready["parameters"] == rest + 2 * 3 * 16 * 16
  assert ready["active_parameters"] == rest + 3 * 16 * 16
  assert first["cpu_s"] > 0 and first["wall_s"] > 0
  assert second["loss"] < first["loss"] < 5
