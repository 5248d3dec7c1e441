"""The benchmark of an accelerator runs at toy size on a CPU."""

import math

import pytest

from benchmarks import accelerator, results
from moe_jax.kernels.experts import EXPERT_KERNELS


@pytest.fixture(scope="module")
def result(tmp_path_factory):
  return accelerator.run(tmp_path_factory.mktemp("out"), rounds=1, minutes=60)


pytestmark = pytest.mark.benchmark


def test_every_kernel_that_runs_here_is_right(result):
  checked = {row["kernel"] for row in result["correctness"]}
  assert checked >= {"experts blocked", "attention blocks"}
  assert not [row["error"] for row in result["correctness"] if row["error"]]
  assert all(row["difference"] < 1e-4 for row in result["correctness"])


def test_experts_and_training_have_rates(result):
  here = {name.value for name, kernel in EXPERT_KERNELS.items() if "cpu" in kernel.platforms}
  assert {row["kernel"] for row in result["experts"]} == here | {"slots"}
  for row in result["experts"]:
    assert all(0 < row[kind] < math.inf for kind in ("forward", "weight gradient", "all"))
  assert [row["error"] for row in result["training"]] == ["", ""]
  assert all(row["flops"] > 0 and math.isfinite(row["loss"]) for row in result["training"])
  assert result["decoding"]["decode"]


def test_the_text_says_that_the_sizes_are_toys(result):
  text = accelerator.text(result)
  assert "nothing about speed" in text and "MFU of toy, grouped" in text
  assert results.met(result["targets"]).endswith(f"of {len(result['targets'])} aims")


def test_a_kernel_that_is_wrong_is_named_and_not_timed(monkeypatch):
  monkeypatch.setattr(accelerator.choose, "kernel_difference", lambda *_: 0.5)
  rows = accelerator.correctness(accelerator.Dtype.FLOAT32)
  wrong = {row["kernel"] for row in rows if row["error"]}
  assert "experts blocked" in wrong
  shape = accelerator.toy().shapes[0]
  timed = accelerator.expert_rates(shape, accelerator.Dtype.FLOAT32, 1, 1.0, wrong)
  assert "blocked" not in {row["kernel"] for row in timed}
