"""Every number of routing.json on cases worked out by hand."""

import math

import numpy as np
import pytest

from moe_jax.analysis import specialisation
from moe_jax.analysis.specialisation import Trace


def routed(*layers):
  """routed_ZTE of four experts, from the experts of each token: routed(["01", "2"], ...)."""
  return np.array([[[str(e) in token for e in range(4)] for token in layer] for layer in layers])


def traced(routed_ZTE, gate_ZTE=None, **tokens):
  """A trace of one row and one document, of which `tokens` changes fields."""
  T = routed_ZTE.shape[1]
  zeros_T, places_T = np.zeros(T, int), np.arange(T)
  gate_ZTE = routed_ZTE.astype(np.float32) if gate_ZTE is None else gate_ZTE
  whole = dict(
    token_T=places_T,
    row_T=zeros_T,
    segment_T=zeros_T,
    place_T=places_T,
    domain_T=zeros_T,
    routed_ZTE=routed_ZTE,
    kept_ZTE=routed_ZTE,
    gate_ZTE=gate_ZTE,
  )
  return Trace(**(whole | {name: np.array(values) for name, values in tokens.items()}))


def test_load_by_group_leaves_out_minus_one():
  routed_ZTE = routed(["01", "01", "23", "0", "3"], ["0", "1", "2", "3", "3"])
  load_ZGE = specialisation.load_by_group(routed_ZTE, np.array([0, 0, 1, 1, -1]), 3)
  expected = [
    [[0.5, 0.5, 0, 0], [1 / 3, 0, 1 / 3, 1 / 3], [0, 0, 0, 0]],
    [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5], [0, 0, 0, 0]],
  ]
  np.testing.assert_allclose(load_ZGE, expected, rtol=1e-12)


def test_separation_by_hand():
  """Pairs: disjoint 1, (1/2, 1/2, 0) with (0, 1/2, 1/2) 1/2, and with itself 0."""
  p, q, r = [0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5], [0, 0.5, 0.5, 0]
  none = [0, 0, 0, 0]
  np.testing.assert_allclose(specialisation.separation(np.array([[p, q], [p, p]])), [1, 0])
  three = specialisation.separation(np.array([[p, none, q, r]]))
  np.testing.assert_allclose(three, [(1 + 0.5 + 0.5) / 3])
  assert np.isnan(specialisation.separation(np.array([[p, none]]))).all()


@pytest.mark.parametrize(("text", "name"), [
  (b"a", "letters"), (b"Zed", "letters"), (b"7", "digits"), (b" the", "space"), (b"\t", "space"),
  (b"\n", "newline"), (b"_", "punctuation"), (b"(", "punctuation"), (b"\xc3", "other"),
  (b"\x00", "other"), (b"", "other"), (b"~", "punctuation"), (b"\x7f", "other"),
])  # fmt: skip
def test_byte_classes(text, name):
  assert specialisation.CLASSES[specialisation.byte_class(text)] == name


def test_top_tokens_by_hand():
  """Ten assignments: token 5 has six (five at expert 0), token 7 three (two at 1), token 9 one."""
  tokens_T = np.array([5, 5, 5, 5, 5, 5, 7, 7, 7, 9])
  routed_TE = routed(["0", "0", "0", "0", "0", "1", "1", "1", "2", "0"])[0]
  top = specialisation.top_tokens(routed_TE, tokens_T, 2)
  assert [[i for i, _, _ in expert] for expert in top] == [[5, 9], [7], [7], []]
  share_5, share_9 = top[0][0][1:], top[0][1][1:]
  np.testing.assert_allclose(share_5, [5 / 6, (5 / 6) / 0.6])
  np.testing.assert_allclose(share_9, [1 / 6, (1 / 6) / 0.1])
  np.testing.assert_allclose(top[1][0][1:], [2 / 3, (2 / 3) / 0.3])


