"""The benchmarks at toy size: what they write, and that a wrong program is not timed."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import inference, inference_report, layer, layer_report, plots, results, train
from moe_jax.config import Dispatch, Dtype, UserError
from moe_jax.moe import dispatch
from tests.support.toys import toy_config

TOY = layer.Setting(8, 12, 2, (8,), 2, 8, phases=True)
TOY_SIZES = dict(
  vocab_size=32, dim=16, layers=1, heads=2, kv_heads=1, experts_count=2, top_k=1, expert_dim=16,
  seq_len=8, batch_size=2, seed=0,
)  # fmt: skip


@pytest.fixture(scope="module")
def measured():
  # The second is the accelerators' kind.
  return layer.run([TOY, TOY._replace(dtype=Dtype.BFLOAT16, phases=False)], 1, min_seconds=0.0)


@pytest.mark.slow
def test_layer_rows(measured):
  rows = {(r["dtype"], r["candidate"]): r for r in measured["rows"]}
  names = {"ffn", "gather E=8", "grouped E=8"}
  assert set(rows) == {(d, n) for d in ("float32", "bfloat16") for n in names}
  for row in rows.values():
    assert row["forward_s"] > 0 and row["step_vs_ffn"] > 0 and row["step_of_matmul"] > 0
    assert 0 <= row["drop_fraction"] < 1 and row["error"] < 0.05
  assert rows["float32", "ffn"]["step_vs_ffn"] == 1
  # Capacity 1.0 drops as soon as loads are uneven, and the grouped path never does.
  assert rows["float32", "gather E=8"]["drop_fraction"] > 0
  assert rows["float32", "grouped E=8"]["drop_fraction"] == 0
  assert rows["float32", "gather E=8"]["max_vio"] == rows["float32", "grouped E=8"]["max_vio"] > 0


@pytest.mark.slow
def test_layer_phases(measured):
  assert [split["candidate"] for split in measured["phases"]] == ["gather E=8", "grouped E=8"]
  for split in measured["phases"]:
    for kind in ("forward", "step"):
      shares = dict(split[kind])
      assert shares.pop("layer_s") > 0 and min(shares.values()) > 0
      whole, moving = shares.pop("sum"), shares.pop("moving")
      assert whole == pytest.approx(sum(shares.values()))
      assert moving == pytest.approx(whole - shares["experts"] - shares["statistics"])


@pytest.mark.slow
def test_layer_writes_what_it_measured(measured, tmp_path):
  result = measured | {"targets": layer_report.targets(measured)}
  what = [t["what"] for t in result["targets"]]
  # float32: gather and grouped against the FFN, and their phases; bfloat16: the matmul's rate.
  assert len(what) == 5 and sum("matmul rate" in w for w in what) == 1
  text = layer_report.text(result)
  assert all(t["verdict"] in text for t in result["targets"])
  results.write(tmp_path, "layer.json", {"environment": results.environment()} | result)
  plots.layer(tmp_path, result)
  read = json.loads((tmp_path / "layer.json").read_text())
  assert set(read) == {"environment", "rows", "phases", "targets"}
  assert set(read["environment"]) >= {"date", "device", "jax", "commit"}
  assert [r["step_vs_ffn"] for r in read["rows"]] == [r["step_vs_ffn"] for r in result["rows"]]
  assert (tmp_path / "layer.png").stat().st_size > 1000


@pytest.mark.parametrize(
  "how", [Dispatch.GATHER, pytest.param(Dispatch.GROUPED, marks=pytest.mark.slow)]
)
def test_wrong_program_is_not_timed(monkeypatch, how):
  def forgets_the_gates(y, assigned, slots, layout):
    rows = slots.slot_N.reshape(-1, layout.choices)
    return dispatch._rows_or_zero(y.reshape(-1, y.shape[-1]), rows).sum(axis=1)

  broken = dataclasses.replace(dispatch.DISPATCHERS[how], combine=forgets_the_gates)
  monkeypatch.setitem(dispatch.DISPATCHERS, how, broken)
  with pytest.raises(UserError, match=rf"{how.value} E=8: .* differ from the dense oracle"):
    layer.run([TOY._replace(phases=False)], 1, min_seconds=0.0)


def test_targets_say_by_how_much():
  assert results.target("time", 1.1, 1.15)["verdict"] == "met"
  assert results.target("time", 1.38, 1.15)["verdict"] == "missed by 20%"
  assert results.target("speed", 0.55, 1.1, at_least=True)["verdict"] == "missed by 50%"


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


def test_command_line_refuses():
  command = [sys.executable, "-m", "benchmarks", "layer", "--rounds=0"]
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 2 and "--rounds=0: it must be at least 1" in done.stderr
