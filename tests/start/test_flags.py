"""Flags of a chip: which a run sets, what the user has set stays, and compilers know them."""

import dataclasses
import importlib.util
import itertools
import json
import os

import jax
import pytest

from moe_jax.config import Config, Dispatch, Exchange, Mesh, Model, MoE, override
from moe_jax.config.fields import spelled
from moe_jax.start import flags
from tests.support.scripts import ONE_DEVICE, python
from tests.support.toys import ROOT

TPUS = ["v4", "v5e", "v5p", "v6e", "tpu7x"]
CHIPS = [*TPUS, "NVIDIA A100-SXM4-80GB", "h200", "NVIDIA GB200"]
SPARSE = Config(model=Model(moe=MoE(num_experts=8)))
SPLIT = dataclasses.replace(SPARSE, mesh=Mesh(fsdp=2, expert=4))
DENSE = Config(model=Model(moe=MoE(num_experts=0)))
RAGGED = override(
  SPLIT, {"model.moe.dispatch": Dispatch.GROUPED, "model.moe.exchange": Exchange.RAGGED}
)
VMEM, LEVEL = "xla_tpu_scoped_vmem_limit_kib", "jax_optimization_level"
EINSUM = "xla_jf_spmd_threshold_for_windowed_einsum_mib"
DEADMAN = "xla_gpu_execution_terminate_timeout"
SCHEDULER = "xla_gpu_enable_latency_hiding_scheduler"


def values(chip, config=SPLIT, slices=1):
  return {flag.name: flag.value for flag in flags.flags_of(chip, config, slices)}


def all_flags():
  cases = itertools.product(CHIPS, (SPARSE, SPLIT, DENSE, RAGGED), (1, 2))
  return {flag.name: flag for case in cases for flag in flags.flags_of(*case)}


def test_a_chip_and_a_run_say_which_flags():
  assert values("v6e")[VMEM] == 81920 and values("v6e", DENSE)[VMEM] == 98304
  assert values("v5e")["xla_tpu_overlap_compute_collective_tc"] is True
  assert not any("collective" in name for chip in ("v5p", "v6e") for name in values(chip))
  assert values("v6e").keys() == {VMEM, EINSUM}
  assert values("v6e", SPARSE).keys() == {VMEM}  # whole weights are not gathered
  assert values("v4") == {}
  assert "xla_tpu_data_parallel_opt_different_sized_ops" in values("v4", slices=2)
  assert [v for name, v in values("tpu7x").items() if "offload" in name] == [False, False]
  assert "CUDA_DEVICE_MAX_CONNECTIONS" in values("h200")
  assert "CUDA_DEVICE_MAX_CONNECTIONS" not in values("NVIDIA GB200")
  assert "xla_gpu_all_gather_combine_threshold_bytes" in values("h200")
  assert "xla_gpu_all_gather_combine_threshold_bytes" not in values("h200", SPARSE)
  minute, never = (override(SPLIT, {"train.step_timeout": t}) for t in (60, 0))
  assert values("h200", minute)[DEADMAN] == "60s" and DEADMAN not in values("h200", never)


@pytest.mark.parametrize(
  ("chip", "target"),
  [
    ("NVIDIA H100 80GB HBM3", "hopper"),
    ("NVIDIA GH200 480GB", "hopper"),
    ("h200", "hopper"),
    ("NVIDIA B200", "blackwell"),
    ("gb200", "blackwell"),
    ("NVIDIA A100-SXM4-80GB", "ampere"),
    ("v5p", "v5p"),
    ("NVIDIA RTX A6000", "NVIDIA RTX A6000"),
    ("NVIDIA L40S", "NVIDIA L40S"),
  ],
)
def test_a_target_of_a_chip(chip, target):
  assert flags.target_of(chip) == target
  assert bool(values(chip)) == (target in ("ampere", "hopper", "blackwell", "v5p"))


@pytest.mark.parametrize("chip", CHIPS[len(TPUS) :])
def test_the_ragged_exchange_has_no_scheduler_that_breaks_it(chip):
  """What stands for the scheduler is left out, and it is off where it is XLA's default."""
  assert values(chip)[LEVEL] == "O1" and SCHEDULER not in values(chip)
  assert LEVEL not in values(chip, RAGGED) and values(chip, RAGGED)[SCHEDULER] is False
  one = override(RAGGED, {"mesh.expert": 1})  # exchanges nothing
  assert values(chip, one)[LEVEL] == "O1" and SCHEDULER not in values(chip, one)


@pytest.mark.parametrize("chip", CHIPS)
def test_a_run_has_each_flag_once_with_reason_and_source(chip):
  for config, slices in itertools.product((SPARSE, SPLIT, DENSE, RAGGED), (1, 2)):
    found = flags.flags_of(chip, config, slices)
    assert len({flag.name for flag in found}) == len(found)
    assert all(flag.reason and flag.source for flag in found)


