"""Computes what experts specialise in, from a trace of each token's experts.

docs/specialisation.md explains the numbers. All functions are pure NumPy. Shares are shares of
assignments before drops.

T: traced tokens, in the order of the text. G: groups of them.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from moe_jax.data import tokenizers
from moe_jax.moe import counts
from moe_jax.moe.counts import POSITIONS

CLASSES = ("letters", "digits", "space", "newline", "punctuation", "other")
_NUM_TOP_TOKENS = 8
_EXCERPT = 600  # tokens of the text that the report shows with each token's experts


class Trace(NamedTuple):
  """Traced tokens in order, without padding, and their experts in each MoE layer."""

  token_T: np.ndarray  # ids
  row_T: np.ndarray  # the row of each token, counted from 0 in the order of the traced rows
  segment_T: np.ndarray  # the number of the document in its row
  place_T: np.ndarray  # the place in the row, from 0
  domain_T: np.ndarray  # index of the document's domain; -1 without one
  routed_ZTE: np.ndarray  # bool, before capacity
  kept_ZTE: np.ndarray  # bool, computed by the expert
  gate_ZTE: np.ndarray  # float32, before capacity; 0 where not routed


def load_by_group(routed_ZTE: np.ndarray, group_T: np.ndarray, num_groups: int) -> np.ndarray:
  """Returns load_ZGE: the share of each group's assignments that each expert gets.

  Tokens of group -1 are left out; a group without assignments has shares of 0.
  """
  counts_ZGE = np.stack([routed_ZTE[:, group_T == g].sum(axis=1) for g in range(num_groups)], 1)
  return counts_ZGE / np.maximum(counts_ZGE.sum(axis=-1, keepdims=True), 1)


def separation(load_ZGE: np.ndarray) -> np.ndarray:
  """Returns the mean over pairs of groups of the total variation distance, float [Z].

  The distance is sum_e |p_e - q_e| / 2: 0 if all groups use the experts alike, 1 if no two groups
  share an expert. NaN for fewer than two groups with assignments.
  """
  load_ZGE = load_ZGE[:, load_ZGE.sum(axis=(0, 2)) > 0]
  first, second = np.triu_indices(load_ZGE.shape[1], 1)
  if not len(first):
    return np.full(len(load_ZGE), np.nan)
  return np.abs(load_ZGE[:, first] - load_ZGE[:, second]).sum(axis=-1).mean(axis=-1) / 2


def byte_class(text: bytes) -> int:
  """Returns the index in CLASSES of a token, by its first byte."""
  if not text or text[0] > 126:
    return CLASSES.index("other")
  first = chr(text[0])
  kinds = (first.isalpha(), first.isdigit(), first in " \t", first in "\r\n", first.isprintable())
  return kinds.index(True) if any(kinds) else CLASSES.index("other")


def top_tokens(
  routed_TE: np.ndarray, token_T: np.ndarray, count: int
) -> list[list[tuple[int, float, float]]]:
  """Finds for each expert of a layer the tokens that it takes far more often than others do.

  Let s be a token's share of the expert's assignments and b its share of the layer's. The tokens
  are those of the largest s - b, which is large neither for rare tokens nor for merely frequent
  ones. Returns at most `count` tuples (id, s, s / b) for each expert.
  """
  ids_U, index_T = np.unique(token_T, return_inverse=True)
  where_N, expert_N = np.nonzero(routed_TE)
  counts_UE = np.zeros((len(ids_U), routed_TE.shape[1]))
  np.add.at(counts_UE, (index_T[where_N], expert_N), 1)
  share_UE = counts_UE / np.maximum(counts_UE.sum(axis=0), 1)
  base_U = counts_UE.sum(axis=1) / max(counts_UE.sum(), 1)
  tokens_E = []
  for e in range(routed_TE.shape[1]):
    excess_U = share_UE[:, e] - base_U
    best = [u for u in np.argsort(-excess_U, kind="stable")[:count] if excess_U[u] > 0]
    tokens_E.append([(int(ids_U[u]), share_UE[u, e], share_UE[u, e] / base_U[u]) for u in best])
  return tokens_E


def coactivation(routed_ZTE: np.ndarray) -> np.ndarray:
  """Returns [Z, E, E]: the share of expert e's tokens (row) that expert e' (column) takes too."""
  count_ZTE = routed_ZTE.astype(np.float32)  # float32 counts up to 2^24 exactly
  pairs_ZEE = count_ZTE.swapaxes(1, 2) @ count_ZTE
  alone_ZE = np.diagonal(pairs_ZEE, axis1=1, axis2=2)
  return pairs_ZEE / np.maximum(alone_ZE, 1)[..., None]


def repeats(trace: Trace) -> dict[str, Any]:
  """Returns how often neighbouring tokens of a document meet the same expert, for routing.json.

  repeat_rate_Z is the share of pairs whose first choices, of the largest gates, are the same, and
  repeat_any_Z of pairs that share an expert (Mixtral 2401.04088 table 5). The two of `random` are
  what uniform routing would give: 1 / E, and 1 - C(E-K, K) / C(E, K) for K choices of each token.
  A pair with a token that no expert took is not counted.
  """
  same_document = (np.diff(trace.row_T) == 0) & (np.diff(trace.segment_T) == 0)
  here = np.flatnonzero(same_document & (np.diff(trace.place_T) == 1))
  E = trace.routed_ZTE.shape[-1]
  first, either, by_chance = [], [], []
  for routed_TE, gate_TE in zip(trace.routed_ZTE, trace.gate_ZTE, strict=True):
    count_T = routed_TE.sum(axis=1)
    pairs = here[(count_T[here] > 0) & (count_T[here + 1] > 0)]
    best_T = np.argmax(np.where(routed_TE, gate_TE, -np.inf), axis=1)
    shared = (routed_TE[pairs] & routed_TE[pairs + 1]).any(axis=1)
    first.append((best_T[pairs] == best_T[pairs + 1]).sum() / max(len(pairs), 1))
    either.append(shared.sum() / max(len(pairs), 1))
    # Expert choice gives tokens different numbers of experts, so pairs have different chances.
    sizes, times = np.unique(
      np.stack([count_T[pairs], count_T[pairs + 1]]), axis=1, return_counts=True
    )
    chances = [1 - math.comb(E - a, b) / math.comb(E, b) for a, b in sizes.T.tolist()]
    by_chance.append(np.dot(chances, times) / max(times.sum(), 1))
  return {
    "repeat_rate_Z": first,
    "repeat_any_Z": either,
    "repeat_random": 1 / E,
    "repeat_any_random": float(np.mean(by_chance)),
  }


def overlap(routed_ZTE: np.ndarray, final_ZTE: np.ndarray) -> np.ndarray:
  """Computes router saturation (OLMoE 2409.02060 section 5), float [Z].

  It is the share of the final checkpoint's choices that an earlier checkpoint makes too. Uniform
  routing has K/E.
  """
  both_Z = (routed_ZTE & final_ZTE).sum(axis=(1, 2))
  return both_Z / np.maximum(final_ZTE.sum(axis=(1, 2)), 1)


def excerpt(trace: Trace, texts: dict[int, str], domains: Sequence[str]) -> dict[str, Any]:
  """Returns the first tokens of each domain, or of the text, with their experts by falling gate."""
  groups = range(len(domains)) if domains else [-1]
  share = _EXCERPT // len(groups)
  places = np.concatenate([np.flatnonzero(trace.domain_T == g)[:share] for g in groups])
  layers = []
  parts = (trace.routed_ZTE, trace.kept_ZTE, trace.gate_ZTE)
  for best in zip(*counts.by_gate(*(x[:, places] for x in parts)), strict=True):
    # Of each token as many as it has.
    taken = [[x_K[best_3K[0] >= 0] for x_K in best_3K] for best_3K in zip(*best, strict=True)]
    layer = {
      "experts": [experts.tolist() for experts, _, _ in taken],
      "gates": [[round(float(gate), 4) for gate in gates] for _, gates, _ in taken],
      "kept": [(~dropped).tolist() for _, _, dropped in taken],
    }
    layers.append(layer)
  labels = [domains[g] if g >= 0 else "" for g in trace.domain_T[places]]
  tokens = [texts[i] for i in trace.token_T[places].tolist()]
  return {"domain": labels, "tokens": tokens, "layers": layers}


def routing_report(
  trace: Trace, pieces: dict[int, bytes], domains: Sequence[str], seq_len: int, top_k: int
) -> dict[str, Any]:
  """Computes all numbers of this module for routing.json.

  `pieces` are the bytes that each traced token id stands for, b"" for the separator; `domains` are
  the names of the indices in domain_T, and without them the result has no numbers by domain.
  """
  texts = {i: tokenizers.shown(piece) for i, piece in pieces.items()}
  classes_T = np.array([byte_class(pieces[i]) for i in trace.token_T.tolist()])
  part_T = trace.place_T * POSITIONS // seq_len
  routed_ZTE = trace.routed_ZTE
  result = {
    "num_experts": routed_ZTE.shape[-1],
    "top_k": top_k,
    "tokens": len(trace.token_T),
    "domains": list(domains),
  }
  if domains:
    load_ZGE = load_by_group(routed_ZTE, trace.domain_T, len(domains))
    result["domain_load_ZGE"] = _to_lists(load_ZGE)
    distance_Z = separation(load_ZGE)
    if np.isfinite(distance_Z).all():
      result["domain_separation_Z"] = _to_lists(distance_Z)
  repeated = {name: _to_lists(value) for name, value in repeats(trace).items()}
  best_ZE = [top_tokens(routed_TE, trace.token_T, _NUM_TOP_TOKENS) for routed_TE in routed_ZTE]
  top_ZE = [
    [[[texts[i], round(share, 5), round(lift, 3)] for i, share, lift in best] for best in best_E]
    for best_E in best_ZE
  ]
  return (
    result
    | repeated
    | {
      "position_load_ZPE": _to_lists(load_by_group(routed_ZTE, part_T, POSITIONS)),
      "class_names": list(CLASSES),
      "class_load_ZCE": _to_lists(load_by_group(routed_ZTE, classes_T, len(CLASSES))),
      "top_tokens_ZE": top_ZE,
      "coactivation_ZEE": _to_lists(coactivation(routed_ZTE)),
      "text": excerpt(trace, texts, domains),
    }
  )


def _to_lists(x: np.ndarray) -> list:
  return np.round(np.asarray(x, np.float64), 6).tolist()


def specialisation_table(routing: dict[str, Any]) -> str:
  """Formats routing.json: each layer's repeats, separation of the domains, and saturation."""
  saturation = routing["saturation"]
  head = "layer  repeats first  any choice" + "  domains apart" * ("domain_separation_Z" in routing)
  lines = [
    f"specialisation, {routing['tokens']:,} tokens traced; routing.json has the rest",
    head + "".join(f"  as at {point['step']}" for point in saturation),
    f"random {100 * routing['repeat_random']:13.1f}%{100 * routing['repeat_any_random']:11.1f}%",
  ]
  for z, layer in enumerate(routing["layers"]):
    line = f"{layer:<6} {100 * routing['repeat_rate_Z'][z]:13.1f}%"
    line += f"{100 * routing['repeat_any_Z'][z]:11.1f}%"
    if "domain_separation_Z" in routing:
      line += f"{routing['domain_separation_Z'][z]:15.3f}"
    for point in saturation:
      line += f"{100 * point['overlap_Z'][z]:{len(str(point['step'])) + 7}.1f}%"
    lines.append(line)
  return "\n".join(lines)
