"""A worker of the `decode` benchmark: decodes greedily with our model, in one process on one CPU.

With --weights it first writes its random weights and prompts to that folder, for peer_decode.py.
Its protocol is that of peer_decode.py, in lines (-> stdout, <- stdin):

  ->                {"ready": true, "name", "parameters", "versions"}
  <- decode B N     N tokens after each of the first B prompts
  ->                {"cpu_s": CPU-seconds of a step of B tokens, "wall_s", "tokens": [[...], ...]}
  <- (end of file ends it)
"""

import argparse
import json
import math
import pathlib
import sys
import time

import numpy as np

from benchmarks import train_worker, workload

PROMPT = 16  # tokens of a prompt; the first is the separator that begins a document
_BEGIN = 0


def parse_arguments() -> argparse.Namespace:
  """Parses the command line."""
  parser = argparse.ArgumentParser(prog="python -m benchmarks.decode_worker", allow_abbrev=False)
  add = parser.add_argument
  add("--weights", type=pathlib.Path, help="folder to write the weights and prompts to")
  add("--rows", type=int, default=32, help="prompts, the largest batch")
  add("--cpus", type=workload.cpus, help="the CPUs to run on, where the system can pin")
  for name, default in workload.W.items():
    add(f"--{name}", type=int, default=default)
  args = parser.parse_args()
  args.head_dim = args.dim // args.heads
  args.model, args.remat, args.capacity_factor = "grouped", "none", math.inf
  return args


class Ids:
  """A tokenizer of a model whose prompts are ids."""

  separator = _BEGIN

  def __init__(self, vocab_size: int):
    self.vocab_size = vocab_size


def main() -> None:
  """Writes the weights if asked to, then answers the lines on stdin."""
  args = parse_arguments()
  out = train_worker.pin(args.cpus)
  import jax

  from benchmarks import inference
  from moe_jax.hf import exporting, families
  from moe_jax.model import cost
  from moe_jax.start import startup
  from moe_jax.storage.weights import Weights

  config = train_worker.make_config(args)
  startup.start()
  model = inference.build_generator(config, args.seed, Ids(args.vocab_size), never=_BEGIN)
  rng = np.random.default_rng(args.seed)
  prompts_BL = rng.integers(1, args.vocab_size, (args.rows, PROMPT))
  prompts_BL[:, 0] = _BEGIN
  if args.weights:
    with jax.set_mesh(model.mesh):
      params, bias_ZE = inference.random_parameters(config, args.seed, never=_BEGIN)
      run = exporting.Loaded(config, Weights(params, bias_ZE), 0, pathlib.Path())
      exporting.export(run, families.FAMILIES["mixtral"], args.weights / "mixtral")
    np.save(args.weights / "prompts.npy", prompts_BL)

  total = cost.count(config).total
  ready = dict(ready=True, name="moe_jax", parameters=total, versions={"jax": jax.__version__})
  print(json.dumps(ready), file=out)
  for line in sys.stdin:
    words = line.split()
    if len(words) != 3 or words[0] != "decode" or not all(map(str.isdecimal, words[1:])):
      sys.exit(f"error: stdin: {line.strip()!r} is not `decode B N`")
    rows, steps = map(int, words[1:])
    stream = model.stream(prompts_BL[:rows].tolist(), max_new_tokens=steps, temperature=0)
    tokens = next(stream)
    cpu, wall = time.process_time(), time.perf_counter()
    for chunk in stream:
      tokens = [[*row, *more] for row, more in zip(tokens, chunk, strict=True)]
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    answer = {"cpu_s": cpu / (steps - 1), "wall_s": wall / (steps - 1), "tokens": tokens}
    print(json.dumps(answer), file=out)


if __name__ == "__main__":
  main()
