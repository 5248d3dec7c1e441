"""The scoreboard of compiled steps: equal terms on both sides, and what is read from a program."""

import importlib.util
import os
import subprocess
import sys

import pytest

from benchmarks import compiled
from moe_jax.errors import UserError

CASES = [
  (pair, case, path)
  for pair in compiled.MODELS.values()
  for case in pair.cases.values()
  for path in pair.paths
]


def fields(words):
  return dict(word.removeprefix("--config.").split("=", 1) for word in words)


@pytest.mark.parametrize("pair, case, path", CASES)
def test_both_sides_have_equal_terms(pair, case, path):
  ours = fields(compiled.our_words(pair, case, path))
  theirs = fields(compiled.peer_words(pair, case, path))
  devices = case.on.devices
  assert int(ours["data.batch_size"]) == devices * int(theirs["per_device_batch_size"])
  assert ours["data.seq_len"] == theirs["max_target_length"]
  assert ours["mesh.fsdp"] == theirs["ici_fsdp_parallelism"]
  assert ours["mesh.expert"] == theirs["ici_expert_parallelism"]
  assert int(ours["mesh.fsdp"]) * int(ours["mesh.expert"]) == devices
  assert ours["model.remat"] == theirs["remat_policy"]
  assert ours.get("model.num_layers") == theirs.get("base_num_decoder_layers")
  if path != "sorted":
    assert ours["model.moe.capacity_factor"] == theirs["capacity_factor"] == "1.25"
  else:
    assert ours["model.moe.dispatch"] == "grouped" and theirs["capacity_factor"] == "-1"


@pytest.mark.parametrize("flag", ["models", "chips", "paths"])
def test_a_word_that_is_not_known_is_refused(flag, tmp_path):
  asked = {"models": ["mixtral_8x7b"], "chips": ["v5p"], "paths": ["slots"]} | {flag: ["v7x"]}
  with pytest.raises(UserError, match=f"--{flag}=v7x: v7x is not one of"):
    compiled.run(**asked, peer_python=sys.executable, folder=tmp_path)


def test_a_program_that_does_not_fit_is_a_row_and_another_failure_is_not(tmp_path):
  """Both are said by the command itself; only the first is kept."""
  full = "import sys; sys.exit('RESOURCE_EXHAUSTED: Ran out of memory. Used 101.2G of 95.7G hbm.')"
  assert compiled.compiled([sys.executable, "-c", full], "", tmp_path) == {
    "error": "needs 101.2G of 95.7G"
  }
  wrong = [sys.executable, "-c", "import sys; sys.exit('no such model')"]
  for _ in range(2):
    with pytest.raises(UserError, match="no such model"):
      compiled.compiled(wrong, "", tmp_path)


