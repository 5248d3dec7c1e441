"""A worker of the `train` benchmark: trains our model in one process, pinned to its CPUs.

Its protocol is that of peer_train.py, in lines (-> stdout, <- stdin):

  ->           {"ready": true, "name", "parameters", "active_parameters", "versions"}, after warm-up
  <- step N
  ->           {"cpu_s": CPU-seconds per step, "wall_s": seconds per step, "loss", ...}
  <- (end of file ends it)
"""

import argparse
import json
import os
import sys
from typing import TextIO

from benchmarks import workload
from moe_jax.config import (
  Config,
  Data,
  Dispatch,
  Loss,
  Mesh,
  Model,
  MoE,
  Optimizer,
  Remat,
  Schedule,
  Train,
)


def parse_arguments() -> argparse.Namespace:
  """Parses the command line."""
  parser = argparse.ArgumentParser(prog="python -m benchmarks.train_worker", allow_abbrev=False)
  add = parser.add_argument
  add("--model", default="grouped", choices=["ffn", *(d.value for d in Dispatch)])
  add("--capacity_factor", type=float, default=1.25)
  add("--remat", default="dots", choices=[r.value for r in Remat])
  add("--bare", action="store_true", help="compute no metrics but the loss")
  add("--cpus", type=workload.cpus, help="the CPUs to run on, where the system can pin")
  for name, default in workload.W.items():
    add(f"--{name}", type=int, default=default)
  add("--head_dim", type=int, help="default: dim / heads")
  args = parser.parse_args()
  args.head_dim = args.head_dim or args.dim // args.heads
  return args


def make_config(args: argparse.Namespace) -> Config:
  """Returns a config of Mixtral's layers and losses, or with --model=ffn a dense twin.

  The twin has the same active size.
  """
  moe = MoE()
  if args.model != "ffn":
    moe = MoE(
      num_experts=args.experts_count,
      top_k=args.top_k,
      expert_dim=args.expert_dim,
      dispatch=Dispatch(args.model),
      capacity_factor=args.capacity_factor,
    )
  return Config(
    model=Model(
      vocab_size=args.vocab_size,
      num_layers=args.layers,
      dim=args.dim,
      num_heads=args.heads,
      num_kv_heads=args.kv_heads,
      head_dim=args.head_dim,
      ffn_dim=args.top_k * args.expert_dim,
      tied_head=False,
      remat=Remat(args.remat),
      moe=moe,
    ),
    data=Data(seq_len=args.seq_len, batch_size=args.batch_size),
    loss=Loss(load_balance=0.01, router_z=0.0),
    optimizer=Optimizer(
      learning_rate=1e-3,
      schedule=Schedule.CONSTANT,
      warmup_steps=0,
      clip_norm=0.0,
    ),
    train=Train(seed=args.seed),
    mesh=Mesh(data=1),
  )


def pin(cpus: list[int] | None) -> TextIO:
  """Pins this process, before jax sizes its thread pools, and returns the real stdout.

  From now on text that libraries print to stdout goes to stderr.
  """
  out = os.fdopen(os.dup(1), "w", buffering=1)
  os.dup2(2, 1)
  if cpus and hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, cpus)
  os.environ["JAX_PLATFORMS"] = "cpu"
  return out


def main() -> None:
  """Answers the lines on stdin."""
  args = parse_arguments()
  out = pin(args.cpus)
  import jax

  from benchmarks import timing
  from moe_jax.model import cost
  from moe_jax.start import startup

  config = make_config(args)
  startup.start()
  trainer = timing.Trainer(config, args.bare)
  trainer.measure(timing.WARMUP_STEPS)
  counts = cost.count(config)
  name = f"moe_jax {args.model}"
  if args.model in ("gather", "einsum"):
    name += f" {args.capacity_factor:g}"
  name += " without metrics" if args.bare else ""
  ready = dict(
    ready=True,
    name=f"{name} {args.remat}",
    parameters=counts.total,
    active_parameters=counts.active,
    versions={"jax": jax.__version__},
  )
  print(json.dumps(ready), file=out)
  for line in sys.stdin:
    words = line.split()
    if len(words) != 2 or words[0] != "step" or not words[1].isdecimal() or words[1] == "0":
      sys.exit(f"error: stdin: {line.strip()!r} is not `step N` with N of at least 1")
    print(json.dumps(trainer.measure(int(words[1]))), file=out)


if __name__ == "__main__":
  main()
