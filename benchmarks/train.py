"""Times training steps on a CPU: our MoE and dense models, and Hugging Face transformers'.

Every model is a separate process, pinned to the same CPUs; they work in turns. On one CPU the time
of a step is its CPU-seconds, which leave out the time that other programs take from the CPU. On
several it is wall-clock time, because a thread that waits for another uses its CPU, too.
"""

import json
import subprocess
import sys
import tempfile
from typing import Any, NamedTuple

import numpy as np

from benchmarks import results
from benchmarks.results import progress
from benchmarks.workload import LARGE, W
from moe_jax.errors import UserError

# {our model: its speed / the faster of transformers' eager and grouped_mm, or transformers' dense},
# for the smaller workload and the larger one.
_PEER_SPEED = {
  "small": {"moe_jax ffn": 1.0, "moe_jax gather 1": 1.0, "moe_jax grouped": 0.95},
  "large": {"moe_jax ffn": 0.95, "moe_jax gather 1": 0.95, "moe_jax grouped": 0.95},
}
_METRICS_TIME = 1.02  # a step with all its metrics / one that reports only the loss
_DENSE_TIME = 1.15  # an MoE step's time / that of our dense model of the same active size
WORKLOADS = {"small": W, "large": LARGE}


class Command(NamedTuple):
  """How to start a worker."""

  kind: str  # "ffn", "gather", "grouped", "bare", "peer mixtral", "peer dense", "peer compiled"
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


def our_commands(remat: list[str], cpus: str, sizes: dict[str, int]) -> list[Command]:
  """Returns the commands of our models, each with each remat policy, and of one without metrics."""
  python = [sys.executable, "-m", "benchmarks.train_worker", f"--cpus={cpus}"]
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


def peer_commands(python: str, compiled: bool, cpus: str, sizes: dict[str, int]) -> list[Command]:
  """Returns the commands of the peers; prints a line and returns [] if they cannot run."""
  if not has_torch(python):
    progress(f"no peers: {python} has no torch and transformers; see --peer_python")
    return []
  base = [python, "-m", "benchmarks.peer_train", "--worker", f"--cpus={cpus}"]
  base += [f"--{name}={value}" for name, value in sizes.items()]
  commands = [
    Command("peer mixtral", [*base, "--model=mixtral", "--experts=grouped_mm"]),
    Command("peer mixtral", [*base, "--model=mixtral", "--experts=eager"]),
    Command("peer dense", [*base, "--model=dense"]),
  ]
  if compiled:
    compiling = [commands[0], commands[2]]
    commands += [Command("peer compiled", [*c.arguments, "--compile"]) for c in compiling]
  return commands


def run(
  *,
  remat: list[str],
  rounds: int,
  steps: int,
  peer_python: str,
  peer_compile: bool,
  workload: str = "small",
  threads: int = 1,
) -> dict[str, Any]:
  """Times every model's training step and checks the targets.

  Args:
    remat: remat policies of our models.
    rounds: timed rounds, of which the median counts.
    steps: steps of each model in a round.
    peer_python: a Python with torch and transformers; without them there are no peers.
    peer_compile: whether to run the peer under torch.compile too.
    workload: of WORKLOADS.
    threads: the number of CPUs.

  Raises:
    UserError: there is no such workload, or there are fewer CPUs.
  """
  if workload not in WORKLOADS:
    raise UserError(f"--workload={workload}: it is one of {', '.join(WORKLOADS)}")
  usable, sizes = results.usable_cpus(), WORKLOADS[workload]
  if not 1 <= threads <= len(usable):
    raise UserError(f"--threads={threads}: this process may use {len(usable)} CPUs")
  cpus = ",".join(map(str, usable[-threads:]))
  commands = our_commands(remat, cpus, sizes)
  commands += peer_commands(peer_python, peer_compile, cpus, sizes)
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
  rows = [_row(w, a, tokens, threads) for w, a in zip(workers, answers, strict=True)]
  result = {"workload": dict(sizes), "threads": threads, "rows": rows}
  result["targets"] = _compare(rows, workload)
  if (workload, threads) != ("small", 1):
    for aim in result["targets"]:
      aim["what"] = f"{workload}, threads {threads}: {aim['what']}"
  return result


def _row(worker: Worker, answers: list[dict[str, Any]], tokens: int, threads: int):
  times = {name: [a.pop(name) for a in answers] for name in ("cpu_s", "wall_s")}
  row = {"kind": worker.kind, **worker.ready, **answers[-1]}
  del row["ready"]
  row |= {name: float(np.median(values)) for name, values in times.items()}
  row["rounds_s"] = times["cpu_s" if threads == 1 else "wall_s"]
  row["tokens_per_s"] = tokens / float(np.median(row["rounds_s"]))
  return row


def _ratio(row: dict[str, Any], base: dict[str, Any]) -> float:
  return float(np.median(np.divide(row["rounds_s"], base["rounds_s"])))


def _fastest(rows: list[dict[str, Any]], kind: str) -> dict[str, Any] | None:
  rows = [r for r in rows if r["kind"] == kind]
  return min(rows, key=lambda r: np.median(r["rounds_s"]), default=None)


def _compare(rows: list[dict[str, Any]], workload: str) -> list[dict[str, Any]]:
  """Adds the ratios of time `vs_dense` and `vs_peer` to every row; returns the targets.

  The peer of a dense model is transformers' dense one.
  """
  dense, bare = _fastest(rows, "ffn"), _fastest(rows, "bare")
  peers = {"ffn": _fastest(rows, "peer dense")}
  whole = next(r for r in rows if r["name"] == bare["name"].replace(" without metrics", ""))
  targets = [results.target("step / step without metrics", _ratio(whole, bare), _METRICS_TIME)]
  for row in rows:
    peer = peers.get(row["kind"], _fastest(rows, "peer mixtral"))
    row["vs_dense"] = _ratio(row, dense)
    row["vs_peer"] = _ratio(row, peer) if peer else None
    if row["kind"] in ("gather", "grouped"):
      what = f"{row['name']} time / our dense"
      targets.append(results.target(what, row["vs_dense"], _DENSE_TIME))
    aim = next((a for m, a in _PEER_SPEED[workload].items() if row["name"].startswith(f"{m} ")), 0)
    if row["kind"] != "bare" and peer and aim:
      what = f"{row['name']} speed / {peer['name']}"
      targets.append(results.target(what, 1 / row["vs_peer"], aim, at_least=True))
  return targets


def text(result: dict[str, Any]) -> str:
  """Formats tables of all rows and of the targets."""
  lines = [
    [
      row["name"],
      f"{row['cpu_s']:.3f}",
      f"{row['wall_s']:.3f}",
      f"{row['tokens_per_s']:,.0f}",
      f"{row['vs_dense']:.2f}",
      f"{row['vs_peer']:.2f}" if row["vs_peer"] else "-",
      f"{row['active_parameters'] / 1e6:.2f}M of {row['parameters'] / 1e6:.2f}M",
      f"{100 * row['drop_fraction']:.1f}%" if "drop_fraction" in row else "-",
      f"{row['loss']:.3f}",
    ]
    for row in result["rows"]
  ]
  per = "CPU-s" if result["threads"] == 1 else "s"
  header = ["training step", "CPU-s", "s", f"tokens/{per}", "/ dense", "/ peer", "active",
            "dropped", "loss"]  # fmt: skip
  return results.table(header, lines) + "\n\n" + results.target_table(result["targets"])