# What libtpu writes, cut down: 3 trips of a loop, on a mesh of fsdp 2 x expert 4.
PROGRAM = """HloModule jit_step

%matmul (a: bf16[8,8], b: bf16[8,8]) -> bf16[8,8] {
  %a = bf16[8,8]{1,0} parameter(0)
  %b = bf16[8,8]{1,0} parameter(1)
  ROOT %c = bf16[8,8]{1,0} convolution(%a, %b), dim_labels=bf_io->bf
}

%outer (a.1: bf16[8,8], b.1: bf16[8,8]) -> bf16[8,8] {
  %a.1 = bf16[8,8]{1,0} parameter(0)
  %b.1 = bf16[8,8]{1,0} parameter(1)
  ROOT %inner = bf16[8,8]{1,0} fusion(%a.1, %b.1), kind=kOutput, calls=%matmul
}

%add (a.2: bf16[8,8]) -> bf16[8,8] {
  %a.2 = bf16[8,8]{1,0} parameter(0)
  ROOT %d = bf16[8,8]{1,0} add(%a.2, %a.2)
}

%all-reduce-scatter.1 (a.3: bf16[8,1024]) -> bf16[2,1024] {
  %a.3 = bf16[8,1024]{1,0} parameter(0)
  ROOT %r = bf16[8,1024]{1,0} all-reduce(%a.3), replica_groups={{0,1,2,3},{4,5,6,7}}
}

%body (p: (s32[])) -> (s32[]) {
  %x = bf16[8,8]{1,0} parameter(0)
  %w = bf16[2,256,384]{2,1,0} copy(%x)
  %f = bf16[8,8]{1,0} fusion(%x, %x), calls=%outer, backend_config={"estimated_cycles":"100"}
  %g = bf16[8,8]{1,0} fusion(%f), calls=%add, backend_config={"estimated_cycles":"7"}
  %h = bf16[8,8]{1,0} fusion(%f), calls=%add, \
backend_config={"estimated_cycles":"9223372036854775807"}
  %gmm.1 = bf16[64,384]{1,0} custom-call(%x, %w), custom_call_target="tpu_custom_call"
  %tgmm.2 = bf16[2,256,384]{2,1,0} custom-call(%x, %x), custom_call_target="tpu_custom_call"
  %splash.3 = bf16[2,9,9]{1,0} custom-call(%x, %x), custom_call_target="tpu_custom_call"
  %s = bf16[2,1024]{1,0} fusion(%g), calls=%all-reduce-scatter.1
  %t = bf16[512]{0} all-gather(%s), replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}
}

%condition (p.1: (s32[])) -> pred[] {
  %n = s32[] constant(3)
}

ENTRY %main (q: bf16[8]) -> bf16[8] {
  %loop = (s32[]) while(%q), condition=%condition, body=%body
  %u = bf16[4096]{0} all-reduce(%q), replica_groups=mesh['axis_0'=8] {'axis_0'}
}
"""


def test_what_a_program_says():
  compiled_step = {
    "hlo": PROGRAM,
    "mesh": {"data": 1, "fsdp": 2, "expert": 4, "tensor": 1},
    "memory": {"arguments": 5, "temporaries": 6},
    "compile_seconds": 1.0,
  }
  found = compiled.measures(compiled_step, rows=64, experts=2, width=512)
  assert found["cycles"] == 3 * 107 and found["matmul_cycles"] == 3 * 100
  assert found["grouped_flops"] == 3 * 2 * (2 * 64 * 256 * 384)
  # A device receives what it lacks, and a sum twice: what it scatters, then what it gathers.
  assert found["wire"] == {
    "expert": 3 * 2 * 8 * 1024 * 3 / 4,
    "fsdp": 3 * 2 * 512 / 2,
    "fsdp+expert": 2 * 2 * 4096 * 7 / 8,
  }


L, D, F, E, K, B, X = 256, 256, 384, 8, 2, 8, 4
TOY = {
  "model.num_layers": 2,
  "model.dim": D,
  "model.num_heads": 2,
  "model.num_kv_heads": 2,
  "model.head_dim": 128,
  "model.vocab_size": 512,
  "model.compute_dtype": "bfloat16",
  "model.remat": "full",
  "model.attention": "splash",
  "model.moe.num_experts": E,
  "model.moe.top_k": K,
  "model.moe.expert_dim": F,
  "optimizer.name": "adamw",
  "data.seq_len": L,
  "data.batch_size": B,
  "mesh.expert": X,
}


def toy(path, folder):
  """Our toy's compiled step on four chips."""
  words = [f"--config.{name}={value}" for name, value in (TOY | compiled._OUR_PATHS[path]).items()]
  command = [
    sys.executable,
    "-m",
    "moe_jax.compile",
    "--platform_flags=off",
    "--config=configs/tiny_moe.py",
  ]
  return compiled.compiled([*command, "--topology=v5p:2x2x1", *words], "toy", folder)


