"""The inference benchmark: its rows and its formula."""

import pytest

from benchmarks import inference, inference_report, plots
from tests.support.toys import toy_config

MODELS = ("MoE", "dense, active size", "dense, total size")


@pytest.mark.parametrize(
  ("batch", "expected"),
  [
    (1, 2),
    (2, 3.5),  # 2, and of the second row's 2 those that the first left: 2 * 6/8
    (1000, 8),
  ],
)
def test_how_many_of_8_experts_a_batch_reads(batch, expected):
  assert inference.expected_experts(8, 2, batch) == pytest.approx(expected)


@pytest.fixture(scope="module")
def measured():
  return inference.run(toy_config(), 1, (1, 4), seconds=0.0)


@pytest.fixture(scope="module")
def rows(measured):
  return {(r["model"], r["batch"]): r for r in measured["decode"]}


@pytest.mark.benchmark
def test_every_model_decodes_every_batch(rows):
  assert list(rows) == [(name, batch) for batch in (1, 4) for name in MODELS]


@pytest.mark.benchmark
@pytest.mark.parametrize(("twin", "size"), [(MODELS[1], "active"), (MODELS[2], "parameters")])
def test_the_dense_twins_have_the_active_and_the_total_size(twin, size, measured):
  sizes = measured["models"]
  assert sizes[twin]["parameters"] == pytest.approx(sizes["MoE"][size], rel=0.02)


@pytest.mark.benchmark
def test_bytes_of_a_step_by_hand(rows):
  """float32, 2 layers of q and out, k and v, two norms, the router, K experts; norm, head."""
  layer = 2 * 10 * 24 + 2 * 10 * 12 + 2 * 10 + 10 * 4 + 4 + 2 * 3 * 10 * 18
  cache = 128 * 2 * 2 * 6 * 2  # 128 slots
  assert rows["MoE", 1]["bytes"] == 4 * (2 * layer + 10 + 10 * 24 + cache)


@pytest.mark.benchmark
def test_how_many_experts_a_step_reads(rows):
  assert rows["MoE", 1]["experts_read"] == 2
  assert 2 <= rows["MoE", 4]["experts_read"] <= 4


@pytest.mark.benchmark
def test_the_report_gives_the_verdict_on_each_target(measured):
  targets = inference_report.targets(measured)
  text = inference_report.text(measured | {"targets": targets})
  assert all(t["verdict"] in text for t in targets) and len(targets) == 5


@pytest.mark.benchmark
def test_the_plot_is_drawn(measured, tmp_path):
  plots.inference(tmp_path, measured | {"targets": inference_report.targets(measured)})
  assert (tmp_path / "inference.png").stat().st_size > 1000
