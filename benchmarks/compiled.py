"""Our training step beside MaxText's, as one TPU compiler sees them; no TPU is needed.

Both are compiled for a slice that need not be present, with equal model, mesh, batch, capacity and
rematerialization, and their programs are read by the same reader (moe_jax/compile/program.py). The
compiler writes into a program what cycles it expects of each operation. They leave out collectives
and custom calls: flash attention, which both take from Pallas, and the kernels of sorted rows,
whose FLOPs are counted from the shapes of their weights and a balanced load, and become cycles at
the chip's peak. So a figure is an estimate, for ratios, and nothing here was run.
"""

import dataclasses
import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks import results
from moe_jax.compile import program, roofline
from moe_jax.errors import UserError
from moe_jax.kernels import chips as chips_lib
from moe_jax.start import command_line

GIB = 2**30
LENGTH = 4096
TIMEOUT_S = 3600
PEER = "pip install 'maxtext[tpu]==0.2.5' libtpu==0.0.50.1, in Python 3.12"


@dataclasses.dataclass(frozen=True)
class Slice:
  """Devices to compile for: what we and the peer call them, and their number."""

  chip: str  # of chips.CHIPS
  topology: str
  peer: str
  devices: int


@dataclasses.dataclass(frozen=True)
class Case:
  """A model on a slice. Its mesh is fsdp x expert over all of the slice."""

  on: Slice
  expert: int
  rows: int  # of LENGTH tokens, on each device
  layers: int = 0  # fewer than published, on both sides; 0 is all


@dataclasses.dataclass(frozen=True)
class Pair:
  """A model by our config and by the peer's name, with what makes the two equal."""

  config: str
  peer: str
  ours: dict[str, str]
  theirs: dict[str, str]
  cases: dict[str, Case]  # by chip
  paths: tuple[str, ...] = ("slots", "exchanged", "sorted")


_V5P = Slice("v5p", "v5p:4x4x4", "v5p-128", 64)
_V5P_256 = Slice("v5p", "v5p:4x8x8", "v5p-512", 256)
_V6E = Slice("v6e", "v6e:8x8", "v6e-64", 64)
_V6E_256 = Slice("v6e", "v6e:16x16", "v6e-256", 256)

MODELS = {
  "mixtral_8x7b": Pair(
    "configs/mixtral_8x7b.py",
    "mixtral-8x7b",
    {},
    {"load_balance_loss_weight": "0.01"},
    {"v5p": Case(_V5P, 8, 4), "v6e": Case(_V6E, 8, 1)},
  ),
  "qwen3_30b_a3b": Pair(
    "configs/published.py:qwen3_30b_a3b",
    "qwen3-30b-a3b",
    {},
    {"load_balance_loss_weight": "0.001"},
    {"v5p": Case(_V5P, 8, 1), "v6e": Case(_V6E, 8, 1)},
  ),
  "gpt_oss_20b": Pair(
    "configs/published.py:gpt_oss_20b",
    "gpt-oss-20b",
    # Buffers for half as many rows again as are balanced; what overflows is computed exactly.
    {"model.moe.exchange_factor": "1.5", "model.moe.exchange_fallback": "exact"},
    {"load_balance_loss_weight": "0.001"},
    {"v5p": Case(_V5P, 8, 1), "v6e": Case(_V6E, 8, 1)},
    paths=("sorted",),  # MaxText refuses a capacity for this model
  ),
  "deepseek_v3": Pair(
    "configs/published.py:deepseek_v3",
    "deepseek3-671b",
    {},
    {"n_routing_groups": "8", "topk_routing_group": "4", "routed_bias_update_rate": "0.001"},
    {"v5p": Case(_V5P_256, 8, 1), "v6e": Case(_V6E_256, 8, 1, layers=16)},
  ),
}
CHIPS = ("v5p", "v6e")