def test_every_row_of_the_table_is_for_some_run():
  used = {name for row in flags.TABLE for name in row["set"]}
  assert used == all_flags().keys()


def test_options_of_a_compilation():
  """Not what a process reads when it starts."""
  options = flags.compiler_options(list(all_flags().values()))
  assert options["optimization_level"] == "O1" and options[SCHEDULER] is False
  names = {name for name in all_flags() if not name.startswith(("megascale", "CUDA", "XLA_"))}
  assert options.keys() == {name.removeprefix("jax_") for name in names}


SETS = """
import json, os, sys
import jax
from jax._src import xla_bridge
from moe_jax.config import Config, Mesh, Model, MoE
from moe_jax.start import flags
if sys.argv[2:]:
  flags.TRIED = ((0, 1), (0, 2))
flags.set_flags(Config(model=Model(moe=MoE(num_experts=8)), mesh=Mesh(fsdp=2)), sys.argv[1])
flags.set_flags(Config(), "v4")
assert not xla_bridge.backends_are_initialized()
print(json.dumps([dict(os.environ), jax.config.values["jax_optimization_level"], flags.lines()]))
"""


def set_in_a_process(chip, *arguments, **environment):
  names = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_OPTIMIZATION_LEVEL", "XLA_CLIENT_MEM_FRACTION")
  env = {name: value for name, value in os.environ.items() if name not in names} | environment
  done = python("-c", SETS, chip, *arguments, env=env)
  assert not done.returncode, done.stderr
  return json.loads(done.stdout)


