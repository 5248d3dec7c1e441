"""What a compiled training step may do, on TPUs and GPUs that are not here.

Each program is compiled by the command that a user types.
"""

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.support.compilers import FIELDS, GPU, LAYERS, LENGTH, OTHERS, TPU, VOCABULARY, D, E, F, K
from tests.support.toys import ROOT

pytestmark = pytest.mark.slow
on_both = pytest.mark.parametrize(
  "topology", [pytest.param("v5e:4x8", marks=TPU), pytest.param("h200-32", marks=GPU)]
)


def command(topology, *arguments, config="configs/debug.py", fields=FIELDS):
  """The command of a user, after its end."""
  words = [f"--config.{name}={value}" for name, value in fields.items()]
  line = ["-m", "moe_jax.compile", f"--config={config}", f"--topology={topology}"]
  env = {**os.environ, "PYTHONPATH": str(ROOT)}
  env.pop("XLA_FLAGS", None)
  return subprocess.run(
    [sys.executable, *line, *words, *arguments],
    cwd=ROOT, env=env, capture_output=True, text=True, timeout=900,
  )  # fmt: skip


@functools.cache
def compiled(topology, *words, **mesh):
  """The JSON of a step on a mesh, and the page that was printed."""
  fields = FIELDS | {f"mesh.{axis}": n for axis, n in mesh.items()}
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "step.json"
    done = command(topology, f"--json={path}", *words, fields=fields)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(path.read_text()) | {"page": done.stdout}


def moved(result, axis, *kinds):
  return [c for c in result["collectives"] if axis in c["axes"] and c["kind"] in kinds]


def rows(result):
  return [c for c in moved(result, "expert", "all-to-all") if c["size"] > 10_000]