# Equal in both: rows with a capacity of 1.25 in slots, or sorted rows of which none is dropped. By
# default MaxText gathers the experts' weights over `expert` where rows are in slots, as fsdp would;
# "exchanged" is its option to exchange rows instead, which ours always does.
_OUR_PATHS = {
  "slots": {"model.moe.dispatch": "gather", "model.moe.capacity_factor": "1.25"},
  "exchanged": {"model.moe.dispatch": "gather", "model.moe.capacity_factor": "1.25"},
  "sorted": {
    "model.moe.dispatch": "grouped",
    "model.moe.grouped_matmul": "ragged_dot",
    "model.moe.exchange": "ragged",
  },
}
_PEER_PATHS = {
  "slots": {"sparse_matmul": "False", "megablox": "False", "capacity_factor": "1.25"},
  "exchanged": {
    "sparse_matmul": "False",
    "megablox": "False",
    "capacity_factor": "1.25",
    "moe_dispatch_no_expert_sharding": "true",
  },
  "sorted": {"sparse_matmul": "True", "megablox": "True", "capacity_factor": "-1"},
}


def our_words(pair: Pair, case: Case, path: str) -> list[str]:
  """Returns the arguments of our compile command."""
  fields = {
    "data.seq_len": LENGTH,
    "data.batch_size": case.rows * case.on.devices,
    "mesh.data": 1,
    "mesh.fsdp": case.on.devices // case.expert,
    "mesh.expert": case.expert,
    "model.attention": "splash",
    "model.remat": "full",
    **_OUR_PATHS[path],
    **pair.ours,
  }
  if case.layers:
    fields["model.num_layers"] = case.layers
  words = [f"--config.{name}={value}" for name, value in fields.items()]
  # As the peer compiles: without flags of the platform.
  here = ["--platform_flags=off", f"--config={pair.config}", f"--topology={case.on.topology}"]
  return [*here, *words]


def peer_words(pair: Pair, case: Case, path: str) -> list[str]:
  """Returns the arguments of MaxText's train_compile."""
  fields = {
    "model_name": pair.peer,
    "compile_topology": case.on.peer,
    "compile_topology_num_slices": 1,
    "ici_fsdp_parallelism": case.on.devices // case.expert,
    "ici_expert_parallelism": case.expert,
    "allow_split_physical_axes": "true",
    "remat_policy": "full",
    "attention": "flash",
    "per_device_batch_size": case.rows,
    "max_target_length": LENGTH,
    **_PEER_PATHS[path],
    **pair.theirs,
  }
  if case.layers:
    fields |= {"base_num_decoder_layers": case.layers, "override_model_config": "true"}
  return [f"{name}={value}" for name, value in fields.items()]


def compiled(command: list[str], key: str, folder: pathlib.Path) -> dict[str, Any]:
  """Returns what a compile command writes, and its program's text as "hlo".

  The command gets the words --json=FILE and --hlo=FILE, or for the peer the two files, in the place
  of FILES. What it writes is kept in a folder named after the command and `key`, and a second call
  reads it there. A program that does not fit the device's memory is {"error": what the compiler
  said}.

  Raises:
    UserError: the command ends otherwise than with a program or too little memory.
  """
  name = hashlib.sha256(json.dumps([command, key]).encode()).hexdigest()[:16]
  kept = folder.resolve() / name  # the command runs in another folder
  if not (kept / "compiled.json").exists():
    kept.mkdir(parents=True, exist_ok=True)
    (kept / "command.txt").write_text(" ".join(command) + "\n")
    files = [str(kept / "fresh.json"), str(kept / "hlo.txt")]
    if "FILES" in command:
      at = command.index("FILES")
      words = [*command[:at], *files, *command[at + 1 :]]
    else:
      words = [*command, f"--json={files[0]}", f"--hlo={files[1]}"]
    with open(kept / "log.txt", "w") as log:
      ended = subprocess.run(words, cwd=results.ROOT, stdout=log, stderr=log, timeout=TIMEOUT_S)
    said = (kept / "log.txt").read_text()
    if ended.returncode:
      full = re.search(
        r"[^\n]*(?:RESOURCE_EXHAUSTED|CompileTimeHbmOom|Ran out of memory|does not fit)[^\n]*",
        said,
      )
      if not full:
        last = said.strip().splitlines()[-1:] or ["it says nothing"]
        raise UserError(f"{' '.join(command[:4])} ...: {last[0][:300]} (all of it: {kept}/log.txt)")
      used = re.search(r"(?:Used|it needs) ([\d.]+ ?\w+) of ([\d.]+ ?\w+)", said)
      what = f"needs {used[1]} of {used[2]}" if used else full[0].strip()[:120]
      (kept / "fresh.json").write_text(json.dumps({"error": what}))
    else:
      with gzip.open(kept / "hlo.txt.gz", "wt") as packed:
        packed.write((kept / "hlo.txt").read_text())
      (kept / "hlo.txt").unlink()
    (kept / "fresh.json").rename(kept / "compiled.json")
  result = json.loads((kept / "compiled.json").read_text())
  if "error" not in result:
    with gzip.open(kept / "hlo.txt.gz", "rt") as packed:
      result["hlo"] = packed.read()
  return result


