"""The layer's benchmark at toy size: what it writes, and that a wrong program is not timed."""

import dataclasses
import json

import pytest

from benchmarks import layer, layer_report, plots, results
from moe_jax.config import Dispatch, Dtype
from moe_jax.errors import UserError
from moe_jax.moe import dispatch

TOY = layer.Setting(8, 12, 2, (8,), 2, 8, phases=True)


@pytest.fixture(scope="module")
def measured():
  # The second is the accelerators' kind.
  return layer.run([TOY, TOY._replace(dtype=Dtype.BFLOAT16, phases=False)], 1, min_seconds=0.0)


CASES = [
  (dtype, name)
  for dtype in ("float32", "bfloat16")
  for name in (
    "ffn",
    "gather E=8",
    "grouped E=8",
    "slots E=8, not routed",
    "blocks E=8, not routed",
  )
]


@pytest.fixture(scope="module")
def rows(measured):
  return {(r["dtype"], r["candidate"]): r for r in measured["rows"]}


@pytest.mark.benchmark
def test_every_candidate_is_measured_in_every_precision(rows):
  assert set(rows) == set(CASES)


@pytest.mark.benchmark
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_row_has_times_drops_and_a_small_error(case, rows):
  row = rows[case]
  assert row["forward_s"] > 0 and row["step_vs_ffn"] > 0 and row["step_of_matmul"] > 0
  assert 0 <= row["drop_fraction"] < 1 and row["error"] < 0.05


@pytest.mark.benchmark
def test_the_ffn_is_what_the_others_are_compared_with(rows):
  assert rows["float32", "ffn"]["step_vs_ffn"] == 1


@pytest.mark.benchmark
def test_capacity_drops_and_the_grouped_path_does_not(rows):
  """Capacity 1.0 drops as soon as loads are uneven."""
  gather, grouped = rows["float32", "gather E=8"], rows["float32", "grouped E=8"]
  assert gather["drop_fraction"] > 0
  assert grouped["drop_fraction"] == 0
  assert gather["max_vio"] == grouped["max_vio"] > 0


@pytest.mark.benchmark
def test_phases_add_up_to_the_layer(measured):
  assert [split["candidate"] for split in measured["phases"]] == ["gather E=8", "grouped E=8"]
  for split in measured["phases"]:
    for kind in ("forward", "step"):
      shares = dict(split[kind])
      assert shares.pop("layer_s") > 0 and min(shares.values()) > 0
      whole, moving = shares.pop("sum"), shares.pop("moving")
      assert whole == pytest.approx(sum(shares.values()))
      assert moving == pytest.approx(whole - shares["experts"] - shares["statistics"])


@pytest.fixture(scope="module")
def result(measured):
  return measured | {"targets": layer_report.targets(measured)}


@pytest.mark.benchmark
def test_targets_of_a_layer(result):
  """float32: gather and grouped against the FFN, and their phases; bfloat16: the matmul's rate."""
  what = [t["what"] for t in result["targets"]]
  assert len(what) == 5 and sum("matmul rate" in w for w in what) == 1


@pytest.mark.benchmark
def test_the_report_gives_the_verdict_on_each_target(result):
  text = layer_report.text(result)
  assert all(t["verdict"] in text for t in result["targets"])


@pytest.mark.benchmark
def test_the_file_holds_what_was_measured_and_where(result, tmp_path):
  results.write(tmp_path, "layer.json", {"environment": results.environment()} | result)
  read = json.loads((tmp_path / "layer.json").read_text())
  assert set(read) == {"environment", "rows", "phases", "targets"}
  assert set(read["environment"]) >= {"date", "device", "jax", "commit"}
  assert [r["step_vs_ffn"] for r in read["rows"]] == [r["step_vs_ffn"] for r in result["rows"]]


@pytest.mark.benchmark
def test_the_plot_is_drawn(result, tmp_path):
  plots.layer(tmp_path, result)
  assert (tmp_path / "layer.png").stat().st_size > 1000


@pytest.mark.parametrize(
  "how", [Dispatch.GATHER, pytest.param(Dispatch.GROUPED, marks=pytest.mark.benchmark)]
)
def test_wrong_program_is_not_timed(monkeypatch, how):
  def forgets_the_gates(y, assigned, slots, layout):
    rows = slots.slot_N.reshape(-1, layout.choices)
    return dispatch._rows_or_zero(y.reshape(-1, y.shape[-1]), rows).sum(axis=1)

  part = (
    dict(pack=dispatch.gather_pack) if how is Dispatch.GATHER else dict(combine=forgets_the_gates)
  )
  broken = dataclasses.replace(dispatch.DISPATCHERS[how], **part)
  monkeypatch.setitem(dispatch.DISPATCHERS, how, broken)
  with pytest.raises(UserError, match=rf"{how.value} E=8: .* differ from the dense oracle"):
    layer.run([TOY._replace(phases=False)], 1, min_seconds=0.0)
