"""Times training steps on one CPU: our MoE and dense models, and Hugging Face transformers'.

Every model is a separate process, pinned to the same CPU; they work in turns. CPU-seconds, unlike
wall-clock seconds, leave out the time that other programs take from the CPU.
"""

import json
import subprocess
import sys
import tempfile
from typing import Any, NamedTuple

import numpy as np

from benchmarks import results
from benchmarks.results import progress
from benchmarks.workload import W
from moe_jax.config import UserError

_PEER_SPEED = 1.1  # our tokens per CPU-second / the best transformers Mixtral's
_METRICS_TIME = 1.02  # a step with all its metrics / one that reports only the loss
_DENSE_TIME = 1.15  # an MoE step's time / that of our dense model of the same active size


class Command(NamedTuple):
  """How to start a worker."""

  kind: str  # "ffn", "gather", "grouped", "bare", "peer mixtral", "peer dense"
  arguments: list[str]


class Worker:
  """A process that answers lines on its stdin: train_worker.py, decode_worker.py or a peer."""

  def __init__(self, command: Command):
    self.kind = command.kind
    self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the worker)
    self.process = subprocess.Popen(
      command.arguments,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=self.log,
      text=True,
      cwd=results.ROOT,
    )
    try:
      self.ready = self._answer()
    except BaseException:
      self.close()
      raise

  def ask(self, line: str) -> dict[str, Any]:
    """Sends a line and returns the answer; raises UserError if the process has ended."""
    self.process.stdin.write(line + "\n")
    self.process.stdin.flush()
    return self._answer()

  def _answer(self) -> dict[str, Any]:
    line = self.process.stdout.readline()
    if line:
      return json.loads(line)
    self.process.wait()
    self.log.seek(0)
    lines = self.log.read().strip().splitlines() or ["it printed nothing"]
    raise UserError(f"{self.kind} ended with code {self.process.returncode}: {lines[-1]}")

  def close(self) -> None:
    """Ends the process."""
    self.process.stdin.close()
    try:
      self.process.wait(timeout=10)
    except subprocess.TimeoutExpired:
      self.process.kill()
      self.process.wait()
    self.process.stdout.close()
    self.log.close()


def our_commands(remat: list[str], cpu: int, sizes: dict[str, int]) -> list[Command]:
  """Returns the commands of our models, each with each remat policy, and of one without metrics."""
  python = [sys.executable, "-m", "benchmarks.train_worker", f"--cpu={cpu}"]
  python += [f"--{name}={value}" for name, value in sizes.items()]
  models = [["--model=ffn"], ["--model=grouped"]]
  models += [["--model=gather", f"--capacity_factor={factor}"] for factor in (1.0, 1.25)]
  commands = [
    Command(model[0].removeprefix("--model="), [*python, *model, f"--remat={r}"])
    for model in models
    for r in remat
  ]
  bare = Command("bare", [*commands[-1].arguments, "--bare"])
  return [*commands, bare]


def has_torch(python: str) -> bool:
  """Returns whether a Python has torch and transformers."""
  test = "from importlib.util import find_spec as f; assert f('torch') and f('transformers')"
  return not subprocess.run([python, "-c", test], stderr=subprocess.DEVNULL).returncode


def peer_commands(python: str, compiled: bool, cpu: int, sizes: dict[str, int]) -> list[Command]:
  """Returns the commands of the peers; prints a line and returns [] if they cannot run."""
  if not has_torch(python):
    progress(f"no peers: {python} has no torch and transformers; see --peer_python")
    return []
  base = [python, "-m", "benchmarks.peer_train", "--worker", f"--cpu={cpu}"]
  base += [f"--{name}={value}" for name, value in sizes.items()]
  commands = [
    Command("peer mixtral", [*base, "--model=mixtral", "--experts=grouped_mm"]),
    Command("peer mixtral", [*base, "--model=mixtral", "--experts=eager"]),
    Command("peer dense", [*base, "--model=dense"]),
  ]
  if compiled:
    commands.append(Command("peer mixtral", [*commands[0].arguments, "--compile"]))
  return commands