# Folders of the package that are in no training step.
_ELSEWHERE = ("analysis", "compile", "hf", "inference", "report", "storage", "sweep")


def source_key() -> str:
  """Returns a digest of what our programs are made of: package, configs and libraries."""
  digest = hashlib.sha256()
  paths = [*(results.ROOT / "moe_jax").rglob("*.py"), *(results.ROOT / "configs").glob("*.py")]
  for path in sorted(paths):
    if path.parent.name not in _ELSEWHERE:
      digest.update(path.read_bytes())
  for library in ("jax", "libtpu", "flax", "optax"):
    digest.update(importlib.metadata.version(library).encode())
  return digest.hexdigest()


def measures(result: dict[str, Any], rows: float, experts: int, width: int) -> dict[str, Any]:
  """Returns the figures of a compiled step.

  Args:
    result: of `compiled`.
    rows: of a device that its experts compute in a layer, of a balanced load.
    experts: on each device.
    width: bytes of a row.
  """
  mesh, hlo = result["mesh"], result["hlo"]
  read = program.read_program(hlo, mesh)
  wire: dict[str, float] = {}
  for each in read.collectives:
    axes = [axis for axis in mesh if axis in each.axes and mesh[axis] > 1]
    group = math.prod(mesh[axis] for axis in axes)
    if group == 1:
      continue
    if each.kind == "ragged-all-to-all":  # of whose buffers the routed rows alone travel
      each = each._replace(size=min(each.size, rows * width))
    name = "+".join(axes)
    wire[name] = wire.get(name, 0.0) + roofline.wire_bytes(each, group)
  return {
    "cycles": sum(read.cycles.values()),
    "cycles_by_phase": read.cycles,
    "matmul_cycles": matmul_cycles(hlo),
    "grouped_flops": grouped_flops(hlo, rows, experts),
    "custom_calls": read.custom_calls,
    "arguments": result["memory"]["arguments"],
    "temporaries": result["memory"]["temporaries"],
    "wire": wire,
    "all_to_alls": sum(
      c.times for c in read.collectives if c.kind.endswith("all-to-all") and c.size > 2**20
    ),
    "flops": result.get("flops", {}).get("model"),
    "compile_s": result["compile_seconds"],
    "compile_cpu_s": result.get("cpu_seconds"),
    "versions": result.get("versions", {}),
  }


def matmul_cycles(hlo: str) -> int:
  """Returns the estimated cycles of the operations that hold a matmul.

  A TPU's program has matmuls as convolutions, most of them in a fusion together with elementwise
  operations, whose cycles are in the number too.
  """
  computations, calls = program.runs(hlo)
  holds: dict[str, bool] = {}

  def holds_matmul(name: str) -> bool:
    if name not in holds:
      holds[name] = any(
        line.op in ("convolution", "dot")
        or any(holds_matmul(called) for called in re.findall(r"calls=(%[^,\s]+)", line.rest))
        for line in computations.get(name, ())
      )
    return holds[name]

  total = 0
  for computation, times in calls.items():
    for line in computations[computation]:
      estimate = re.search(r'"estimated_cycles":"(\d+)"', line.rest)
      called = re.findall(r"calls=(%[^,\s]+)", line.rest)
      is_matmul = line.op in ("convolution", "dot") or any(map(holds_matmul, called))
      if is_matmul and estimate and int(estimate[1]) < program.UNKNOWN:
        total += times * int(estimate[1])
  return total


