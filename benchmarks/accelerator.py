"""One accelerator in under ten minutes: whether every kernel is right there, then how fast it is.

What is wrong is named and not timed. A part begins only while there is time left for it. On a CPU
all sizes are toys: that shows that the script runs, and says nothing about speed.
"""

import dataclasses
import functools
import itertools
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import inference, results, timing
from benchmarks.results import progress
from moe_jax import sharding
from moe_jax.compile import programs, report
from moe_jax.compile import targets as compile_targets
from moe_jax.config import (
  Attention,
  Config,
  Data,
  Dispatch,
  Dtype,
  GroupedMatmul,
  Loss,
  Mesh,
  Model,
  MoE,
  Optimizer,
  Remat,
)
from moe_jax.kernels import chips, choose, platform
from moe_jax.kernels.attention import ATTENTION_KERNELS
from moe_jax.kernels.experts import EXPERT_KERNELS, Experts, experts
from moe_jax.kernels.mask import CAUSAL
from moe_jax.model import cost
from moe_jax.moe import validation

_GROUPED, _SLOTS = 0.60, 0.80  # FLOP/s / those of one dense matmul
_DECODE_SECONDS = 200  # that decoding is expected to take on an accelerator


class Shape(NamedTuple):
  """The experts of one layer, and how many rows they share."""

  name: str
  num_experts: int
  dim: int
  expert_dim: int
  rows: int


class Training(NamedTuple):
  """A model to train, and the MFU to reach with each dispatcher."""

  name: str
  model: Model
  batch_size: int
  seq_len: int
  aims: dict[Dispatch, float]


class Sizes(NamedTuple):
  """What is measured."""

  dtype: Dtype
  square: int  # side of the matrices that give the rate of a dense matmul
  shapes: tuple[Shape, ...]
  training: tuple[Training, ...]
  decoded: Model
  batches: tuple[int, ...]


def _model(
  layers: int, dim: int, heads: int, kv_heads: int, vocab_size: int, dtype: Dtype, **moe: Any
) -> Model:
  return Model(
    vocab_size=vocab_size,
    num_layers=layers,
    dim=dim,
    num_heads=heads,
    num_kv_heads=kv_heads,
    head_dim=dim // heads,
    ffn_dim=4 * dim,
    tied_head=False,
    compute_dtype=dtype,
    remat=Remat.DOTS,
    moe=MoE(**moe),
  )


