"""The expert-parallel layer compiles for TPU and exchanges what it should; so does a train step,
with its flash attention.

libtpu compiles for a described topology, so this needs no TPU. It says nothing of run time, nor of
numbers: tests/moe/test_exchange.py checks those of the one exchange that a CPU does not have, and
test_attention.py those of attention.
"""

import importlib
import importlib.util
import json
import math
import os
import re
import subprocess
import sys

import jax
import pytest

from moe_jax.compile import targets
from tests.support.toys import ROOT
from tests.support.train_step_case import square_arrays

WORKER = ROOT / "tests/support/tpu_compile_worker.py"

# The worker's sizes: 128 tokens on each of 4 devices of `expert`, 2 choices.
E, D, F, SORTED_ROWS = 8, 256, 384, 2048
TOKENS, ROWS = 4 * 128, 4 * 128 * 2
# jax 0.10.2's libtpu computes a weight gradient for all rows and each expert: E times the work.
LEAN_GRADIENT = jax.__version_info__ >= (0, 12)

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install -e '.[tpu]'"
  ),
]


def compile_for_tpu(case, tmp_path):
  """What the worker writes: see there."""
  out = tmp_path / "compiled.json"
  env = {**os.environ, "PYTHONPATH": str(ROOT)}
  subprocess.run([sys.executable, WORKER, case, out], cwd=ROOT, env=env, check=True, timeout=600)
  return json.loads(out.read_text())


def results(compiled, name):
  """The shapes that each op of that name returns (or holds, where it is asynchronous)."""
  found = re.findall(rf"= (.*?) {name}(?:-start)?\(", compiled["hlo"])
  return [re.findall(r"\w+\[[\d,]*\]", types) for types in found]


def elements(shape):
  return math.prod(int(n) for n in re.findall(r"\d+", shape.split("[")[1]))


def check_flops(forward, both, ideal):
  # XLA counts what its grouped matmul kernels declare: all rows of the buffer, once.
  assert ideal <= forward["flops"] <= 1.2 * ideal
  if LEAN_GRADIENT:
    assert 3 * ideal <= both["flops"] <= 1.2 * 3 * ideal


def check_ragged(forward, both):
  for compiled, count in ((forward, 2), (both, 4)):
    exchanged = results(compiled, "ragged-all-to-all")
    assert len(exchanged) == count
    assert all("bf16" in shapes[0] for shapes in exchanged), exchanged
    # The plan needs every device's row counts; nothing else is gathered, so no weights.
    assert results(compiled, "all-gather") == [["s32[4,4,2]"]]
  # The transposed exchange sends its offsets, X numbers, to where they are known already.
  assert results(forward, "all-to-all") == []
  small = results(both, "all-to-all")
  assert len(small) == 4 and all(re.fullmatch(r"s32\[[4,1]*\]", s) for (s,) in small), small
  check_flops(forward, both, 3 * 2 * ROWS * D * F)


def test_ragged_exchange_compiles(tmp_path):
  check_ragged(*compile_for_tpu("ragged", tmp_path))


needs_tokamax = pytest.mark.skipif(
  importlib.util.find_spec("tokamax") is None,
  reason="needs tokamax: pip install tokamax (Python 3.12, jax 0.11.1)",
)


@needs_tokamax
def test_tokamax_compiles(tmp_path):
  forward, both = compile_for_tpu("mosaic", tmp_path)
  check_ragged(forward, both)
  # Its own kernels, not XLA's: y of three matmuls, then dx and dw of each.
  kernels = re.findall(r"%(\w+?)[.\d]* = .*tpu_custom_call", both["hlo"])
  for kernel in ("gmm", "gmm_transpose_rhs", "tgmm"):
    assert kernels.count(f"pallas_tpu_ragged_dot_{kernel}") == 3, kernels


@needs_tokamax
def test_tokamax_v2_compiles(tmp_path):
  """On one device: it cannot say over which axes of a mesh its result varies."""
  _, both = compile_for_tpu("mosaic_tpu_v2", tmp_path)
  kernels = re.findall(r"%(gmm_v2|tgmm_v2)-\S+ = .*tpu_custom_call", both["hlo"])
  assert (kernels.count("gmm_v2"), kernels.count("tgmm_v2")) == (6, 3)  # y and dx; dw