def test_coactivation_by_hand():
  pairs_ZEE = specialisation.coactivation(routed(["01", "01", "02", "0"]))
  expected = [[1, 2 / 4, 1 / 4, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
  np.testing.assert_allclose(pairs_ZEE, [expected], rtol=1e-6)


def test_repeats_by_hand():
  """Six tokens; the pair over the documents' border and the one over a gap do not count."""
  routed_ZTE = routed(["01", "12", "12", "03", "03", "23"])
  first = [0, 1, 2, 3, 3, 3]  # the larger gate
  gate_ZTE = routed_ZTE * np.float32(0.3)
  gate_ZTE[0, np.arange(6), first] = 0.7
  trace = traced(routed_ZTE, gate_ZTE, segment_T=[1, 1, 1, 2, 2, 2], place_T=[0, 1, 2, 3, 4, 6])
  # Pairs 01-12 (first 0, 1), 12-12 (1, 2), 03-03 (3, 3): one first choice repeats, all sets meet.
  found = specialisation.repeats(trace)
  np.testing.assert_allclose(found["repeat_rate_Z"], [1 / 3])
  np.testing.assert_allclose(found["repeat_any_Z"], [1.0])
  assert found["repeat_random"] == 0.25
  assert found["repeat_any_random"] == pytest.approx(
    1 - 1 / 6
  )  # of 6 pairs of 4 experts one is disjoint
  other_row = specialisation.repeats(trace._replace(row_T=np.array([0, 0, 1, 1, 1, 1])))
  np.testing.assert_allclose(other_row["repeat_rate_Z"], [1 / 2])  # 01-12 and 03-03 are left


def test_random_repeats_of_mixtral():
  """Table 5 of 2401.04088, 8 experts: 12.5% for the first choice, 46% for the first or second."""
  routed_ZTE = np.zeros((1, 3, 8), bool)
  routed_ZTE[:, :, :2] = True
  found = specialisation.repeats(traced(routed_ZTE))
  assert found["repeat_random"] == 0.125
  assert found["repeat_any_random"] == pytest.approx(0.464, abs=5e-4)


def test_random_repeats_are_what_uniform_routing_gives():
  rng = np.random.default_rng(0)
  score = rng.random((1, 200_000, 6))
  routed_ZTE = score >= np.sort(score)[..., -2:-1]
  found = specialisation.repeats(traced(routed_ZTE, np.where(routed_ZTE, score, 0)))
  # Standard error 1e-3.
  assert found["repeat_rate_Z"][0] == pytest.approx(found["repeat_random"], abs=4e-3)
  assert found["repeat_any_Z"][0] == pytest.approx(found["repeat_any_random"], abs=4e-3)
  assert found["repeat_any_random"] == pytest.approx(1 - math.comb(4, 2) / math.comb(6, 2))


def test_repeats_where_experts_choose():
  """A token that nobody took makes no pair; one expert and two of four meet by chance 1/2."""
  found = specialisation.repeats(traced(routed(["0", "", "1", "12"])))
  np.testing.assert_allclose(found["repeat_any_Z"], [1.0])
  assert found["repeat_any_random"] == pytest.approx(0.5)
  nobody = specialisation.repeats(traced(routed(["0", "", "1"])))
  assert nobody["repeat_any_Z"][0] == 0 and nobody["repeat_any_random"] == 0


def test_overlap_by_hand():
  before = routed(["013", "12", "23"], ["01", "01", "01"])
  final = routed(["01", "23", "01"], ["01", "01", "01"])
  np.testing.assert_allclose(specialisation.overlap(before, final), [3 / 6, 1.0])


def test_report_holds_what_was_traced():
  routed_ZTE = routed(["01", "12", "03", "3"], ["2", "2", "1", "01"])
  gate_ZTE = np.where(routed_ZTE, [[[0.1, 0.2, 0.3, 0.4]]], 0).astype(np.float32)
  kept_ZTE = routed_ZTE.copy()
  kept_ZTE[0, 2, 3] = False
  trace = traced(
    routed_ZTE,
    gate_ZTE,
    token_T=[256, 97, 10, 98],
    segment_T=[1, 1, 1, 1],
    domain_T=[0, 0, 1, 1],
  )._replace(kept_ZTE=kept_ZTE)
  pieces = {256: b"", 97: b"a", 10: b"\n", 98: b"b"}
  found = specialisation.routing_report(trace, pieces, ("code", "prose"), 8, 2)
  assert (found["num_experts"], found["top_k"], found["tokens"]) == (4, 2, 4)
  expected = [[0.25, 0.5, 0.25, 0], [1 / 3, 0, 0, 2 / 3]]
  np.testing.assert_allclose(found["domain_load_ZGE"][0], expected, atol=1e-6)
  np.testing.assert_allclose(found["domain_separation_Z"], [0.75, 1.0], atol=1e-6)
  assert np.shape(found["position_load_ZPE"]) == (2, 8, 4)
  assert found["position_load_ZPE"][1][3] == [0.5, 0.5, 0, 0]  # of the fourth token alone
  by_class = dict(zip(found["class_names"], found["class_load_ZCE"][1], strict=True))
  np.testing.assert_allclose(by_class["letters"], [1 / 3, 1 / 3, 1 / 3, 0], atol=1e-6)
  assert by_class["newline"] == [0, 1, 0, 0] and by_class["other"] == [0, 0, 1, 0]
  text = found["text"]
  assert text["tokens"] == ["<|begin|>", "a", "\n", "b"]
  assert text["domain"] == ["code", "code", "prose", "prose"]
  first, second = text["layers"]
  assert first["experts"] == [[1, 0], [2, 1], [3, 0], [3]]  # the best gate first
  assert first["gates"] == [[0.2, 0.1], [0.3, 0.2], [0.4, 0.1], [0.4]]
  assert first["kept"] == [[True, True], [True, True], [False, True], [True]]
  assert second["experts"] == [[2], [2], [1], [1, 0]]


def test_without_domains_there_are_no_numbers_of_domains():
  trace = traced(routed(["01", "12"]), domain_T=[-1, -1], token_T=[97, 97])
  found = specialisation.routing_report(trace, {97: b"a"}, (), 8, 2)
  assert found["domains"] == []
  assert "domain_load_ZGE" not in found and "domain_separation_Z" not in found
  assert found["text"]["domain"] == ["", ""] and found["text"]["tokens"] == ["a", "a"]
  routing = found | {"layers": [0], "saturation": [{"step": 5, "overlap_Z": [0.5]}]}
  lines = specialisation.specialisation_table(routing).splitlines()
  assert "apart" not in lines[1] and "as at 5" in lines[1] and "50.0%" in lines[-1]