def full() -> Sizes:
  """Returns the sizes for an accelerator of 80 GB."""
  mixtral = dict(num_experts=8, top_k=2, expert_dim=7168)
  qwen = dict(num_experts=128, top_k=8, expert_dim=768)
  small = _model(4, 2048, 16, 8, 32000, Dtype.BFLOAT16, **mixtral)
  fine = _model(4, 2048, 32, 4, 32000, Dtype.BFLOAT16, **qwen)
  return Sizes(
    Dtype.BFLOAT16,
    8192,
    (
      Shape("Mixtral 8x7B", 8, 4096, 14336, 16384),
      Shape("64 experts", 64, 2048, 1024, 65536),
      Shape("Qwen3-30B, 128 experts", 128, 2048, 768, 65536),
    ),
    (
      Training("Mixtral-shaped", small, 8, 2048, {Dispatch.GATHER: 0.50, Dispatch.GROUPED: 0.35}),
      Training("Qwen3-30B-shaped", fine, 8, 2048, {Dispatch.GROUPED: 0.25}),
    ),
    dataclasses.replace(small, num_layers=8),
    (1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
  )


def toy() -> Sizes:
  """Returns sizes with which the script runs in a minute on a CPU."""
  moe = dict(num_experts=4, top_k=2, expert_dim=32)
  model = _model(2, 32, 4, 2, 64, Dtype.FLOAT32, **moe)
  aims = {Dispatch.GATHER: 0.50, Dispatch.GROUPED: 0.35}
  return Sizes(
    Dtype.FLOAT32,
    128,
    (Shape("toy", 4, 32, 48, 64),),
    (Training("toy", model, 2, 64, aims),),
    model,
    (1, 4),
  )


def run(out: pathlib.Path, rounds: int, minutes: float) -> dict[str, Any]:
  """Checks, then measures.

  Args:
    out: folder of the trace of a training step.
    rounds: timed rounds, of which the median counts.
    minutes: no part begins after so many, and decoding not in the last three.

  Returns:
    {"correctness", "machine", "experts", "training", "decoding", "targets"}.
  """
  end = time.monotonic() + 60 * minutes
  sizes = toy() if platform.name() == "cpu" else full()
  result: dict[str, Any] = {"toy": platform.name() == "cpu"}
  with jax.set_mesh(sharding.make_mesh(Mesh(data=1))):
    result["correctness"] = correctness(sizes.dtype)
    wrong = {row["kernel"] for row in result["correctness"] if row["error"]}
    result["machine"] = machine(sizes, rounds)
    result["experts"] = [
      row
      for shape in sizes.shapes
      if time.monotonic() < end
      for row in expert_rates(shape, sizes.dtype, rounds, result["machine"]["matmul_flops"], wrong)
    ]
  result["training"] = [
    training_row(case, dispatch, rounds, result["machine"]["peak_flops"], out / "profile")
    for case in sizes.training
    for dispatch in case.aims
    if time.monotonic() < end
  ]
  result["decoding"] = None
  if time.monotonic() < end - (0 if result["toy"] else _DECODE_SECONDS):
    config = Config(model=sizes.decoded)
    result["decoding"] = inference.run(config, rounds, list(sizes.batches))
  result["targets"] = targets(result, sizes)
  return result


def correctness(dtype: Dtype) -> list[dict[str, Any]]:
  """Compares every kernel that runs here with the reference, gradients included.

  Returns:
    A row for each kernel and case: its difference as a share of the largest element, or `error`.
  """
  rows = []
  number = jnp.dtype(dtype.value)
  for kernel, loads in itertools.product(EXPERT_KERNELS, ("even", "uneven", "empty")):
    record = EXPERT_KERNELS[kernel]
    if platform.name() not in record.platforms or kernel is choose.REFERENCE:
      continue
    compare = functools.partial(_experts_difference, kernel, loads, number)
    rows.append(_compared(f"experts {kernel.value}", f"{loads} loads", record.available, compare))
  for kernel, attention in ATTENTION_KERNELS.items():
    if platform.name() not in attention.platforms or kernel is Attention.REFERENCE:
      continue
    shapes = (2, 512, 8, 64), (2, 512, 4, 64)
    refused = functools.partial(attention.refuses, *shapes, number, CAUSAL)
    compare = functools.partial(choose.attention_difference, kernel, *shapes, number, CAUSAL)
    rows.append(_compared(f"attention {kernel.value}", "3 documents", refused, compare))
  for row in rows:
    limit = choose.TOLERANCE[dtype.value]
    if not row["error"] and not row["difference"] <= limit:
      row["error"] = f"differs by {row['difference']:.1e}, more than {limit:.0e}"
    progress(f"{row['kernel']}, {row['case']}: {row['error'] or 'agrees'}")
  return rows


def _compared(
  kernel: str, case: str, missing: Callable[[], str], compare: Callable[[], float]
) -> dict[str, Any]:
  row = {"kernel": kernel, "case": case, "difference": 0.0, "error": missing()}
  if not row["error"]:
    try:
      row["difference"] = compare()
    except Exception as error:  # a library that does not know this device or these sizes
      row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
  return row


def _experts_difference(kernel: GroupedMatmul, loads: str, dtype: jnp.dtype) -> float:
  E, D, F, N = 8, 128, 256, 1024
  sizes_E = {
    "even": np.full(E, N // E),
    "uneven": choose.uneven_sizes(N, E),
    "empty": np.array([0, 0, N, 0, 0, 0, 0, 0]),
  }[loads]
  x_ND, weights, dy_ND = _arrays(Shape("", E, D, F, N), dtype)
  function, reference = (
    choose.with_sizes(name, jnp.asarray(sizes_E, jnp.int32)) for name in (kernel, choose.REFERENCE)
  )
  return choose.kernel_difference(function, reference, (x_ND, *weights), dy_ND)


Matrices = tuple[jax.Array, jax.Array, jax.Array]  # gate_EDF, up_EDF, down_EFD


def _arrays(shape: Shape, dtype: jnp.dtype) -> tuple[jax.Array, Matrices, jax.Array]:
  """Returns x_ND, the experts' matrices and dy_ND, random."""
  _, E, D, F, N = shape
  keys = jax.random.split(jax.random.key(0), 5)
  sizes = ((N, D), (E, D, F), (E, D, F), (E, F, D), (N, D))
  x_ND, gate, up, down, dy_ND = (
    jax.random.normal(key, size, dtype) * size[-2] ** (-0.5 if len(size) == 3 else 0)
    for key, size in zip(keys, sizes, strict=True)
  )
  return x_ND, (gate, up, down), dy_ND


def machine(sizes: Sizes, rounds: int) -> dict[str, float]:
  """Returns the rate of a dense matmul in FLOP/s, and bytes/s read and written by a copy."""
  n, dtype = sizes.square, sizes.dtype.value
  square = jnp.ones((n, n), dtype)
  large = jnp.ones((16 * n, n), dtype)
  thunks = {
    "matmul": functools.partial(jax.jit(jnp.matmul), square, square),
    "copy": functools.partial(jax.jit(lambda x: x + 1), large),
  }
  times = _timed(thunks, rounds)
  rates = {
    "matmul_flops": 2 * n**3 / timing.median(times, "matmul"),
    "copy_bytes": 2 * large.nbytes / timing.median(times, "copy"),
    "peak_flops": chip.flops if (chip := chips.chip_of(jax.devices()[0].device_kind)) else 0.0,
  }
  progress(
    f"dense matmul {rates['matmul_flops'] / 1e12:.1f} TFLOP/s, "
    f"copy {rates['copy_bytes'] / 1e9:.0f} GB/s"
  )
  return rates


def _timed(thunks: dict[str, Callable[[], Any]], rounds: int) -> timing.Times:
  for thunk in thunks.values():
    jax.block_until_ready(thunk())
  return timing.in_turns(thunks, rounds, 0.02)


def expert_rates(
  shape: Shape, dtype: Dtype, rounds: int, matmul_flops: float, wrong: set[str]
) -> list[dict[str, Any]]:
  """Times the experts of one layer: slots, and sorted rows with each kernel that is right here.

  Returns:
    A row for each: the FLOP/s of the forward pass, the input's and the weights' gradient, and of
    all three, as shares of those of a dense matmul.
  """
  x_ND, weights, dy_ND = _arrays(shape, jnp.dtype(dtype.value))
  E, N, D = shape.num_experts, shape.rows, shape.dim
  sizes_E = jnp.full((E,), N // E, jnp.int32)

  def slots(x_ND: jax.Array, *weights: jax.Array) -> jax.Array:
    x_ERD = x_ND.reshape(E, N // E, D)
    return experts(x_ERD, None, Experts(*weights), GroupedMatmul.AUTO).reshape(N, D)

  functions = {"slots": slots}
  for kernel, record in EXPERT_KERNELS.items():
    here = platform.name() in record.platforms and not record.available()
    if here and f"experts {kernel.value}" not in wrong:
      functions[kernel.value] = choose.with_sizes(kernel, sizes_E)
  flops = 6 * N * D * shape.expert_dim  # of each of the three
  rows = []
  for name, function in functions.items():
    try:
      times = _timed(_thunks(function, x_ND, weights, dy_ND), rounds)
    except Exception as error:  # out of memory, or a kernel that does not know these sizes
      progress(f"{shape.name}, {name}: left out, {str(error).splitlines()[0][:120]}")
      continue
    seconds = {kind: timing.median(times, kind) for kind in times}
    row = {"shape": shape.name, "kernel": name}
    for kind, took in seconds.items():
      row[kind] = flops / took / matmul_flops
    row["all"] = 3 * flops / sum(seconds.values()) / matmul_flops
    progress(f"{shape.name}, {name}: {100 * row['all']:.0f}% of a dense matmul")
    rows.append(row)
  return rows


def _thunks(
  function: Callable[..., jax.Array], x_ND: jax.Array, weights: Matrices, dy_ND: jax.Array
) -> dict[str, Callable[[], Any]]:
  """Returns what to time. A gradient is computed from what the forward pass has kept."""
  # The other argument is closed over, so that its gradient is not computed.
  _, of_x = jax.jit(lambda x, *w: jax.vjp(lambda x: function(x, *w), x))(x_ND, *weights)
  _, of_w = jax.jit(lambda x, *w: jax.vjp(functools.partial(function, x), *w))(x_ND, *weights)
  gradient = jax.jit(lambda vjp, dy: vjp(dy))
  return {
    "forward": functools.partial(jax.jit(function), x_ND, *weights),
    "input gradient": functools.partial(gradient, of_x, dy_ND),
    "weight gradient": functools.partial(gradient, of_w, dy_ND),
  }


def training_row(
  case: Training, dispatch: Dispatch, rounds: int, peak: float, profile: pathlib.Path
) -> dict[str, Any]:
  """Trains a model on one batch and writes a trace of a step, into a folder below `profile`.

  Returns:
    A row: its MFU, tokens per second, loss and drops; or `error`.
  """
  moe = dataclasses.replace(case.model.moe, dispatch=dispatch, capacity_factor=1.0)
  config = Config(
    model=dataclasses.replace(case.model, moe=moe),
    data=Data(seq_len=case.seq_len, batch_size=case.batch_size),
    loss=Loss(load_balance=0.01),
    optimizer=Optimizer(warmup_steps=0),
    mesh=Mesh(data=1),
  )
  trace = profile / f"{case.name} {dispatch.value}"
  row: dict[str, Any] = {"name": case.name, "dispatch": dispatch.value, "error": ""}
  try:
    validation.validate(config)
    config, _, lines = choose.resolve(config, {})
    row["kernels"] = lines
    row["predicted_s"] = predicted_seconds(config)
    trainer = timing.Trainer(config, bare=False)
    trainer.measure(timing.WARMUP_STEPS)
    took = min((trainer.measure(3) for _ in range(rounds)), key=lambda took: took["wall_s"])
    with jax.profiler.trace(str(trace)):
      trainer.measure(1)
  except Exception as error:
    row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"
    progress(f"{case.name}, {dispatch.value}: {row['error']}")
    return row
  speed = case.batch_size * case.seq_len / took["wall_s"]
  flops = speed * cost.count(config).flops_per_token
  row |= {
    "tokens_per_s": speed,
    "step_s": took["wall_s"],
    "flops": flops,
    "mfu": flops / peak if peak else None,
    "loss": took["loss"],
    "drop_fraction": took.get("drop_fraction", 0.0),
    "trace": str(trace),
  }
  progress(f"{case.name}, {dispatch.value}: {speed:,.0f} tokens/s, {flops / 1e12:.1f} TFLOP/s")
  return row


def predicted_seconds(config: Config) -> float | None:
  """Returns what moe_jax.compile predicts of a step on the first device; None of a CPU."""
  devices = jax.devices()[:1]
  chip = chips.chip_of(devices[0].device_kind)
  if chip is None:
    return None
  family = next(name for name, one in chips.CHIPS.items() if one is chip)
  target = compile_targets.Target(devices[0].device_kind, chip, family, (1, 1), 1)
  compiled = programs.compile_for(config, target, "train", progress, [], devices)
  return report.as_json(compiled, target, "train")["seconds"]["step"]


def targets(result: dict[str, Any], sizes: Sizes) -> list[dict[str, Any]]:
  """Compares with the aims; what could not run has a share of 0."""
  rows = result["correctness"]
  wrong = sum(bool(row["error"]) for row in rows)
  verdicts = [results.target("kernels that differ from the reference", float(wrong), 0.0)]
  for shape in sizes.shapes:
    of_shape = {r["kernel"]: r["all"] for r in result["experts"] if r["shape"] == shape.name}
    slots = of_shape.pop("slots", 0.0)
    best = max(of_shape.values(), default=0.0)
    for what, share, limit in (("slots", slots, _SLOTS), ("best grouped", best, _GROUPED)):
      name = f"experts of {shape.name}, {what} / dense matmul"
      verdicts.append(results.target(name, share, limit, at_least=True))
  peak = result["machine"]["peak_flops"] or result["machine"]["matmul_flops"]
  for case in sizes.training:
    for dispatch, aim in case.aims.items():
      flops = sum(
        r.get("flops", 0.0)
        for r in result["training"]
        if (r["name"], r["dispatch"]) == (case.name, dispatch.value)
      )
      name = f"MFU of {case.name}, {dispatch.value}"
      verdicts.append(results.target(name, flops / peak, aim, at_least=True))
  return verdicts


def text(result: dict[str, Any]) -> str:
  """Formats the tables."""
  kinds = ("forward", "input gradient", "weight gradient", "all")
  shares = [
    [f"{row['shape']}, {row['kernel']}", *(f"{100 * row[kind]:.0f}" for kind in kinds)]
    for row in result["experts"]
  ]
  trained = [
    [f"{row['name']}, {row['dispatch']}"]
    + (
      [row["error"][:60], "", "", "", "", "", ""]
      if row["error"]
      else [
        f"{row['tokens_per_s']:,.0f}",
        f"{row['flops'] / 1e12:.2f}",
        f"{100 * row['mfu']:.1f}" if row["mfu"] else "-",
        f"{row['loss']:.3f}",
        f"{100 * row['drop_fraction']:.1f}%",
        f"{1e3 * row['step_s']:.1f}",
        f"{1e3 * row['predicted_s']:.1f}" if row["predicted_s"] else "-",
      ]
    )
    for row in result["training"]
  ]
  parts = [
    results.table(["experts, % of a dense matmul's FLOP/s", *kinds], shares),
    results.table(
      ["training", "tokens/s", "TFLOP/s", "MFU %", "loss", "dropped", "step ms", "predicted"],
      trained,
    ),
    results.target_table(result["targets"]),
  ]
  if result["toy"]:
    parts.append("toy sizes on a CPU: this says that the script runs, and nothing about speed")
  return "\n\n".join(parts)