def test_flags_are_set_before_a_backend_starts():
  env, level, lines = set_in_a_process("v6e")
  assert f"--{VMEM}=81920" in env["LIBTPU_INIT_ARGS"].split()
  assert f"--{EINSUM}=1000000" in env["LIBTPU_INIT_ARGS"].split()
  assert "XLA_FLAGS" not in env and level == "UNKNOWN"
  assert lines[0] == "platform flags     v6e: --platform_flags=off sets none"
  assert any(f"{VMEM}=81920: VMEM of the" in x and "(MaxText " in x for x in lines)
  env, level, lines = set_in_a_process("NVIDIA H200")
  assert env["XLA_CLIENT_MEM_FRACTION"] == "0.9" and env["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
  assert "--xla_gpu_all_gather_combine_threshold_bytes=8589934592" in env["XLA_FLAGS"].split()
  assert level == "O1" and f"  {LEVEL}=O1: stands for" in "\n".join(lines)


def test_what_the_user_has_set_stays():
  """In a variable of many flags, as a variable, by an old name, and as one of jax."""
  mine = {"LIBTPU_INIT_ARGS": f"--{VMEM}=1000", "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=true"}
  env, _, lines = set_in_a_process("v6e", **mine)
  assert [x for x in env["LIBTPU_INIT_ARGS"].split() if VMEM in x] == [f"--{VMEM}=1000"]
  assert f"--{EINSUM}=1000000" in env["LIBTPU_INIT_ARGS"].split()
  assert env["XLA_FLAGS"] == mine["XLA_FLAGS"]
  assert f"  {VMEM}, as the user set it: " in "\n".join(lines)
  own = "--xla_gpu_all_gather_combine_threshold_bytes=7"
  mine = {"JAX_OPTIMIZATION_LEVEL": "O2", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}
  env, level, _ = set_in_a_process("h200", XLA_FLAGS=own, CUDA_DEVICE_MAX_CONNECTIONS="8", **mine)
  assert level == "O2" and env["CUDA_DEVICE_MAX_CONNECTIONS"] == "8"
  assert "XLA_CLIENT_MEM_FRACTION" not in env  # which jaxlib would refuse beside the old name
  added = "--xla_gpu_reduce_scatter_combine_threshold_bytes=8589934592"
  assert env["XLA_FLAGS"].split() == [own, added, f"--{DEADMAN}=1800s"]


@pytest.mark.parametrize(
  ("chip", "environment", "arguments", "why"),
  [
    ("v6e", {"MOE_JAX_PLATFORM_FLAGS": "off"}, (), "none, by --platform_flags=off"),
    ("v6e", {}, ("later",), f"none, because none has been tried with jax {jax.__version__}"),
    ("NVIDIA L40S", {}, (), "none, because flags.toml has none for it"),
  ],
)
def test_where_no_flag_is_set_a_line_says_why(chip, environment, arguments, why):
  env, level, lines = set_in_a_process(chip, *arguments, **environment)
  assert "LIBTPU_INIT_ARGS" not in env and "XLA_FLAGS" not in env and level == "UNKNOWN"
  assert lines == [f"platform flags     {chip}: {why}"]


def test_a_cpu_has_no_flags(whole_run):
  """A real run prints and records none; the environment is as it was."""
  assert "platform flags" not in whole_run.output
  assert not (whole_run.workdir / "flags.json").exists()
  code = (
    "import os, jax; from moe_jax.config import Config; from moe_jax.start import startup, flags;"
    "mine = ('XLA_FLAGS', 'LIBTPU_INIT_ARGS', 'XLA_CLIENT_MEM_FRACTION');"
    "before = [os.environ.get(n) for n in mine]; startup.start(Config());"
    "assert [os.environ.get(n) for n in mine] == before and not flags.HERE, flags.HERE;"
    "assert jax.config.values['jax_optimization_level'] == 'UNKNOWN'"
  )
  done = python("-c", code)
  assert not done.returncode, done.stderr


TRAINS = """
import runpy, sys
from moe_jax.start import flags
flags.chip_here = lambda: "v6e"
runpy.run_path("train.py", run_name="__main__")
"""


def test_a_run_prints_and_records_its_flags(tmp_path, cache):
  """libtpu's variable is nothing to a CPU, so this one trains."""
  workdir = tmp_path / "run"
  command = ["--config=configs/debug.py", f"--workdir={workdir}", f"--cache_dir={cache}"]
  command.append("--config.optimizer.warmup_steps=0")
  done = python("-c", TRAINS, *command, "--config.train.steps=1")
  assert not done.returncode, done.stderr
  assert f"\n  {VMEM}=81920: VMEM of" in done.stdout.partition("\nattention ")[0]
  record = json.loads((workdir / "flags.json").read_text())
  assert record["chip"] == "v6e" and record["flags"][0] == {
    "name": VMEM,
    "value": 81920,
    "reason": "VMEM of the running operation, against that of prefetching the next one",
    "source": "MaxText xla_flags_library.py",
    "place": "LIBTPU_INIT_ARGS",
    "set_by": "moe_jax",
  }
  done = python("-c", TRAINS, *command, "--config.train.steps=2", "--platform_flags=off")
  assert "platform flags     v6e: none, by --platform_flags=off\nattention" in done.stdout
  assert json.loads((workdir / "flags.json").read_text())["flags"] == []
  done = python("train.py", *command, "--config.train.steps=3")
  assert not done.returncode and "platform flags" not in done.stdout
  assert json.loads((workdir / "flags.json").read_text()) == {}


def test_the_page_has_every_row():
  page = (ROOT / "docs/accelerators.md").read_text()
  for row in flags.TABLE:
    names = ", ".join(f"`{name}={spelled(value)}`" for name, value in row["set"].items())
    cells = ", ".join(row["targets"]), row.get("when", ""), names, row["reason"], row["source"]
    assert f"| {' | '.join(cells)} |".replace("|  |", "| |") in page


# The compilers know the names.


def in_variable(place, found=None):
  found = [flag for flag in found or all_flags().values() if flag.place == place]
  assert len(found) > 1
  return {place: " ".join(f"--{flag.name}={spelled(flag.value)}" for flag in found)}


def test_xla_knows_its_flags():
  """jaxlib's own parser, which has those of GPUs too, and ends the process at others."""
  env = ONE_DEVICE | in_variable("XLA_FLAGS")
  assert not python("-c", "import jax; jax.devices()", env=env).returncode
  env["XLA_FLAGS"] += " --xla_gpu_is_no_flag=1"
  assert "xla_gpu_is_no_flag" in python("-c", "import jax; jax.devices()", env=env).stderr


WORKER = ROOT / "tests/support/flags_worker.py"


def compiled_for(chip, env, *, fails=False):
  env = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": "", **env}
  done = python(WORKER, chip, env["XLA_FLAGS"], env=env)
  assert bool(done.returncode) == fails, done.stderr[-2000:]
  return done.stderr if fails else json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize("chip", TPUS)
def test_libtpu_knows_the_flags_of_a_chip(chip):
  """When it starts, and as options of one compilation."""
  env = in_variable("LIBTPU_INIT_ARGS", flags.flags_of(chip, SPLIT, 2))
  assert compiled_for(chip, env)["refused"] == "is_no_flag"
  assert compiled_for(chip, {})["refused"] == "is_no_flag"
  env["LIBTPU_INIT_ARGS"] += " --is_no_flag=1"
  assert "is_no_flag" in compiled_for(chip, env, fails=True)


@pytest.mark.slow
@pytest.mark.skipif(
  importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs jax's CUDA 13 plugin"
)
def test_the_cuda_plugin_knows_its_flags():
  """And hides no latency of a ragged exchange under the flags of one; under O1 it would."""
  found = compiled_for("h200", {})
  assert found == {"split": True, "ragged": False, "refused": "is_no_flag"}
  found = compiled_for("h200", in_variable("XLA_FLAGS"))  # where the scheduler is off for all
  assert found == {"split": False, "ragged": False, "refused": "is_no_flag"}
