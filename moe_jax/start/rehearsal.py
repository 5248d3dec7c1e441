"""The rehearsal of a run on several hosts: processes of this machine, at toy size."""

import argparse
import functools
import math
import os
import pathlib
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, NoReturn

import psutil

from moe_jax.config import Config, override
from moe_jax.config.fields import flatten, spelled
from moe_jax.config.run import changes
from moe_jax.errors import UserError
from moe_jax.storage import workdir as workdir_lib

_HEARTBEAT = 10  # seconds until a process that is killed counts as lost
_LIMIT = 600  # seconds until something that is not done does not work
# They halve the time of compilation.
_FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
# Words of kernels and exchanges that are not for CPUs; all_to_all has the buffers of ragged.
_KERNELS = ("model.attention", "model.moe.grouped_matmul", "model.moe.exchange")
_HERE = dict.fromkeys(["cudnn", "splash", "mosaic", "mosaic_tpu_v2", "triton"], "auto")
_HERE["ragged"] = "all_to_all"
# Flags that need what is not here: the job's checkpoints, and its steps.
_LEFT_OUT = ("--init_", "--placement", "--resume_step", "--replay", "--profile", "--tracker")


class Failed(UserError):
  """Something that was rehearsed does not work."""

  code = 1


def toy(config: Config, processes: int) -> Config:
  """Returns the config at toy size, with every part that depends on several processes.

  Each axis of the mesh is cut to its smallest factor above 1, so that it still divides what is not
  cut. `data`, the outermost axis, makes the devices a multiple of the processes, each of which has
  whole `tensor` groups.
  """
  model, moe, mesh, length = config.model, config.model.moe, config.mesh, config.data.seq_len
  data, fsdp, expert, context, tensor = (
    next((factor for factor in range(2, size + 1) if not size % factor), 1)
    for size in (mesh.data, mesh.fsdp, mesh.expert, mesh.context, mesh.tensor)
  )
  data *= processes // math.gcd(processes, data * fsdp * expert * context)
  first, several = min(moe.first_dense, 1), moe.group_size > length
  layers = first + 2 * math.lcm(moe.every, model.global_every or 1)
  seq_len, accumulation = 64 * context, min(config.train.accumulation, 2)
  group = {0: 0, length: seq_len}.get(moe.group_size, 2 * seq_len if several else 32)
  chunks = min(moe.exchange_chunks, 2)
  rows = chunks * (1 + several) * data * fsdp * expert
  fields: dict[str, Any] = {
    "mesh.data": data, "mesh.fsdp": fsdp, "mesh.expert": expert, "mesh.context": context,
    "mesh.tensor": tensor, "model.dim": 32 * fsdp, "model.vocab_size": 264 * tensor,
    "model.num_heads": 4 * tensor, "model.ffn_dim": 32 * tensor,
    "model.moe.expert_dim": 16 * tensor, "model.moe.shared_dim": min(moe.shared_dim, 16 * tensor),
    "model.window": min(model.window, 16), "model.loss_chunk": min(model.loss_chunk, 32),
    "model.moe.group_size": group, "model.moe.exchange_chunks": chunks,
    "data.name": "python_stdlib", "data.path": "", "data.mixture": "", "data.tokenizer": "bytes",
    "data.seq_len": seq_len, "data.batch_size": rows * accumulation,
    "data.train_split": "train", "data.validation_split": "validation", "data.test_split": "test",
    "train.accumulation": accumulation, "train.steps": 1000, "train.log_every": 1,
    "train.eval_every": 5, "train.checkpoint_every": 5, "eval.batches": 2,
    "eval.final_batches": 2, "eval.batch_size": rows if config.eval.batch_size else 0,
    "optimizer.warmup_steps": 2, "health.on_alarm": "warn",
    "optimizer.schedule": "constant",  # one program for any number of steps
  }  # fmt: skip
  heads = 4 if model.num_kv_heads == model.num_heads else 2
  fields["model.num_kv_heads"] = heads * tensor if model.num_kv_heads > 1 else 1
  if layers < model.num_layers:
    fields |= {"model.num_layers": layers, "model.moe.first_dense": first}
    fields["model.moe.dense_layers"] = str(first + moe.every - 1) if moe.dense_layers else ""
  if (experts := max(4, 2 * moe.expert_groups) * expert) < moe.num_experts:
    fields["model.moe.num_experts"] = experts
    fields["model.moe.top_k"] = min(moe.top_k, 2 * moe.top_groups)
  for latent in ("kv_dim", "query_dim"):
    fields[f"model.latent.{latent}"] = min(getattr(model.latent, latent), 32 * fsdp)
  if model.delta.value_heads:
    heads = 2 if model.delta.value_heads == model.delta.key_heads else 4
    fields |= {"model.delta.key_heads": 2, "model.delta.value_heads": heads}
  words = flatten(config)
  fields |= {name: _HERE[words[name]] for name in _KERNELS if words[name] in _HERE}
  return override(config, fields)