def grouped_flops(hlo: str, rows: float, experts: int) -> float:
  """Returns the FLOPs of a device in the kernels of sorted rows, which have no estimate.

  Each multiplies `rows` rows by the matrices [experts, k, n], or makes such matrices of them.
  """
  computations, calls = program.runs(hlo)
  total = 0.0
  for computation, times in calls.items():
    types = {line.name: line.types for line in computations[computation]}
    for line in computations[computation]:
      if line.op == "custom-call" and re.match(r"%(ragged-dot-none|t?gmm)", line.name):
        operands = re.findall(r"%[\w.\-]+", line.rest.partition("), custom_call_target")[0])
        arrays = [line.types, *(types.get(name, "") for name in operands)]
        shapes = [
          [int(n) for n in shape.split(",")]
          for array in arrays
          for shape in re.findall(r"^\w+\[(\d+,\d+,\d+)\]", array)
        ]
        found = [shape for shape in shapes if shape[0] == experts]
        assert found, (line.name, shapes)
        total += times * 2 * rows * found[0][1] * found[0][2]
  return total


def run(
  models: Sequence[str],
  chips: Sequence[str],
  paths: Sequence[str],
  peer_python: str,
  folder: pathlib.Path,
) -> dict[str, Any]:
  """Compiles what is asked for, and returns a row for each model, chip, path and side.

  Args:
    models: of MODELS.
    chips: of CHIPS.
    paths: of "slots", "exchanged" and "sorted".
    peer_python: the interpreter of an environment with MaxText.
    folder: keeps what was compiled.

  Raises:
    UserError: a word is none of these, or libtpu is missing here.
  """
  for flag, words, known in (
    ("models", models, tuple(MODELS)),
    ("chips", chips, CHIPS),
    ("paths", paths, tuple(_OUR_PATHS)),
  ):
    if wrong := [word for word in words if word not in known]:
      raise UserError(f"--{flag}={','.join(words)}: {wrong[0]} is not one of {', '.join(known)}")
  if importlib.util.find_spec("libtpu") is None:
    raise UserError("libtpu is missing: pip install 'moe_jax[tpu]'")
  sides = ["ours"]
  if _has_maxtext(peer_python):
    sides.append("MaxText")
  else:
    results.progress(f"--peer_python={peer_python} has no MaxText, which is left out: {PEER}")
  rows = []
  key = source_key()
  for chip in chips:
    for path in paths:
      for model in models:
        if path not in MODELS[model].paths:
          results.progress(f"{model}, {path}: left out, MaxText does not have it")
          continue
        for side in sides:
          rows.append(_row(model, chip, path, side, peer_python, folder, key))
  return {"rows": rows, "targets": list(_targets(rows))}


def _has_maxtext(python: str) -> bool:
  code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('maxtext') is None)"
  try:
    return subprocess.run([python, "-c", code], capture_output=True).returncode == 0
  except OSError:
    return False


