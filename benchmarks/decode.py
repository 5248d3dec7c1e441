"""Times decoding against Hugging Face transformers' Mixtral, with equal weights and equal tokens.

Both are float32 processes that are pinned to the same CPU and work in turns. Both return their
tokens, which must agree. CPU-seconds, unlike wall-clock seconds, leave out the time that other
programs take from the CPU.
"""

import sys
import tempfile
from typing import Any, NamedTuple

import numpy as np

from benchmarks import results
from benchmarks.results import progress
from benchmarks.train import Command, Worker, has_torch
from moe_jax.errors import UserError

BATCHES = (1, 8, 32)


class Workload(NamedTuple):
  """The model of a comparison, and its target."""

  name: str
  sizes: dict[str, int]  # those that differ from workload.W
  speed: float  # the target of our speed / transformers' at batch 1; at larger batches it is 1


WORKLOADS = (
  Workload("13M", {}, 2.0),
  Workload("140M", dict(dim=512, layers=8, expert_dim=1024, vocab_size=32000), 1.3),
)


def peer_commands(python: str, compiled: bool, cpu: int, folder: str) -> list[Command]:
  """Returns the commands of the peers.

  Raises:
    UserError: `python` has no torch and transformers, so that there is nothing to compare with.
  """
  if not has_torch(python):
    raise UserError(
      f"{python} has no torch and transformers: pip install -e '.[hf]', or name "
      "a Python that has them with --peer_python"
    )
  base = [python, "-m", "benchmarks.peer_decode", f"--cpus={cpu}", f"--weights={folder}"]
  commands = [Command("peer", [*base, f"--experts={e}"]) for e in ("grouped_mm", "eager")]
  if compiled:
    commands.append(Command("peer", [*commands[0].arguments, "--compile"]))
  return commands


def run(
  *,
  rounds: int,
  steps: int,
  peer_python: str,
  peer_compile: bool,
  workloads: tuple[Workload, ...] = WORKLOADS,
  batches: tuple[int, ...] = BATCHES,
) -> dict[str, Any]:
  """Times a decoding step of every model, workload and batch size, and checks the targets.

  Raises:
    UserError: the models draw different tokens, or a worker fails.
  """
  cpu = results.usable_cpus()[-1]
  rows = []
  for workload in workloads:
    with tempfile.TemporaryDirectory() as folder:
      rows += _run(workload, rounds, steps, batches, cpu, (peer_python, peer_compile), folder)
  return {"cpu": cpu, "steps": steps, "rows": rows, "targets": _compare(rows, workloads)}


def _run(workload, rounds, steps, batches, cpu, peer, folder):
  ours = [sys.executable, "-m", "benchmarks.decode_worker", f"--weights={folder}"]
  ours += [f"--cpus={cpu}", f"--rows={max(batches)}"]
  ours += [f"--{name}={value}" for name, value in workload.sizes.items()]
  commands = peer_commands(*peer, cpu, folder)
  workers: list[Worker] = []
  try:
    for command in [Command("ours", ours), *commands]:
      workers.append(Worker(command))
      progress(f"{workload.name}: {workers[-1].ready['name']} is ready")
    rows = []
    for batch in batches:
      rows += _rows(workload, workers, batch, rounds, steps)
    return rows
  finally:
    for worker in workers:
      worker.close()


def _rows(workload, workers, batch, rounds, steps):
  line = f"decode {batch} {steps}"
  tokens = [worker.ask(line)["tokens"] for worker in workers]  # this also compiles
  for worker, worker_tokens in zip(workers, tokens, strict=True):
    if worker_tokens != tokens[0]:
      row, place = np.argwhere(np.array(worker_tokens) != np.array(tokens[0]))[0]
      raise UserError(
        f"{workload.name}, batch {batch}: {worker.ready['name']} draws another token than "
        f"{workers[0].ready['name']} in row {row}, at place {place} after the prompt"
      )
  answers = [[worker.ask(line) for worker in workers] for _ in range(rounds)]
  rows = []
  for number, worker in enumerate(workers):
    cpu_s = [answer[number]["cpu_s"] for answer in answers]
    ours = [answer[0]["cpu_s"] for answer in answers]
    rows.append(
      {
        "workload": workload.name,
        "parameters": worker.ready["parameters"],
        "batch": batch,
        "kind": worker.kind,
        "name": worker.ready["name"],
        "versions": worker.ready["versions"],
        "rounds_cpu_s": cpu_s,
        "cpu_s": float(np.median(cpu_s)),
        "tokens_per_cpu_s": batch / float(np.median(cpu_s)),
        "our_speed": float(np.median(np.divide(cpu_s, ours))),
      }
    )
  numbers = ", ".join(f"{r['name']} {1e3 * r['cpu_s']:.2f}" for r in rows)
  progress(f"{workload.name}, batch {batch}: {numbers} CPU-ms a step")
  return rows


def _compare(rows, workloads):
  """Returns targets of our speed over the fastest peer's, at every batch size."""
  targets = []
  for workload in workloads:
    peers = [r for r in rows if r["workload"] == workload.name and r["kind"] == "peer"]
    for batch in sorted({r["batch"] for r in peers}):
      best = min((r for r in peers if r["batch"] == batch), key=lambda r: r["our_speed"])
      what = f"{workload.name}, batch {batch}: our speed / {best['name']}"
      limit = workload.speed if batch == 1 else 1.3 if batch >= 32 else 1.0
      targets.append(results.target(what, best["our_speed"], limit, at_least=True))
  return targets


def text(result: dict[str, Any]) -> str:
  """Formats tables of all rows and of the targets."""
  header = ["decoding, one CPU", "batch", "model", "CPU-ms/step", "tokens/CPU-s",
            "our speed / its"]  # fmt: skip
  lines = [
    [
      r["workload"],
      str(r["batch"]),
      r["name"],
      f"{1e3 * r['cpu_s']:.2f}",
      f"{r['tokens_per_cpu_s']:,.0f}",
      f"{r['our_speed']:.2f}",
    ]
    for r in result["rows"]
  ]
  return results.table(header, lines) + "\n\n" + results.target_table(result["targets"])
