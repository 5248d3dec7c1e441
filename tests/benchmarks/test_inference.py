"""The inference benchmark: its rows and its formula."""

import pytest

from benchmarks import inference, inference_report, plots
from tests.support.toys import toy_config


@pytest.mark.slow
def test_inference_rows_and_formula(tmp_path):
  assert inference.expected_experts(8, 2, 1) == 2
  # 2, and of the second row's 2 those that the first left: 2 * 6/8.
  assert inference.expected_experts(8, 2, 2) == pytest.approx(3.5)
  assert inference.expected_experts(8, 2, 1000) == pytest.approx(8)
  config = toy_config()
  result = inference.run(config, 1, (1, 4), seconds=0.0)
  rows = {(r["model"], r["batch"]): r for r in result["decode"]}
  names = ("MoE", "dense, active size", "dense, total size")
  assert list(rows) == [(name, batch) for batch in (1, 4) for name in names]
  sizes = result["models"]
  assert sizes[names[1]]["parameters"] == pytest.approx(sizes["MoE"]["active"], rel=0.02)
  assert sizes[names[2]]["parameters"] == pytest.approx(sizes["MoE"]["parameters"], rel=0.02)
  # Bytes by hand: float32, 2 layers; q and out, k and v, two norms, the router, K experts; norm,
  # head; 128 slots.
  layer = 2 * 10 * 24 + 2 * 10 * 12 + 2 * 10 + 10 * 4 + 4 + 2 * 3 * 10 * 18
  cache = 128 * 2 * 2 * 6 * 2
  assert rows["MoE", 1]["bytes"] == 4 * (2 * layer + 10 + 10 * 24 + cache)
  assert rows["MoE", 1]["experts_read"] == 2
  assert 2 <= rows["MoE", 4]["experts_read"] <= 4
  result["targets"] = inference_report.targets(result)
  text = inference_report.text(result)
  assert all(t["verdict"] in text for t in result["targets"]) and len(result["targets"]) == 5
  plots.inference(tmp_path, result)
  assert (tmp_path / "inference.png").stat().st_size > 1000
