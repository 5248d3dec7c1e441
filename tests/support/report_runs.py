"""Writes workdirs like those of train.py and eval.py, with numbers that can be checked by hand."""

import json
import pathlib
import shlex
from typing import NamedTuple

from moe_jax.report import page

STEPS = (100, 200, 300, 400)
# Validation losses at STEPS of seeds 0 and 1. The dense runs end at a mean of 2.1, the target.
LOSSES = {
  "dense": ((4.0, 3.0, 2.5, 2.0), (4.0, 3.0, 2.6, 2.2)),
  "moe": ((4.0, 2.5, 1.7, 1.6), (4.0, 3.0, 2.1, 1.9)),  # they reach 2.1 at steps 250 and 300
  "bad": ((4.0, 3.5, 3.2, 3.0), (4.0, 3.5, 3.2, 3.0)),
}
SECONDS = {"dense": 0.5, "moe": 1.0, "bad": 1.0}  # per step


def write_json(path, value):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(value))


def write_run(path, arm, seed, experts=0, layers=2, steps=STEPS):
  """Writes lines of training every 50 steps and of validation every 100, and no evaluation."""
  config = {
    "model": {"moe": {"num_experts": experts, "arm": arm}},
    "data": {"batch_size": 2, "seq_len": 8, "seed": seed},
    "train": {"steps": STEPS[-1], "seed": seed},
  }
  write_json(path / "config.json", config)
  lines = []
  for step in range(50, steps[-1] + 1, 50):
    line = {"step": step, "train/loss": 9.0, "train/total_loss": 99.0}
    line |= {"train/seconds": SECONDS[arm] * step, "train/tokens_per_s": 1000.0 + seed}
    if experts:
      # Expert 0 has twice its fair share, the others share the rest.
      load = [2 / experts, *[(1 - 2 / experts) / (experts - 1)] * (experts - 1)]
      line |= {"train/load_ZE": [load] * layers, "train/max_vio_Z": [1.0] * layers}
      line |= {"train/drop_fraction_Z": [0.1] * layers, "train/dead_experts_Z": [0] * layers}
      line |= {"train/drop_by_rank_ZK": [[0.05, 0.15]] * layers}
    lines.append(line)
    if step in steps:
      loss = LOSSES[arm][seed][STEPS.index(step)]
      line = {"step": step, "validation/loss": loss, "validation/bits_per_byte": 2 * loss}
      lines.append(line)
  (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  return path


def write_eval(path, loss, **more):
  result = {"step": STEPS[-1], "split": "validation", "tokens": 1000, "bytes": 1000, "loss": loss}
  result |= {"bits_per_byte": 2 * loss, "parameters": 2_000_000, "active_parameters": 500_000}
  write_json(path / "eval.json", result | {"flops_per_token": 3.0e6} | more)


def write_routing(
  path, experts, layers=2, tokens=("a", "b", " ", "\n", "</script>"), label="prose"
):
  """Writes routing.json: in layer z, token i goes to experts (i + z) and (i + z + 1).

  Token 1 has lost its best expert.
  """
  count = range(len(tokens))
  text = {"domain": [label if i < 3 else "code" for i in count], "tokens": list(tokens)}
  text["layers"] = [
    {
      "experts": [[(i + z) % experts, (i + z + 1) % experts] for i in count],
      "gates": [[0.75, 0.25] for _ in count],
      "kept": [[i != 1, i != 4] if i != 2 else [False, False] for i in count],
    }
    for z in range(layers)
  ]
  even = [[[1 / experts] * experts] * 2] * layers
  routing = {"step": STEPS[-1], "layers": [1, 3][:layers], "num_experts": experts, "top_k": 2}
  routing |= {"domains": [label, "code"], "domain_load_ZGE": even, "text": text}
  routing |= {"domain_separation_Z": [0.125, 0.25], "repeat_rate_Z": [0.3, 0.4]}
  routing |= {"repeat_random": 1 / experts, "repeat_any_Z": [0.5, 0.6], "repeat_any_random": 0.45}
  routing |= {"top_tokens_ZE": [[[[tokens[1], 0.5, 2.0]]] * experts] * layers}
  routing |= {"saturation": [{"step": 100, "overlap_Z": [0.5, 0.7]}]}
  write_json(path / "routing.json", routing)


def write_sweep(out, runs, **more):
  """Writes sweep.json for runs {(arm, seed): status}; a failed run has an error."""
  entries = [
    {
      "arm": arm,
      "seed": seed,
      "workdir": f"{arm}/seed{seed}",
      "status": status,
      "seconds": 1.0,
      "command": f"python train.py --workdir={arm}/seed{seed}",
      "evaluate": "python eval.py",
      "error": "error: loss is nan" if status == "failed" else "",
    }
    for (arm, seed), status in runs.items()
  ]
  sweep = {"question": "Do experts help?", "sweep": "configs/sweeps/help.py", "base": "base.py"}
  sweep |= {"target_arm": "dense", "published": "7.5x", "band": "1.2x to 2x", "runs": entries}
  arms = dict.fromkeys(arm for arm, _ in runs)
  sweep["arms"] = [{"name": arm, "overrides": {}, "notes": [f"note of {arm}"]} for arm in arms]
  write_json(out / "sweep.json", sweep | more)


FINISHED = {(arm, seed): "finished" for arm in LOSSES for seed in (0, 1)}


def sweep(out, statuses=FINISHED, **more):
  for (arm, seed), status in statuses.items():
    if status != "waiting":
      write_run(out / arm / f"seed{seed}", arm, seed, 0 if arm == "dense" else 4)
  write_sweep(out, statuses, **more)
  return out


def markup_sweep(out, markup):
  """Writes a sweep in which every text that comes from a run or from sweep.json is markup."""
  sweep(out)
  record = json.loads((out / "sweep.json").read_text())
  record["question"] = record["published"] = record["band"] = markup
  for entry in (*record["arms"], *record["runs"]):
    key = "name" if "name" in entry else "arm"
    entry[key] = entry[key].replace("moe", f"moe{markup}|`x`")
    entry["error"] = f"```\n{markup}"  # closes a fence of three
    entry["command"] = shlex.quote(markup)
  record["runs"][0]["status"] = "failed"
  record["runs"][1] |= {"status": "stopped", "error": ""}
  (out / "dense/seed1/log.txt").write_bytes(markup.encode("utf-8", "surrogatepass"))
  alarm = {"step": 7, "alarm": markup, "layer": 1, "message": markup}
  (out / "moe/seed1/alarms.jsonl").write_text(json.dumps(alarm) + "\n")
  write_json(out / "sweep.json", record)
  write_routing(out / "moe/seed0", 4, tokens=("a", markup, "<!--", "d", "e"), label=markup)
  return out


class Written(NamedTuple):
  """What page.compare() wrote of a sweep."""

  folder: pathlib.Path
  markdown: str
  html: str


def write_report(out) -> Written:
  page.compare(out)
  return Written(out, (out / "report.md").read_text(), (out / "report.html").read_text())


def row(text, arm):
  """Cells of the results table."""
  return next(
    line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith(f"| {arm} |")
  )