def _row(
  model: str, chip: str, path: str, side: str, peer_python: str, folder: pathlib.Path, key: str
) -> dict[str, Any]:
  """Returns the row of one side; one that cannot be compiled says so under "error"."""
  pair = MODELS[model]
  case = pair.cases[chip]
  config = command_line.load_file(str(pair.config))
  moe = config.model.moe
  row: dict[str, Any] = {
    "model": model,
    "chip": chip,
    "path": path,
    "side": side,
    "devices": case.on.devices,
    "fsdp": case.on.devices // case.expert,
    "expert": case.expert,
    "batch": case.rows * case.on.devices,
    "length": LENGTH,
    "layers": case.layers or config.model.num_layers,
  }
  if side == "ours":
    words = [sys.executable, "-m", "moe_jax.compile", *our_words(pair, case, path)]
  else:
    worker = "benchmarks/peer_compile.py"  # from any clone, so that what is kept is found
    words, key = [peer_python, worker, "FILES", *peer_words(pair, case, path)], PEER
  name = f"{model}, {chip}, {path}, {side}"
  try:
    result = compiled(words, key, folder)
  except (UserError, subprocess.TimeoutExpired) as error:
    results.progress(f"{name}: {error}")
    return row | {"error": str(error)}
  if "error" in result:
    results.progress(f"{name}: {result['error']}")
    return row | {"error": result["error"]}
  balanced = case.rows * LENGTH * moe.top_k
  found = measures(result, balanced, moe.num_experts // case.expert, 2 * config.model.dim)
  if path == "sorted" and not found["grouped_flops"]:
    return row | {"error": "no kernel of sorted rows is known in its program"}
  peak = chips_lib.CHIPS[chip]
  found["grouped_cycles"] = found["grouped_flops"] / (peak.flops / peak.clock)
  found["all_cycles"] = found["cycles"] + found["grouped_cycles"]
  results.progress(f"{name}: {found['all_cycles'] / 1e9:.2f}e9 cycles ({found['compile_s']:.0f} s)")
  return row | found


def _pairs(rows: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
  """Yields our fastest path's row and the peer's, of each model and chip that both compiled."""
  by_case: dict[tuple[str, ...], dict[str, Any]] = {}
  for row in sorted((row for row in rows if "error" not in row), key=lambda row: row["all_cycles"]):
    by_case.setdefault((row["model"], row["chip"]), {}).setdefault(row["side"], row)
  for sides in by_case.values():
    if len(sides) == 2:
      yield sides["ours"], sides["MaxText"]


def _memory(row: dict[str, Any]) -> float:
  return row["arguments"] + row["temporaries"]


def _targets(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
  for ours, theirs in _pairs(rows):
    name = f"{ours['model']} {ours['chip']}, ours {ours['path']} / MaxText {theirs['path']}:"
    yield results.target(f"{name} cycles", ours["all_cycles"] / theirs["all_cycles"], 0.85)
    yield results.target(f"{name} memory", _memory(ours) / _memory(theirs), 1.0)
    wires = [sum(row["wire"].values()) for row in (ours, theirs)]
    yield results.target(f"{name} bytes on the wire", wires[0] / wires[1], 1.0)
    matmuls = ours["matmul_cycles"] + ours["grouped_cycles"]
    name = f"{ours['model']} {ours['chip']}, {ours['path']}, all cycles / those of matmuls"
    yield results.target(name, ours["all_cycles"] / matmuls, 1.15)


def text(result: dict[str, Any]) -> str:
  """Returns the tables."""
  flops = {(row["model"], row["chip"]): row["flops"] for row in result["rows"] if row.get("flops")}
  header = [
    "model, chip, path",
    "side",
    "layers",
    "batch",
    "Gcycles",
    "of matmuls",
    "of kernels",
    "MFU at most",
    "arguments",
    "temporaries",
    "wire fsdp",
    "expert",
    "other",
    "compiled in",
  ]
  lines = []
  for row in result["rows"]:
    first = [
      f"{row['model']} {row['chip']}-{row['devices']} {row['path']}",
      row["side"],
      str(row["layers"]),
      f"{row['batch']}",
    ]
    if "error" in row:
      lines.append([*first, row["error"][:60], *[""] * (len(header) - len(first) - 1)])
      continue
    chip = chips_lib.CHIPS[row["chip"]]
    seconds = row["all_cycles"] / chip.clock
    work = flops.get((row["model"], row["chip"]))
    mfu = f"{100 * work / chip.flops / seconds:.1f}%" if work else ""
    wire = dict(row["wire"])
    fsdp, expert = wire.pop("fsdp", 0.0), wire.pop("expert", 0.0)
    lines.append(
      [
        *first,
        f"{row['all_cycles'] / 1e9:.2f}",
        f"{(row['matmul_cycles'] + row['grouped_cycles']) / 1e9:.2f}",
        f"{row['grouped_cycles'] / 1e9:.2f}",
        mfu,
        *(f"{row[kind] / GIB:.2f}" for kind in ("arguments", "temporaries")),
        *(f"{size / GIB:.2f}" for size in (fsdp, expert, sum(wire.values()))),
        f"{row['compile_s']:.0f} s",
      ]
    )
  table = results.table(header, lines)
  return "\n\n".join([table, results.target_table(result["targets"])])