def test_all_gather_exchange_compiles(tmp_path):
  forward, both = compile_for_tpu("all_gather", tmp_path)
  for compiled, count in ((forward, 1), (both, 2)):
    gathered = [s[-1] for s in results(compiled, "all-gather")]
    rows = [shape for shape in gathered if shape.startswith("bf16")]
    # The tokens, and backward the gradient of what was scattered; no weights.
    assert [elements(shape) for shape in rows] == [TOKENS * D] * count
    assert all(elements(shape) <= TOKENS * 2 for shape in gathered if shape not in rows)
    scattered = [s[-1] for s in results(compiled, "reduce-scatter")]
    assert [elements(shape) for shape in scattered] == [TOKENS // 4 * D] * count
    assert not results(compiled, "all-to-all")
  check_flops(forward, both, 3 * 2 * ROWS * D * F)


def test_all_to_all_with_capacity_compiles(tmp_path):
  for compiled, count in zip(compile_for_tpu("capacity", tmp_path), (2, 4), strict=True):
    exchanged = [s[-1] for s in results(compiled, "all-to-all")]
    capacity = 40  # 1.25 * 128 * 2 / 8
    gates = [shape for shape in exchanged if shape.startswith("f32")]  # and their gradients
    assert [elements(shape) for shape in gates] == [E * capacity] * (count // 2)
    rows = [shape for shape in exchanged if shape not in gates]
    assert [elements(shape) for shape in rows] == [E * capacity * D] * count
    assert all(shape.startswith("bf16") for shape in rows)
    assert not results(compiled, "all-gather")


def test_ragged_dot_does_the_work_once(tmp_path):
  check_flops(*compile_for_tpu("ragged_dot", tmp_path), 3 * 2 * SORTED_ROWS * D * F)


def test_train_step_has_flash_attention(tmp_path):
  """Its kernels, forward and backward; in memory no array of queries by keys."""
  hlo = compile_for_tpu("splash", tmp_path)
  kernels = re.findall(r"%splash_mha_(\w+?)[.\d]* = .*tpu_custom_call", hlo)
  assert sorted(kernels) == [
    "dkv_segmented_no_residuals",
    "dq_segmented_no_residuals",
    "fwd_segmented_residuals",
  ]
  assert not square_arrays(hlo)


def test_train_step_with_the_reference_has_scores_in_memory(tmp_path):
  """So the search for them finds them."""
  hlo = compile_for_tpu("reference", tmp_path)
  assert "splash" not in hlo
  assert square_arrays(hlo)


def slices_of(path):
  """(config, topology, what a slice needs changed) of each layout, or of a small slice.

  A routing group of lab_moe is all of its batch.
  """
  name = f"configs/{path.name}"
  layouts = getattr(importlib.import_module(f"configs.{path.stem}"), "LAYOUTS", None)
  if layouts is None:
    return [(name, "v5e:2x2", {"data.batch_size": 32} if path.stem == "lab_moe" else {})]
  parsed = {word: targets.parse(word.replace("_", "-")) for word in layouts}
  torus = {word: "x".join(map(str, t.shape)) for word, t in parsed.items() if t.chip.tpu}
  return [(f"{name}:{word}", f"{parsed[word].family}:{size}", {}) for word, size in torus.items()]


CONFIGS = [p for p in sorted((ROOT / "configs").glob("*.py")) if p.name != "published.py"]
SLICES = [one for path in CONFIGS for one in slices_of(path)]


def test_every_config_makes_its_mesh_on_a_slice(tmp_path):
  """Some split an axis of the torus, and a run says so."""
  mixtral, two_slices = "configs/mixtral_8x7b.py:v5p_128", {"mesh.data": 2}
  whole = {"mesh.fsdp": 16, "mesh.expert": 4}
  more = [(mixtral, "v5p:4x4x4", whole), (mixtral, "v5p:4x4x8", two_slices)]
  found = compile_for_tpu(json.dumps(SLICES + more), tmp_path)
  for (path, name, _), (sizes, _) in zip(SLICES + more, found, strict=True):
    assert math.prod(sizes.values()) == math.prod(map(int, name[4:].split("x"))), path
  notices = {path: notice for (path, *_), (_, notice) in zip(SLICES, found, strict=False)}
  assert notices.pop(mixtral).endswith("without a split: 1 x 16 x 4, 4 x 4 x 4, 16 x 1 x 4")
  assert not any(notices.values())
  (sizes, no_notice), (more_sizes, notice) = found[len(SLICES) :]
  assert sizes == dict(data=1, fsdp=16, expert=4, context=1, tensor=1) and not no_notice
  assert more_sizes == dict(data=2, fsdp=8, expert=8, context=1, tensor=1)
  assert "1 x 16 x 8" in notice


def test_a_slice_gathers_weights_and_scatters_gradients(tmp_path):
  """Over all its 64 devices, too; none sums whole weights, zeros elsewhere, or whole gradients."""
  for layout, found in compile_for_tpu("split", tmp_path).items():
    expert = int(layout.split("x")[1])
    attention, experts = 2048 * 8 * 128, 8 // expert * 2048 * 512  # elements of a device's weights
    assert {attention, experts} <= set(found["all-gather"]), layout
    assert {attention // 64, experts * expert // 64} <= set(found["reduce-scatter"]), layout
    router = 2048 * 8
    assert max(found["all-reduce"]) <= router, layout


# Cycles of all of a layer's phases, as a multiple of those of its matmuls in slots of one expert.
# The experts' own are not in those of sorted rows: their kernels are custom calls. The most that
# libtpu 0.0.50 said was a tenth less; slots were at 2.4 when an axis other than 0 was exchanged,
# and at 1.42 when each token's device multiplied by the gates.
MOST = {
  "one expert a device": 1.32,
  "two experts a device": 1.46,
  "all_to_all": 0.74,
  "ragged": 1.55,
}


def test_exchanges_cost_little_beside_the_matmuls(tmp_path):
  """By the compiler's own estimates, forward and backward, without communication."""
  found = compile_for_tpu("cycles", tmp_path)
  matmuls = found["one expert a device"]["experts"]
  ratios = {name: sum(phases.values()) / matmuls for name, phases in found.items()}
  assert not {name: ratio for name, ratio in ratios.items() if ratio > MOST[name]}, ratios
