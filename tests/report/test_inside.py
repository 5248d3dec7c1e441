"""What the experts of a run do: heat maps of their loads, and a text by them."""

import numpy as np

from moe_jax.report import inside, runs
from tests.support import report_runs


def test_heat_map_bins():
  lines = [{"step": s, "load_ZE": [[s / 10, 1 - s / 10]]} for s in (1, 2, 3, 4)]
  steps, load_ZES = inside.heat(runs.Run(name="a", seed=0, status="finished", train=lines), 2)
  assert steps.tolist() == [2, 4]
  # Loads 0.15 and 0.35 of two experts, whose fair share is a half.
  np.testing.assert_allclose(load_ZES, [[[0.3, 0.7], [1.7, 1.3]]])


def test_a_text_by_its_experts(tmp_path):
  report_runs.write_routing(report_runs.write_run(tmp_path, "moe", 0, 4), 4)
  run = runs.read_run(tmp_path, "moe")
  arm = runs.ArmRuns(name="moe", runs=[run])
  first, second = inside.excerpts(runs.Study(title="t", arms=[arm]))
  assert first.title.startswith("moe, seed 0, layer 1") and "layer 3" in second.title
  headings, styles, experts, texts = zip(*first.tokens, strict=True)
  assert headings == ("prose", "", "", "code", "")
  # Token 1 went to its second choice, nobody took token 2, token 4 lost its second choice.
  assert styles == ("e0", "e2 dropped", "none", "e3", "e0 dropped")
  assert [style for _, style, *_ in second.tokens] == [
    "e1",
    "e3 dropped",
    "none",
    "e0",
    "e1 dropped",
  ]
  assert experts[1] == "expert 1: 0.750, dropped; expert 2: 0.250"
  assert texts == ("a", "b", " ", "↵\n", "</script>")
  assert first.experts.rows[3] == ["3", "1.00", "1.00", '"b"']


def test_of_many_layers_some_are_shown():
  assert inside.spread_out(2) == [0, 1] and inside.spread_out(0) == []
  assert inside.spread_out(26) == [0, 5, 10, 15, 20, 25]