@pytest.mark.benchmark
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs moe_jax[tpu]")
def test_a_step_of_ours_is_compiled_once_and_read(tmp_path):
  """Each number that shapes say is that number; the rest is between its bounds."""
  rows = B // X * L * K  # of a device, in a layer
  slots = toy("slots", tmp_path)
  found = compiled.measures(slots, rows, E // X, 2 * D)
  assert 0 < found["matmul_cycles"] < found["cycles"]
  assert not found["grouped_flops"]
  # To the experts and back, there again, and both ways backward, in bfloat16.
  sent = 2 * 5 * (1.25 * rows * D * 2) * (X - 1) / X
  assert sent < found["wire"]["expert"] < 2 * sent
  assert found["wire"].keys() == {"expert"}

  log = next(tmp_path.glob("*/log.txt"))
  log.write_text("kept")
  assert toy("slots", tmp_path) == slots and log.read_text() == "kept"

  in_order = compiled.measures(toy("sorted", tmp_path), rows, E // X, 2 * D)
  # Three matrices: forward, the same again, and two products backward of each.
  assert in_order["grouped_flops"] == 2 * 3 * 4 * 2 * rows * D * F
  assert in_order["matmul_cycles"] < found["matmul_cycles"]


@pytest.mark.benchmark
@pytest.mark.parametrize("path", ["slots", "sorted"])
def test_the_peer_compiles(path, tmp_path):
  """In the environment that a variable names; two layers of a toy."""
  python = os.environ.get("MAXTEXT_PYTHON", "")
  if not python:
    pytest.skip(f"MAXTEXT_PYTHON names no Python: {compiled.PEER}")
  words = ["model_name=default", "decoder_block=mixtral", "base_num_decoder_layers=2"]
  words += [f"base_emb_dim={D}", f"base_moe_mlp_dim={F}", f"base_mlp_dim={F}", "head_dim=128"]
  words += ["base_num_query_heads=2", "base_num_kv_heads=2", "vocab_size=512"]
  words += [f"num_experts={E}", f"num_experts_per_tok={K}", f"max_target_length={L}"]
  words += ["compile_topology=v5p-8", "compile_topology_num_slices=1", "per_device_batch_size=2"]
  words += [f"ici_expert_parallelism={X}", "attention=flash", "remat_policy=full"]
  words += [f"{name}={value}" for name, value in compiled._PEER_PATHS[path].items()]
  worker = str(compiled.results.ROOT / "benchmarks/peer_compile.py")
  result = compiled.compiled([python, worker, "FILES", *words], "toy", tmp_path)
  found = compiled.measures(result, B // X * L * K, E // X, 2 * D)
  assert 0 < found["matmul_cycles"] < found["cycles"]
  assert found["wire"]["expert"] > 0
  # As ours: three matrices, and of each four products.
  ideal = 2 * 3 * 4 * 2 * (B // X * L * K) * D * F
  assert found["grouped_flops"] == (ideal if path == "sorted" else 0)


def test_a_python_without_the_peer_is_seen():
  assert not compiled._has_maxtext("no-such-python")
  without = subprocess.run([sys.executable, "-c", "import maxtext"], capture_output=True).returncode
  assert compiled._has_maxtext(sys.executable) == (without == 0)


def test_the_faster_path_of_each_side_is_compared():
  def row(side, path, cycles):
    figures = dict(all_cycles=cycles, matmul_cycles=8, grouped_cycles=0, wire={"fsdp": 4})
    memory = dict(arguments=1, temporaries=cycles)
    return dict(model="m", chip="v5p", side=side, path=path) | figures | memory

  rows = [row("ours", "slots", 9), row("MaxText", "sorted", 12), row("MaxText", "slots", 18)]
  rows.append({"model": "m", "chip": "v5p", "side": "ours", "path": "sorted", "error": "refused"})
  found = {target["what"]: target["measured"] for target in compiled._targets(rows)}
  assert found["m v5p, ours slots / MaxText sorted: cycles"] == 9 / 12
  assert found["m v5p, ours slots / MaxText sorted: memory"] == 10 / 13
  assert found["m v5p, slots, all cycles / those of matmuls"] == 9 / 8
