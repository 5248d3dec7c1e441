"""The peer of our decoding benchmark: Hugging Face transformers' Mixtral, greedy, one CPU thread.

It calls the model on one token of each row at a time, with its KV cache. That is what the method
`generate` of transformers does, without its bookkeeping. The weights are what `python -m benchmarks
decode` exports (moe_jax.hf). The protocol, in lines (-> stdout, <- stdin):

  ->                {"ready": true, "name", "parameters", "versions"}
  <- decode B N     N tokens after each of the first B prompts of prompts.npy
  ->                {"cpu_s": CPU-seconds of a step of B tokens, "wall_s", "tokens": [[...], ...]}
  <- (end of file ends it)
"""

import argparse
import json
import pathlib
import sys
import time

from benchmarks import peer_train, workload


def parse_arguments() -> argparse.Namespace:
  """Parses the command line."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  add = parser.add_argument
  add("--weights", type=pathlib.Path, required=True, help="the folder of mixtral/ and prompts.npy")
  add("--experts", default="grouped_mm", choices=["grouped_mm", "eager", "batched_mm"])
  add("--compile", action="store_true", help="torch.compile and a static cache")
  add("--cpus", type=workload.cpus, help="the CPUs to run on, where the system can pin")
  return parser.parse_args()


def build_peer(folder: pathlib.Path, experts: str):
  """Returns transformers' Mixtral with the weights in a folder."""
  import torch
  import transformers

  return transformers.AutoModelForCausalLM.from_pretrained(
    folder / "mixtral",
    attn_implementation="sdpa",
    dtype=torch.float32,
    experts_implementation=experts,
  ).eval()


class PeerDecoder:
  """Decodes greedily with a model of transformers."""

  def __init__(self, model, prompts_BL, compiled: bool):
    import torch
    import transformers

    self.torch, self.transformers = torch, transformers
    self.model, self.prompts_BL, self.compiled = model, torch.from_numpy(prompts_BL), compiled
    self.step = torch.compile(model.forward, dynamic=False) if compiled else model.forward

  def decode(self, rows: int, steps: int) -> dict:
    """Draws `steps` tokens after each of the first `rows` prompts; returns times and tokens."""
    with self.torch.inference_mode():
      prompt_BL = self.prompts_BL[:rows]
      length = prompt_BL.shape[1]
      if self.compiled:
        kind = dict(config=self.model.config, max_cache_len=length + steps)
        cache = self.transformers.StaticCache(**kind)
      else:
        cache = self.transformers.DynamicCache(config=self.model.config)
      out = self.model(prompt_BL, past_key_values=cache, use_cache=True, logits_to_keep=1)
      token_B = out.logits[:, -1].argmax(-1)
      tokens = [token_B]
      cpu, wall = time.process_time(), time.perf_counter()
      for number in range(steps - 1):
        place = {}
        if self.compiled:
          place["position_ids"] = self.torch.full((rows, 1), length + number)
        out = self.step(token_B[:, None], past_key_values=cache, use_cache=True, **place)
        token_B = out.logits[:, -1].argmax(-1)
        tokens.append(token_B)
      cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
      ids = self.torch.stack(tokens, 1).tolist()
    return {"cpu_s": cpu / (steps - 1), "wall_s": wall / (steps - 1), "tokens": ids}


def main() -> None:
  """Answers the lines on stdin."""
  args = parse_arguments()
  out = peer_train.pinned(args.cpus)
  import numpy as np
  import torch
  import transformers

  model = build_peer(args.weights, args.experts)
  decoder = PeerDecoder(model, np.load(args.weights / "prompts.npy"), args.compile)
  name = f"transformers {args.experts}" + (" compiled" if args.compile else "")
  versions = {"torch": torch.__version__, "transformers": transformers.__version__}
  total = sum(p.numel() for p in model.parameters())
  print(json.dumps(dict(ready=True, name=name, parameters=total, versions=versions)), file=out)
  for line in sys.stdin:
    words = line.split()
    if len(words) != 3 or words[0] != "decode" or not all(map(str.isdecimal, words[1:])):
      peer_train.fail(f"stdin: {line.strip()!r} is not `decode B N`")
    print(json.dumps(decoder.decode(int(words[1]), int(words[2]))), file=out)


if __name__ == "__main__":
  main()