@on_both
@pytest.mark.parametrize("expert", [4, 32])
def test_a_layer_exchanges_rows_and_gathers_no_expert_over_the_expert_axis(topology, expert):
  """Rows there and back, there again for the backward pass, and two times their gradients."""
  result = compiled(topology, data=32 // expert, expert=expert)
  assert sum(c["times"] for c in rows(result)) == 5 * LAYERS
  assert {tuple(c["axes"]) for c in rows(result)} == {("expert",)}
  # All that is gathered over `expert` is no more than what is no expert, for two passes.
  gathered = sum(c["size"] * c["times"] for c in moved(result, "expert", "all-gather"))
  assert 0 < gathered <= 2.1 * 2 * OTHERS
  scattered = moved(result, "expert", "reduce-scatter")
  # In two stages where the axis is a whole slice of TPUs: a part of it twice.
  assert sum(c["size"] * c["times"] for c in scattered) <= 1.15 * 4 * OTHERS
  # Nothing as large as an expert's matrix is summed over it.
  assert max(c["size"] for c in moved(result, "expert", "all-reduce")) < D * F * 2
  assert not result["page"].count("\n") > 45, "more than a screen"


@on_both
def test_bytes_of_rows_for_a_device_and_token_do_not_grow_with_the_expert_axis(topology):
  def sent(expert):
    result = compiled(topology, data=32 // expert, expert=expert)
    return sum(c["size"] * c["times"] for c in rows(result))

  tokens = 64 * LENGTH // 32
  assert sent(4) == sent(32) == 5 * LAYERS * tokens * K * D * 2


@on_both
def test_weights_are_gathered_over_fsdp_and_their_gradients_scattered(topology):
  result = compiled(topology, data=1, fsdp=8, expert=4)
  experts = 3 * LAYERS * E // 4 * D * F  # elements that a device computes with
  gathers = moved(result, "fsdp", "all-gather")
  gathered = sum(c["size"] * c["times"] for c in gathers)
  assert 2 * 2 * experts <= gathered <= 2.1 * 2 * (experts + OTHERS)
  scattered = sum(c["size"] * c["times"] for c in moved(result, "fsdp", "reduce-scatter"))
  assert 2 * experts <= scattered <= 1.1 * 4 * (experts + OTHERS)
  # No gradient of a matrix is summed whole, nor that of the embedding, which is the smallest.
  assert max(c["size"] for c in moved(result, "fsdp", "all-reduce")) < VOCABULARY * D * 2


@pytest.mark.parametrize("topology", [pytest.param("v5e:2x4", marks=TPU)])
def test_gradients_are_scattered_over_a_whole_slice(topology):
  """Where libtpu would sum them whole if one collective went over all devices."""
  result = compiled(topology, data=1, fsdp=8)
  assert moved(result, "fsdp", "reduce-scatter")
  assert max(c["size"] for c in moved(result, "fsdp", "all-reduce")) < VOCABULARY * D * 2


@on_both
def test_gradients_are_scattered_before_they_are_summed_over_data(topology):
  """And over `tensor` tokens are summed, not their rows."""
  result = compiled(topology, data=4, fsdp=4, tensor=2)
  part = (3 * LAYERS * E * D * F + OTHERS) // 4 // 2
  summed = sum(c["size"] * c["times"] for c in moved(result, "data", "all-reduce"))
  assert summed <= 1.1 * 4 * part
  tokens = 64 * LENGTH // 16
  largest = max(c["size"] for c in moved(result, "tensor", "all-reduce"))
  assert largest <= max(4 * tokens * D, 4 * tokens * VOCABULARY)


@on_both
def test_state_is_split_over_the_devices_and_reused(topology):
  """Parameters and both moments in float32; the routers and norms are on every device."""
  expert = compiled(topology, data=8, expert=4)["memory"]["arguments"]
  both = compiled(topology, data=1, fsdp=8, expert=4)["memory"]["arguments"]
  state = 3 * 4 * (3 * LAYERS * E * D * F + OTHERS)
  replicated = 3 * 4 * LAYERS * D * (E + 4) + 64 * LENGTH * 16 // 32
  assert state / 4 <= expert <= 1.02 * state / 4 + 2 * replicated
  assert state / 32 <= both <= 1.02 * state / 32 + 2 * replicated
  memory = compiled(topology, data=1, fsdp=8, expert=4)["memory"]
  assert memory["outputs"] - memory["aliased"] < 0.01 * memory["outputs"]


@on_both
def test_a_remat_policy_that_keeps_more_needs_more(topology):
  """Where two need the same, one of them does nothing."""
  rows = "--config.data.batch_size=1024"  # so many that activations are most of the memory

  def of(word):
    return compiled(topology, rows, f"--config.model.remat={word}", data=8, expert=4)["memory"]

  full, dots = of("full")["temporaries"], of("dots")["temporaries"]
  kept = LAYERS * 1024 * LENGTH // 32 * K * F * 2  # of what dots keeps: one product of the experts
  assert full + kept < dots
  if topology.startswith("v5e"):
    inputs = LAYERS * 1024 * LENGTH // 32 * D * 2
    assert of("offload")["temporaries"] + inputs // 4 < full


@pytest.mark.parametrize("topology", [pytest.param("v5e:4x8", marks=TPU)])
def test_options_of_memory_do_something_at_a_real_vocabulary(topology):
  """That of Qwen3: logits in chunks, first moments of two bytes, gradients added up in four."""
  V = 151_936
  rows = 1024  # more tokens than the width, so that logits are larger than the head's gradient
  words = (f"--config.model.vocab_size={V}", f"--config.data.batch_size={rows}")
  options = (
    "model.loss_chunk=256",
    "optimizer.moment_dtype=bfloat16",
    "model.gradient_sums=float32",
  )
  before = compiled(topology, *words, data=1, fsdp=8, expert=4)
  after = compiled(topology, *words, *(f"--config.{o}" for o in options), data=1, fsdp=8, expert=4)
  logits = 4 * rows * LENGTH // 32 * V
  assert after["memory"]["temporaries"] < before["memory"]["temporaries"] - logits // 2
  parameters = (3 * LAYERS * E * D * F + OTHERS + 2 * (V - VOCABULARY) * D) // 32
  saved = before["memory"]["arguments"] - after["memory"]["arguments"]
  assert saved == pytest.approx(2 * parameters, rel=0.05)
  sent = [sum(c["size"] * c["times"] for c in moved(r, "fsdp", "reduce-scatter"))
          for r in (before, after)]  # fmt: skip
  assert 1.5 * sent[0] < sent[1]


@pytest.mark.parametrize(
  ("topology", "mode"),
  [
    pytest.param("v5e:2x4", "decode", marks=TPU),
    pytest.param("h200-8", "decode", marks=GPU),
    pytest.param("h200-8", "prefill", marks=GPU),
  ],
)
def test_generation_compiles_with_experts_apart(topology, mode):
  result = compiled(topology, f"--mode={mode}", expert=4, data=2)
  tokens = 64 * LENGTH if mode == "prefill" else 64
  assert (result["tokens"], result["mode"]) == (tokens, mode)
  weights = 2 * (3 * LAYERS * E * D * F // 4 + OTHERS)  # experts apart, the rest whole
  assert weights <= result["memory"]["arguments"] + 4 * OTHERS
  assert result["seconds"]["bound"] in ("memory", "compute", "compiler's estimate", "network")


@pytest.mark.parametrize("topology", [pytest.param("v5p:2x2x1", marks=TPU)])
def test_between_slices_gradients_alone_travel(topology):
  result = compiled(topology, "--slices=2", data=2, expert=4)
  across = [c for c in result["collectives"] if "data" in c["axes"]]
  assert {c["kind"] for c in across} == {"all-reduce"}
  total = sum(c["size"] * c["times"] for c in across)
  experts = 3 * LAYERS * E * D * F // 4
  assert 2 * experts <= total <= 1.1 * 4 * (experts + OTHERS)
  done = command(topology, "--slices=2", "--config.mesh.data=1", "--config.mesh.expert=8")
  assert done.returncode == 2 and "config.mesh.data=1 does not divide over 2 slices" in done.stderr


@pytest.mark.parametrize("topology", [pytest.param("v5e:2x2", marks=TPU)])
def test_what_does_not_fit_is_refused_with_what_would(topology):
  wide = FIELDS | {"model.dim": 4096, "model.moe.expert_dim": 14336, "model.num_layers": 8}
  done = command(topology, fields=wide | {"mesh.expert": 4})
  assert done.returncode == 2 and done.stdout == "", done
  assert "does not fit: it needs" in done.stderr and "by shapes alone v5e-" in done.stderr
  assert "--config.mesh." in done.stderr.splitlines()[-1]