def run(
  *,
  remat: list[str],
  rounds: int,
  steps: int,
  peer_python: str,
  peer_compile: bool,
  sizes: dict[str, int] = W,
) -> dict[str, Any]:
  """Times every model's training step and checks the targets.

  Args:
    remat: remat policies of our models.
    rounds: timed rounds, of which the median counts.
    steps: steps of each model in a round.
    peer_python: a Python with torch and transformers; without them there are no peers.
    peer_compile: whether to run the peer under torch.compile too.
    sizes: of the models, as in workload.W.
  """
  cpu = results.usable_cpus()[-1]
  commands = our_commands(remat, cpu, sizes)
  commands += peer_commands(peer_python, peer_compile, cpu, sizes)
  workers: list[Worker] = []
  try:
    for command in commands:
      try:
        workers.append(Worker(command))
      except UserError as error:
        if "peer" not in command.kind:
          raise
        progress(f"  left out: {error}")
      else:
        progress(f"  {workers[-1].ready['name']}: ready")
    answers: list[list[dict[str, Any]]] = [[] for _ in workers]
    for number in range(rounds):
      for worker, answer in zip(workers, answers, strict=True):
        answer.append(worker.ask(f"step {steps}"))
      progress(f"train: round {number + 1}/{rounds}")
  finally:
    for worker in workers:
      worker.close()
  tokens = sizes["batch_size"] * sizes["seq_len"]
  rows = [_row(w, a, tokens) for w, a in zip(workers, answers, strict=True)]
  result = {"workload": dict(sizes), "cpu": cpu, "rows": rows}
  result["targets"] = _compare(rows)
  return result


def _row(worker: Worker, answers: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
  cpu_s = [a["cpu_s"] for a in answers]
  row = {"kind": worker.kind, **worker.ready, "rounds_cpu_s": cpu_s}
  del row["ready"]
  row["cpu_s"] = float(np.median(cpu_s))
  row["wall_s"] = float(np.median([a["wall_s"] for a in answers]))
  row["tokens_per_cpu_s"] = tokens / row["cpu_s"]
  return row | {k: v for k, v in answers[-1].items() if k not in ("cpu_s", "wall_s")}


def _ratio(row: dict[str, Any], base: dict[str, Any]) -> float:
  return float(np.median(np.divide(row["rounds_cpu_s"], base["rounds_cpu_s"])))


def _fastest(rows: list[dict[str, Any]], kind: str) -> dict[str, Any] | None:
  return min((r for r in rows if r["kind"] == kind), key=lambda r: r["cpu_s"], default=None)


def _compare(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """Adds the ratios of time `vs_dense` and `vs_peer` to every row; returns the targets."""
  dense, peer = _fastest(rows, "ffn"), _fastest(rows, "peer mixtral")
  bare = _fastest(rows, "bare")
  whole = next(r for r in rows if r["name"] == bare["name"].replace(" without metrics", ""))
  targets = [results.target("step / step without metrics", _ratio(whole, bare), _METRICS_TIME)]
  for row in rows:
    row["vs_dense"] = _ratio(row, dense)
    row["vs_peer"] = _ratio(row, peer) if peer else None
    if row["kind"] in ("gather", "grouped"):
      what = f"{row['name']} time / our dense"
      targets.append(results.target(what, row["vs_dense"], _DENSE_TIME))
    if row["kind"] in ("gather", "grouped") and peer:
      what = f"{row['name']} speed / {peer['name']}"
      targets.append(results.target(what, 1 / row["vs_peer"], _PEER_SPEED, at_least=True))
  return targets


def text(result: dict[str, Any]) -> str:
  """Formats tables of all rows and of the targets."""
  lines = [
    [
      row["name"], f"{row['cpu_s']:.3f}", f"{row['wall_s']:.3f}", f"{row['tokens_per_cpu_s']:,.0f}",
      f"{row['vs_dense']:.2f}", f"{row['vs_peer']:.2f}" if row["vs_peer"] else "-",
      f"{row['active_parameters'] / 1e6:.2f}M of {row['parameters'] / 1e6:.2f}M",
      f"{100 * row['drop_fraction']:.1f}%" if "drop_fraction" in row else "-", f"{row['loss']:.3f}",
    ]
    for row in result["rows"]
  ]  # fmt: skip
  header = ["training step, one CPU", "CPU-s", "s", "tokens/CPU-s", "/ dense", "/ peer", "active",
            "dropped", "loss"]  # fmt: skip
  return results.table(header, lines) + "\n\n" + results.target_table(result["targets"])
