"""The training benchmark: comparison within rounds, and its worker."""

import os

import pytest

from benchmarks import results, train
from moe_jax.config import UserError
from tests.support.toys import TOY_SIZES


def test_train_compares_rounds():
  """Of the same round: the second round is slow for all, and the ratio does not see it."""

  def row(kind, *cpu_s):
    return {"kind": kind, "name": kind, "cpu_s": min(cpu_s), "rounds_cpu_s": list(cpu_s)}

  rows = [row("ffn", 1, 4), row("grouped", 1.1, 4.4), row("peer mixtral", 2.2, 8.8)]
  rows.append(row("bare", 1.08, 4.4) | {"name": "grouped without metrics"})
  targets = {t["what"]: t["measured"] for t in train._compare(rows)}
  assert targets == pytest.approx(
    {
      "step / step without metrics": (1.1 / 1.08 + 1) / 2,
      "grouped time / our dense": 1.1,
      "grouped speed / peer mixtral": 2.0,
    }
  )


@pytest.mark.slow
def test_worker(tmp_path, monkeypatch):
  """Speaks the peer's protocol, on one CPU, and stops when told a thing that it does not know."""
  monkeypatch.setenv("MOE_JAX_CACHE", str(tmp_path))
  cpu = results.usable_cpus()[0]
  command = next(c for c in train.our_commands(["none"], cpu, TOY_SIZES) if c.kind == "gather")
  worker = train.Worker(command)
  try:
    ready = worker.ready
    assert ready["ready"] and ready["name"] == "moe_jax gather 1 none" and ready["versions"]["jax"]
    # Beside the experts, one of two is used: embedding and head, q and out, k and v, norms, router.
    rest = 2 * 32 * 16 + 2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 + 16 * 2
    assert ready["parameters"] == rest + 2 * 3 * 16 * 16
    assert ready["active_parameters"] == rest + 3 * 16 * 16
    first, second = worker.ask("step 1"), worker.ask("step 2")
    assert first["cpu_s"] > 0 and first["wall_s"] > 0
    assert second["loss"] < first["loss"] < 5
    if hasattr(os, "sched_getaffinity"):
      assert os.sched_getaffinity(worker.process.pid) == {cpu}
    with pytest.raises(UserError, match="is not `step N`"):
      worker.ask("step two")
  finally:
    worker.close()
