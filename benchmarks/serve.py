"""Serves exported runs with another library, and compares its greedy tokens with our logits.

A tiny model of each family learns one page by heart, so that its tokens are neither all the same
nor close calls. The run is exported, and the server (serve_worker.py, in a Python of its own)
continues prompts of several lengths. Our logits of prompt and continuation, in one forward pass,
must have their largest value at each of its tokens.
"""

import json
import pathlib
import shutil
import subprocess
import sys
from typing import Any

import numpy as np

from benchmarks import results
from benchmarks.results import progress
from moe_jax.errors import UserError

_PAGE = results.ROOT / "LICENSE"
_LENGTHS = 1, 6, 23, 57  # tokens of the prompts; the last is longer than the window below
_TOKENS = 40
# Float32 sums in another order: tests/hf has logits within 1e-5 of the largest, here about 20, and
# a log-probability is the difference of two such numbers.
_NATS = 4e-4
_FIELDS: dict[str, Any] = {
  "data.name": "text",
  "data.path": _PAGE,
  "model.vocab_size": 512,
  "optimizer.warmup_steps": 20,
} | dict.fromkeys(("train.steps", "train.eval_every", "train.checkpoint_every"), 100)
_ON = "sinks", "qkv_bias", "out_bias", "moe.expert_bias", "moe.router_bias"
FAMILIES: dict[str, dict[str, Any]] = {  # what is not as in tiny_moe
  "qwen3_moe": {},
  "mixtral": {"model.qk_norm": "none"},
  "gpt_oss": {
    "model.qk_norm": "none",
    "model.window": 32,
    "model.global_every": 2,
    "model.activation": "clamped_swiglu",
    "model.rope_scaling.kind": "yarn",
    "model.rope_scaling.factor": 4.0,
    "model.rope_scaling.original_length": 32,
    "model.rope_scaling.truncate": "false",
  }
  | {f"model.{name}": "true" for name in _ON},
}


def run(
  out: pathlib.Path, server: str, python: str, workdir: str, fields: dict[str, Any]
) -> dict[str, Any]:
  """Trains, exports, serves and compares every family, or only the run in `workdir`.

  Raises:
    UserError: a process fails.
  """
  out.mkdir(parents=True, exist_ok=True)
  rows = []
  for family in [""] if workdir else FAMILIES:
    path = pathlib.Path(workdir or out / family)
    if not path.exists():
      _train(path, _FIELDS | FAMILIES[family] | fields)
    rows.append(_compare(path, family, out / f"{path.name}.{server}", server, python))
    progress("{name}, {server}: {distinct} distinct tokens, least margin {margin:.1e}, "
             "log-probabilities within {nats:.1e}".format(**rows[-1]))  # fmt: skip
  targets = []
  for row in rows:
    what, tokens = f"{row['name']}, {row['server']}:", _TOKENS * len(_LENGTHS)
    targets += [
      results.target(f"{what} equal tokens", row["equal"], tokens, at_least=True),
      results.target(f"{what} difference of log p, 1e-4 nats", 1e4 * row["nats"], 1e4 * _NATS),
    ]
  return {"rows": rows, "targets": targets}


def _train(path: pathlib.Path, fields: dict[str, Any]) -> None:
  import tokenizers

  progress(f"{path.name}: training")
  model = tokenizers.ByteLevelBPETokenizer()
  model.train([str(_PAGE)], vocab_size=512, special_tokens=["<|endoftext|>"], show_progress=False)
  file = path.parent / "tokenizer.json"
  model.save(str(file))
  command = [sys.executable, "train.py", "--config=configs/tiny_moe.py", f"--workdir={path}"]
  command += [f"--config.{k}={v}" for k, v in (fields | {"data.tokenizer": file}).items()]
  _run(command, path.with_suffix(".log"))


def _run(command: list[str], log: pathlib.Path) -> None:
  """Runs a process to its end; what it prints goes to a file."""
  with log.open("w") as file:
    code = subprocess.call(command, cwd=results.ROOT, stdout=file, stderr=subprocess.STDOUT)
  if code:
    raise UserError(f"{' '.join(command[:3])} ended with code {code}; {log} says why")


def _compare(
  path: pathlib.Path, family: str, folder: pathlib.Path, server: str, python: str
) -> dict[str, Any]:
  """Exports a run, lets the server generate, and returns how far its answer is from our logits."""
  import moe_jax

  shutil.rmtree(folder, ignore_errors=True)
  log, to = (folder.with_name(f"{folder.name}.{kind}") for kind in ("log", "json"))
  export = [sys.executable, "-m", "moe_jax.hf", "export", f"--workdir={path}", f"--to={folder}"]
  _run([*export, f"--family={family}"], log)
  model = moe_jax.load(str(path))
  page_N = model.tokenizer.encode(_PAGE.read_text()).tolist()
  prompts = [[model.tokenizer.separator, *page_N[50 * n : 51 * n]] for n in _LENGTHS]
  worker = [python, "benchmarks/serve_worker.py", f"--server={server}", f"--model={folder}"]
  _run([*worker, f"--prompts={json.dumps(prompts)}", f"--tokens={_TOKENS}", f"--to={to}"], log)
  answer = json.loads(to.read_text())
  equal, nats, margins, drawn = 0, [], [], set()
  for ids, row in zip(prompts, answer["rows"], strict=True):
    tokens_N = np.array(row["tokens"])
    logits_NV = model.logits([*ids, *row["tokens"]])[len(ids) - 1 : -1].astype(np.float64)
    log_p_NV = logits_NV - np.logaddexp.reduce(logits_NV, axis=1, keepdims=True)
    equal += int((logits_NV.argmax(1) == tokens_N).sum())
    nats.append(np.abs(log_p_NV[np.arange(_TOKENS), tokens_N] - row["logprobs"]).max())
    margins.append(np.diff(np.sort(logits_NV)[:, -2:]).min())
    drawn |= set(row["tokens"])
  about = {"name": family or path.name, "server": answer["server"], "distinct": len(drawn)}
  return about | {"equal": equal, "nats": float(max(nats)), "margin": float(min(margins))}
