"""The peer of our training benchmark: Hugging Face transformers on PyTorch, a thread for each CPU.

Trains Mixtral (`--model=mixtral`), or Mistral with an FFN of equal active (`dense`) or equal total
(`dense_total`) size, in float32 on one fixed batch of random tokens. A step is forward, loss with
the router's balance loss, backward, AdamW, zero_grad. It needs `pip install 'moe_jax[hf]'`.

  python -m benchmarks.peer_train --model=mixtral --experts=grouped_mm --compile --cpus=0

prints one line. With `--worker` a parent process asks several peers in turns, so that measurements
interleave. The protocol, in lines (-> stdout, which has no other lines; <- stdin):

  ->           {"ready": true, "name", "parameters", "active_parameters", "versions"}, after warm-up
  <- step N
  ->           {"cpu_s": CPU-seconds per step, "wall_s": seconds per step, "loss"}
  <- (end of file ends it)
"""

import argparse
import ctypes
import json
import os
import sys
import time
from collections.abc import Callable
from typing import TextIO

from benchmarks import workload

WARMUP_STEPS = 2


def parse_arguments() -> argparse.Namespace:
  """Parses and checks the command line."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  add = parser.add_argument
  add("--model", default="mixtral", choices=["mixtral", "dense", "dense_total"])
  add("--experts", default="grouped_mm", choices=["grouped_mm", "eager", "batched_mm"])
  add("--compile", action="store_true", help="torch.compile; needs a C++ compiler and a minute")
  add("--worker", action="store_true", help="answer `step N` lines on stdin")
  add("--steps", type=int, default=5, help="timed steps without --worker")
  add("--cpus", type=workload.cpus, help="the CPUs to run on, where the system can pin")
  for name, default in workload.W.items():
    add(f"--{name}", type=int, default=default)
  add("--head_dim", type=int, help="default: dim / heads")
  args = parser.parse_args()
  if args.steps < 1:
    parser.error(f"--steps={args.steps}: it must be at least 1")
  args.head_dim = args.head_dim or args.dim // args.heads
  return args


def fail(message: str) -> None:
  """Prints an error and ends the process."""
  print(f"error: {message}", file=sys.stderr)
  sys.exit(2)


def keep_freed_memory() -> None:
  """Makes glibc keep freed memory.

  By default glibc returns tensors above 32 MB to the system when they are freed, and each new
  tensor faults its pages in again: a fifth of dense_total's CPU-seconds at W.
  """
  libc = ctypes.CDLL(None)
  if hasattr(libc, "mallopt"):
    libc.mallopt(-4, 0)  # M_MMAP_MAX: all memory comes from the heap
    libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


def check_batched_mm_fits(args: argparse.Namespace) -> None:
  """Ends the process if batched_mm needs more memory than the machine has.

  batched_mm copies an expert's weights for every assignment, and autograd keeps the copies. Without
  enough memory the operating system would kill this or another process without a message.
  """
  assignments = args.batch_size * args.seq_len * args.top_k
  copies = 4 * args.layers * assignments * 3 * args.dim * args.expert_dim / 1e9
  memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
  if copies > memory:
    fail(
      f"--experts=batched_mm keeps {copies:.1f} GB and this machine has {memory:.1f} GB; "
      "lower --batch_size, or take --experts=grouped_mm"
    )


def build_model(args: argparse.Namespace):
  """Returns the model of transformers that the command line names."""
  import torch
  import transformers

  shape = dict(
    vocab_size=args.vocab_size,
    hidden_size=args.dim,
    num_hidden_layers=args.layers,
    num_attention_heads=args.heads,
    num_key_value_heads=args.kv_heads,
    head_dim=args.head_dim,
    max_position_embeddings=args.seq_len,
    use_cache=False,
    sliding_window=None,  # Mistral's default could add a mask, with which sdpa is slow
    bos_token_id=None,
    eos_token_id=None,  # the defaults, 1 and 2, may be outside the vocabulary
  )
  kind = dict(attn_implementation="sdpa", dtype=torch.float32)
  if args.model == "mixtral":
    kind["experts_implementation"] = args.experts
    config = transformers.MixtralConfig(
      **shape,
      intermediate_size=args.expert_dim,
      num_local_experts=args.experts_count,
      num_experts_per_tok=args.top_k,
      router_aux_loss_coef=0.01,
      output_router_logits=True,  # without it the balance loss is left out
    )
  else:
    width = args.top_k if args.model == "dense" else args.experts_count
    config = transformers.MistralConfig(**shape, intermediate_size=width * args.expert_dim)
  return transformers.AutoModelForCausalLM.from_config(config, **kind).train()


def count_parameters(model, args: argparse.Namespace) -> tuple[int, int]:
  """Returns the number of all parameters, and of those that one token uses, embedding included."""
  total = sum(p.numel() for p in model.parameters())
  experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
  return total, total - experts + experts * args.top_k // args.experts_count


def make_step(model, args: argparse.Namespace) -> Callable[[], float]:
  """Returns a function that trains one step and returns its loss, balance loss included."""
  import torch

  # For W's 13.5M parameters fused AdamW took 17 ms, the default and a plain loop 51, foreach 55.
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
  tokens_BL = torch.randint(args.vocab_size, (args.batch_size, args.seq_len))

  def step() -> float:
    loss = model(input_ids=tokens_BL, labels=tokens_BL).loss  # the model shifts the labels
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()

  return step


def measure(step: Callable[[], float], steps: int) -> dict[str, float]:
  """Times `steps` steps; returns the times of one step and the last loss."""
  cpu, wall = time.process_time(), time.perf_counter()
  for _ in range(steps):
    loss = step()
  cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
  return {"cpu_s": cpu / steps, "wall_s": wall / steps, "loss": loss}


def pinned(cpus: list[int] | None) -> TextIO:
  """Pins this process, imports torch with a thread for each CPU, and returns the real stdout.

  From now on text that libraries and compilers print to stdout goes to stderr.
  """
  out = os.fdopen(os.dup(1), "w", buffering=1)
  os.dup2(2, 1)
  keep_freed_memory()
  # Both settings come before torch is imported, because the import sizes its thread pools.
  if cpus and hasattr(os, "sched_setaffinity"):
    try:
      os.sched_setaffinity(0, cpus)
    except OSError:
      fail(f"--cpus={cpus}: this process may use {sorted(os.sched_getaffinity(0))}")
  threads = len(cpus or [0])
  os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
  try:
    import torch
    import transformers  # noqa: F401
  except ImportError as error:
    fail(f"{error.name or error} is missing: pip install 'moe_jax[hf]'")
  torch.set_num_threads(threads)
  return out


def main() -> None:
  """Trains a fixed number of steps, or with --worker answers the lines on stdin."""
  args = parse_arguments()
  out = pinned(args.cpus)
  import torch
  import transformers

  torch.manual_seed(args.seed)

  if args.model == "mixtral" and args.experts == "batched_mm":
    check_batched_mm_fits(args)
  model = build_model(args)
  total, active = count_parameters(model, args)
  name = f"transformers {args.model}" + (f" {args.experts}" if args.model == "mixtral" else "")
  if args.compile:
    model.compile()
    name += " compiled"
  step = make_step(model, args)
  measure(step, WARMUP_STEPS)

  if not args.worker:
    times, tokens = measure(step, args.steps), args.batch_size * args.seq_len
    cpu_s, wall_s = times["cpu_s"], times["wall_s"]
    print(
      f"{name}: {tokens / cpu_s:,.0f} tokens per CPU-second, {cpu_s:.3f} CPU-s "
      f"({wall_s:.3f} s) for a step of {tokens} tokens, {total / 1e6:.2f}M parameters, "
      f"{active / 1e6:.2f}M active, loss {times['loss']:.3f}",
      file=out,
    )
    return
  versions = {"torch": torch.__version__, "transformers": transformers.__version__}
  ready = dict(ready=True, name=name, parameters=total, active_parameters=active, versions=versions)
  print(json.dumps(ready), file=out)
  for line in sys.stdin:
    words = line.split()
    if len(words) != 2 or words[0] != "step" or not words[1].isdecimal() or words[1] == "0":
      fail(f"stdin: {line.strip()!r} is not `step N` with N of at least 1")
    print(json.dumps(measure(step, int(words[1]))), file=out)


if __name__ == "__main__":
  main()