def rehearse(config: Config, args: argparse.Namespace) -> None:
  """Rehearses a job at toy size, and prints what works and what could not be rehearsed.

  Args:
    config: of the job.
    args: its command line. Nothing is read or written in its workdir.

  Raises:
    Failed: something does not work; the ends of the processes' logs are printed before.
  """
  for number in (signal.SIGTERM, signal.SIGHUP):  # they end the processes too, as Ctrl-C does
    signal.signal(number, lambda number, _: sys.exit(128 + number))
  small, old = toy(config, args.rehearse), flatten(config)
  with tempfile.TemporaryDirectory(prefix="moe_jax-rehearsal-") as folder:
    try:
      _rehearse(small, args.rehearse, pathlib.Path(folder))
    finally:
      children = psutil.Process().children()
      for child in children:
        child.kill()
      psutil.wait_procs(children)
  changed = [f"{n} {spelled(old[n])} -> {spelled(v)}" for n, v in changes(config, small).items()]
  print(
    "not rehearsed:",
    "memory, time and kernels of the true sizes: python -m moe_jax.compile --topology=CHIPS "
    + shlex.join([f"--config={args.config[0]}", *_words("--config.")]),
    "the flags of the chips, the network between hosts, containers",
    f"the file system of --workdir={args.workdir}, which every host has to see",
    f"the text, data.{'mixture' if config.data.mixture else 'name'}="
    f"{config.data.mixture or config.data.name} and data.tokenizer={config.data.tokenizer}",
    *_words(_LEFT_OUT),
    "at toy size: " + ", ".join(changed),
    sep="\n  ",
  )


def _words(beginning: str | tuple[str, ...]) -> list[str]:
  return [word for word in sys.argv[1:] if word.startswith(beginning)]


def _rehearse(small: Config, count: int, path: pathlib.Path) -> None:
  begin, run, mesh, script = time.monotonic(), path / "run", small.mesh, pathlib.Path(sys.argv[0])
  workdir_lib.make(path / "toy")
  workdir_lib.write_config(path / "toy", small)  # as of a run, which --config takes
  start = functools.partial(_Processes, path, count, mesh.devices // count)
  train = [str(script), f"--config={path / 'toy'}", f"--workdir={run}"]
  axes = " x ".join(f"{axis} {size}" for axis, size in flatten(mesh).items() if size > 1)

  def say(text: str) -> None:
    print(f"{time.monotonic() - begin:6.1f} s  {text}", flush=True)

  now = start(train)
  now.until("meet", rf"^device +{mesh.devices} x")
  say(f"{count} processes meet and share the mesh {axes}")
  loss = now.until("train and evaluate", r"^(step +\d+)  validation loss [\d.]+")[0]
  now.wait("save", lambda: workdir_lib.saved_steps(run))
  say(f"they train, log, evaluate and save: {' '.join(loss.split())}")
  now.processes[-1].terminate()
  now.end("save and stop at SIGTERM", 0)
  saved = now.until("save and stop at SIGTERM", r"saved step (\d+); the same command")[1]
  say(f"SIGTERM to process {count - 1}: all save step {saved} and end with 0")
  now = start(train)
  now.until(f"resume at step {saved}", rf"^resuming .* at step {saved}\n[\s\S]*^step +\d+/")
  say(f"the same command goes on from step {saved}")
  now.processes[-1].kill()
  lost = time.monotonic()
  now.end("end when one is killed", -signal.SIGKILL, -signal.SIGABRT)
  say(f"SIGKILL to process {count - 1}: the others end {time.monotonic() - lost:.0f} s later")
  last = int(re.findall(r"^step +(\d+)/", now.log(0), re.M)[-1]) + 5
  now = start([*train, f"--config.train.steps={last}"])
  now.end("go on to the end", 0)
  at = now.until("resume", r"^resuming .* at (step \d+)")[1]
  now.wait("save the last step", lambda: last in workdir_lib.saved_steps(run))
  say(f"the same command goes on from {at} to the end, step {last}")
  now = start([str(script.with_name("eval.py")), f"--workdir={run}"])
  now.end("run eval.py", 0)
  result = workdir_lib.read_object(run / workdir_lib.EVAL)
  say(f"eval.py --multihost reads step {result['step']}: loss {result['loss']:.4f}")


class _Processes:
  """The processes of a command, as of so many hosts."""

  def __init__(self, path: pathlib.Path, count: int, devices: int, command: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
      address = f"127.0.0.1:{free.getsockname()[1]}"
    many = f"--xla_force_host_platform_device_count={devices}"
    own = {
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS} {many}",
      "JAX_COORDINATOR_ADDRESS": address,
      "JAX_COORDINATOR_BIND_ADDRESS": address,
      "JAX_NUM_PROCESSES": str(count),
    }
    more = [f"--cache_dir={path / 'cache'}", "--multihost", f"--heartbeat_timeout={_HEARTBEAT}"]
    self.logs = [path / f"{index}.log" for index in range(count)]
    self.processes: list[subprocess.Popen[bytes]] = []
    for index, log in enumerate(self.logs):
      env = os.environ | own | {"JAX_PROCESS_ID": str(index)}
      with log.open("w") as file:
        words = [sys.executable, *command, *more]
        self.processes.append(
          subprocess.Popen(words, env=env, stdout=file, stderr=subprocess.STDOUT)
        )

  def log(self, index: int) -> str:
    return self.logs[index].read_text(errors="replace")

  def until(self, what: str, pattern: str) -> re.Match[str]:
    """Waits for what process 0 prints, for all of them, and returns it."""
    return self.wait(what, lambda: re.search(pattern, self.log(0), re.M))

  def wait(self, what: str, ready: Callable[[], Any]) -> Any:
    """Waits until something is true, and returns it."""
    limit = time.monotonic() + _LIMIT
    while True:
      ended = any(process.poll() is not None for process in self.processes)
      if found := ready():
        return found
      if ended or time.monotonic() > limit:
        self.fail(what)
      time.sleep(0.1)

  def end(self, what: str, *codes: int) -> None:
    """Waits until all processes have ended, with one of these codes."""
    psutil.wait_procs(self.processes, _LIMIT)
    if not set(codes).issuperset(process.poll() for process in self.processes):
      self.fail(what)

  def fail(self, what: str) -> NoReturn:
    """Prints the errors in each log, or its end, and raises Failed."""
    psutil.wait_procs(self.processes, 2 * _HEARTBEAT)  # the others may say more
    for index, process in enumerate(self.processes):
      code, lines = process.poll(), self.log(index).splitlines()
      print(f"process {index} " + ("still runs:" if code is None else f"ended with {code}:"))
      errors = [line for line in lines if line.startswith("error: ")] or lines[-8:]
      print(*(f"  {line[:300]}" for line in errors), sep="\n", flush=True)
    raise Failed(f"--rehearse={len(self.processes)}: the processes do not {what}")
