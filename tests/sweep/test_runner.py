"""The language, the command lines, and the runner with made-up runs and with real ones."""

import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
from absl import flags
from ml_collections import config_flags

from moe_jax import command_line, report
from moe_jax import config as config_lib
from moe_jax.config import UserError
from moe_jax.sweep import arm, match, product, runner, slots, zipped
from moe_jax.sweep import plan as plan_lib
from tests.support.toys import ROOT

SWEEPS = [p.stem for p in (ROOT / "configs/sweeps").glob("*.py") if "get_sweep" in p.read_text()]


def write_sweep(folder, arms, **more):
  fields = "".join(f", {name}={value!r}" for name, value in more.items())
  text = f"""
    '''Is it so?

    Why it could be.
    '''
    from moe_jax.sweep import Sweep, arm, match, product, zipped


    def get_sweep():
      return Sweep(base="configs/debug.py", arms={arms}{fields})
  """
  path = folder / "sweep_file.py"
  path.write_text(textwrap.dedent(text).lstrip())
  return str(path)


def make(path, out="runs/x", *, arms=(), seeds=(), overrides=None, measured=None):
  return plan_lib.make(
    path,
    pathlib.Path(out),
    arms=arms,
    seeds=seeds,
    overrides=overrides or {},
    measured=measured or {},
  )


TWO = "[arm('base'), arm('none', {'loss.load_balance': 0.0})]"


def test_product_and_zip():
  first = [arm("a", {"train.steps": 1}), arm("b", {"train.steps": 2}, notes="two")]
  second = [arm("x", {"loss.z": 0.1}), arm("y", match("dense", by="total_params"), notes="why")]
  both = product(first, second)
  assert [a.name for a in both] == ["a-x", "a-y", "b-x", "b-y"]
  assert both[2].fields == {"train.steps": 2, "loss.z": 0.1} and both[2].notes == ("two",)
  assert both[3].transforms == second[1].transforms and both[3].notes == ("two", "why")
  assert [a.name for a in zipped(first, second)] == ["a-x", "b-y"]
  assert [a.name for a in zipped(first, second) + first] == ["a-x", "b-y", "a", "b"]


def test_wrong_lists():
  steps = [arm("a", {"train.steps": 1}), arm("b", {"train.steps": 2})]
  with pytest.raises(UserError, match=r"a-c: config.train.steps is set twice, to 1 and 3"):
    product(steps, [arm("c", {"train.steps": 3})])
  with pytest.raises(UserError, match=r"2 and 1 arms; give each the same number"):
    zipped(steps, steps[:1])
  with pytest.raises(UserError, match=r"'a/b': a name is a folder"):
    arm("a/b")
  with pytest.raises(UserError, match=r"arm a: 3 is neither"):
    arm("a", 3)


def test_seeds_give_the_same_data_to_every_arm(tmp_path):
  plan = make(write_sweep(tmp_path, TWO))
  assert [(r.arm, r.seed) for r in plan.runs] == [
    (a, s) for a in ("base", "none") for s in (0, 1, 2)
  ]
  for run in plan.runs:
    assert run.config.train.seed == run.config.data.seed == run.seed
    assert run.workdir == f"{run.arm}/seed{run.seed}"
  assert plan.runs[1].config.data == plan.runs[4].config.data
  assert plan.question == "Is it so?\n\nWhy it could be."
  assert [a.overrides for a in plan.arms] == [{}, {"loss.load_balance": 0.0}]
  chosen = make(write_sweep(tmp_path, TWO), arms=["none"], seeds=[7])
  assert [(r.arm, r.seed) for r in chosen.runs] == [("none", 7)]


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # in ml_collections
def test_the_command_line_gives_the_same_config(tmp_path, monkeypatch):
  """A word of each kind: enum, bool, float, inf, string with blanks, and the solved width."""
  arms = """[
    arm('k1', {'model.moe.router': 'switch', 'model.moe.top_k': 1,
               'model.moe.capacity_factor': float('inf'),
               'optimizer.learning_rate': 1e-5, 'data.train_split': "train[:5%] & 'x' "}),
    arm('dense', {'model.qk_norm': True}, match('dense', by='flops_per_token')),
    arm('cosine', {'mesh.data': 1, 'data.text_field': ''})]"""
  plan = make(write_sweep(tmp_path, arms, evaluate=("--routing", "--split=test")), seeds=[0, 3])
  assert len(plan.runs) == 6
  for run in plan.runs:
    words = shlex.split(run.command)
    assert words[:3] == ["python", "train.py", "--config=configs/debug.py"]
    assert words[-1] == f"--workdir=runs/x/{run.workdir}"
    monkeypatch.setattr(sys, "argv", words[1:-1])  # where config_flags looks for the overrides
    values = flags.FlagValues()
    given = config_flags.DEFINE_config_file("config", flag_values=values)
    values(sys.argv)
    assert given.value == run.config
    asked = "--split=test" if run.arm == "dense" else "--routing --split=test"
    assert run.evaluate == f"python eval.py --workdir=runs/x/{run.workdir} {asked}"
  # Nothing but what differs: seed 0 is the base's.
  assert plan.runs[4].command == (
    "python train.py --config=configs/debug.py --config.data.text_field= --config.mesh.data=1 "
    "--workdir=runs/x/cosine/seed0"
  )


def test_overrides_win_over_the_arms_and_come_before_the_match(tmp_path):
  arms = "[arm('a', {'train.steps': 40}), arm('dense', match('dense', by='active_params'))]"
  plan = make(
    write_sweep(tmp_path, arms), overrides={"train.steps": 20, "model.moe.expert_dim": 90}
  )
  assert [a.config.train.steps for a in plan.arms] == [20, 20]
  assert plan.arms[1].config.model.ffn_dim == 181  # 2 * 90 + 4 / 3


SAME = "[arm('a', {'train.steps': 30}), arm('b')]"  # 30 is the base's
WRONG = {
  "[]": "arms is empty",
  "[arm('a'), arm('a', {'train.steps': 40})]": "two arms are called a",
  SAME: "the arms a and b are the same config",
  "[arm('a', {'loss.load_balanc': 0.0})]": "arm a: there is no field config.loss.load_balanc; the "
  "nearest is config.loss.load_balance",
  "[arm('a', {'train.seed': 3})]": "arm a: config.train.seed is the sweep's to set",
  "[arm('a', {'model.moe.top_k': 5})]": "arm a: config.model.moe.top_k=5 with",
  "[arm('a', {'train.steps': 'x'})]": "arm a: config.train.steps='x' is of type str, not int",
  "[arm('a', match('dense', by='size'))]": "sweep_file.py:9: match('dense', by='size'): `by` is",
  "[arm('a', {'model.moe.num_experts': 0}, match('dense', by='total_params'))]": "is dense already",
  "[1 / 0]": "sweep_file.py:9: ZeroDivisionError",
  "[arm('base')], target='bas'": "target=bas: no arm has that name; the nearest is base",
  "[arm('base')], seeds=(0, 0)": "seeds=(0, 0) must be different integers from 0 up",
  "[arm('base')], seeds=()": "seeds=() must be",
  "[arm('base')], evaluate='--routing'": "write ('--routing',)",
  "[arm('base')], base='configs/none.py'": "none.py: no such file",
}


@pytest.mark.parametrize("arms", WRONG)
def test_a_wrong_sweep_is_one_line(arms, tmp_path):
  path = write_sweep(tmp_path, arms)
  if "base=" in arms:
    text = pathlib.Path(path).read_text().replace('base="configs/debug.py", ', "")
    pathlib.Path(path).write_text(text)
  with pytest.raises(UserError) as error:
    make(path)
  assert WRONG[arms] in str(error.value) and "\n" not in str(error.value)


def test_a_wrong_choice_is_one_line(tmp_path):
  path = write_sweep(tmp_path, TWO)
  with pytest.raises(UserError, match=r"--arms=nnoe: no arm has that name; the nearest is none"):
    make(path, arms=["nnoe"])
  with pytest.raises(UserError, match=r"no such file"):
    make("configs/sweeps/nothing.py")
  (tmp_path / "empty.py").write_text("def get_sweep():\n  return 3\n")
  with pytest.raises(UserError, match=r"returned int, not a Sweep"):
    make(str(tmp_path / "empty.py"))
  pathlib.Path(path).write_text(pathlib.Path(path).read_text().replace("'''", "#", 1).replace(
    "Why", "#").replace("'''", "#").replace("\n\n#", "\n#"))  # fmt: skip
  with pytest.raises(UserError, match=r"it has no docstring; begin with the question"):
    make(path)


@pytest.mark.parametrize("name", sorted(SWEEPS))
def test_every_shipped_sweep_expands(name):
  plan = make(f"configs/sweeps/{name}.py")
  assert plan.sweep.band, "say what counts as an answer before the run"
  assert len({r.seed for r in plan.runs}) >= 3 or not plan.sweep.published


def test_dry_run_prints_lines_and_makes_nothing(tmp_path):
  path = write_sweep(tmp_path, "[arm('a'), arm('dense', match('dense', by='flops_per_token'))]")
  command = [sys.executable, "sweep.py", f"--sweep={path}", f"--out={tmp_path / 'out dir'}",
             "--dry-run", "--seeds=0,4", "--config.train.steps=20"]  # fmt: skip
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
  assert done.returncode == 0 and not done.stderr
  comments = [line for line in done.stdout.splitlines() if line.startswith("#")]
  lines = done.stdout.splitlines()[len(comments) :]
  assert comments[0] == "# Is it so?" and any("4 runs" in c for c in comments)
  assert any("ffn_dim=65, 187,392 FLOPs per token against 187,776 (-0.20%)" in c for c in comments)
  assert len(lines) == 4
  assert lines[1] == (
    "python train.py --config=configs/debug.py --config.data.seed=4 --config.train.steps=20 "
    f"--config.train.seed=4 '--workdir={tmp_path}/out dir/a/seed4' && "
    f"python eval.py '--workdir={tmp_path}/out dir/a/seed4'"
  )
  assert not (tmp_path / "out dir").exists()
  done = subprocess.run([*command, "--out="], cwd=ROOT, capture_output=True, text=True, timeout=99)
  assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--out is missing" in done.stderr


def test_shares():
  assert [slots.share([4, 5, 6, 7, 8], slot, 2) for slot in range(2)] == [[4, 5], [6, 7, 8]]
  assert [slots.share([0, 1], slot, 3) for slot in range(3)] == [[0], [1], [0]]
  assert slots.share([], 1, 2) == []


def test_slots_have_their_own_gpus_and_cores(monkeypatch):
  monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-abc,5")
  two = slots.Slots(2)
  assert two.environment(0) == {"CUDA_VISIBLE_DEVICES": "2"}
  assert two.environment(1) == {"CUDA_VISIBLE_DEVICES": "GPU-abc,5"}
  assert slots.Slots(1).environment(0) == {}
  monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
  shared = {"CUDA_VISIBLE_DEVICES": "0", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.45"}
  assert slots.Slots(2).environment(1) == shared
  usable = slots.cpus()
  if len(usable) > 1:
    code = "import os, time; time.sleep(0.3); print(sorted(os.sched_getaffinity(0)), os.environ["
    command = [sys.executable, "-c", code + "'CUDA_VISIBLE_DEVICES'])"]
    process = slots.Slots(2).start(command, 1, stdout=subprocess.PIPE, text=True)
    assert process.communicate(timeout=60)[0] == f"{usable[len(usable) // 2 :]} 0\n"
    with slots.Slots(2).as_first():
      assert slots.cpus() == usable[: len(usable) // 2]
    assert slots.cpus() == usable


FAKE_TRAIN = """
  import json, pathlib, signal, sys, time
  words = dict(word.split("=", 1) for word in sys.argv[1:])
  workdir, steps = pathlib.Path(words["--workdir"]), int(words.get("--config.train.steps", 30))
  told = []
  signal.signal(signal.SIGTERM, lambda *_: told.append(1))
  if "--config.loss.z" in words:
    sys.exit("error: z is broken")
  newest = workdir / "newest"
  start = int(newest.read_text()) if newest.exists() else 0
  print(f"resuming at step {start}" if start else "new")
  for step in range(start + 1, steps + 1):
    print(f"step {step:>6}/{steps}  loss 1.0000  9.00 steps/s  ETA 0:00:01", flush=True)
    newest.write_text(str(step))
    deadline = time.time() + 60
    while step == 5 and pathlib.Path("slow").exists() and not told and time.time() < deadline:
      time.sleep(0.02)
    told += [1] * (step == 7 and "--config.loss.router_z" in words)
    if told:
      print(f"SIGTERM: saved step {step}")
      sys.exit(0)
  (workdir / "checkpoints" / str(steps)).mkdir(parents=True, exist_ok=True)
"""
FAKE_EVAL = """
  import json, pathlib, sys
  workdir = pathlib.Path(sys.argv[1].partition("=")[2])
  step = int((workdir / "newest").read_text())
  (workdir / "eval.json").write_text(json.dumps({"step": step, "loss": 1.5}))
  print("evaluated", *sys.argv[2:])
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
  """A folder with a train.py and an eval.py that need no jax; returns (run the sweep, reports)."""
  for name, text in (("train", FAKE_TRAIN), ("eval", FAKE_EVAL)):
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
  (tmp_path / "configs").mkdir()
  (tmp_path / "configs/debug.py").write_text((ROOT / "configs/debug.py").read_text())
  monkeypatch.chdir(tmp_path)
  reports = []
  monkeypatch.setattr(report, "compare", reports.append)

  def sweep(arms, jobs=1, overrides=None, names=(), **more):
    path = write_sweep(tmp_path, arms, seeds=(0,), **more)
    code = runner.run(path, pathlib.Path("out"), jobs=jobs, dry_run=False, arms=names, seeds=[],
                      overrides=overrides or {})  # fmt: skip
    record = json.loads(pathlib.Path("out/sweep.json").read_text())
    return code, record, {r["arm"]: r["status"] for r in record["runs"]}

  return sweep, reports


def log_of(name):
  return pathlib.Path(f"out/{name}/seed0/log.txt").read_text()


def test_runs_to_the_end_past_a_failure(fake, capsys):
  sweep, reports = fake
  arms = "[arm('bad', {'loss.z': 0.5}, notes='why'), *" + TWO + "]"
  code, record, statuses = sweep(arms, jobs=2, target="base", evaluate=("--routing",), band="b")
  assert code == 1 and statuses == {"bad": "failed", "base": "finished", "none": "finished"}
  failed, finished, _ = record["runs"]
  assert failed["error"].endswith("error: z is broken") and finished["error"] == ""
  assert finished["seconds"] > 0 and finished["workdir"] == "base/seed0"
  assert finished["command"] == (
    "python train.py --config=configs/debug.py --workdir=out/base/seed0"
  )
  assert finished["evaluate"] == "python eval.py --workdir=out/base/seed0 --routing"
  assert record["question"].startswith("Is it so?") and record["base"] == "configs/debug.py"
  assert record["target_arm"] == "base" and record["band"] == "b" and record["published"] == ""
  assert record["arms"][0]["overrides"] == {"loss.z": 0.5} and "why" in record["arms"][0]["notes"]
  assert "step     30/30" in log_of("base") and "evaluated --routing" in log_of("base")
  assert reports[-1] == pathlib.Path("out")
  said = capsys.readouterr().out
  assert "bad/seed0 FAILED with code 1: error: z is broken" in said
  assert "base/seed0 finished after 0:00:" in said and "loss 1.5000" in said
  assert "2 of 3 finished; 1 failed" in said

  # Again: what is finished stays, what failed is tried once more, and other flags evaluate again.
  before = log_of("base")
  code, _, statuses = sweep(arms, evaluate=("--routing",))
  assert code == 1 and log_of("base") == before and log_of("bad").count("z is broken") == 2
  assert "2 of 3 runs were finished before" in capsys.readouterr().out
  code, record, _ = sweep(arms, evaluate=("--causal",), names=["base"])
  assert code == 0 and "resuming at step 30" in log_of("base")
  assert log_of("base").count("evaluated") == 2 and log_of("base").endswith("--causal\n")
  # The runs that were not chosen stay in the record, unless the sweep has changed since.
  assert [r["arm"] for r in record["runs"]] == ["bad", "base", "none"]
  code, record, _ = sweep(arms, names=["base"], overrides={"train.steps": 40})
  assert code == 0 and [r["arm"] for r in record["runs"]] == ["base"]
  assert "step     40/40" in log_of("base")


def test_a_run_that_somebody_else_stopped(fake):
  """train.py then saves and ends with 0, but the run is not finished."""
  code, record, statuses = fake[0]("[arm('told', {'loss.router_z': 0.5})]")
  assert code == 1 and statuses == {"told": "stopped"} and "evaluated" not in log_of("told")
  assert record["runs"][0]["seconds"] > 0


def test_a_changed_config_or_lost_record_is_seen(fake):
  sweep, _ = fake
  assert sweep("[arm('a')]")[0] == 0
  config = command_line.load_file("configs/debug.py")
  workdir = pathlib.Path("out/a/seed0")
  (workdir / "config.json").write_text(config_lib.to_json(config))
  before = log_of("a")
  pathlib.Path("out/sweep.json").unlink()  # as if a scheduler had run the lines of --dry-run
  assert sweep("[arm('a')]")[0] == 0 and log_of("a") == before
  # Not skipped, so that train.py says what has changed.
  assert sweep("[arm('a', {'optimizer.b2': 0.9})]")[0] == 0
  assert log_of("a").startswith(before) and "optimizer.b2=0.9" in log_of("a")


def test_a_signal_stops_and_the_same_command_goes_on(fake, capsys):
  sweep, reports = fake
  slow = pathlib.Path("slow")
  slow.write_text("")

  def interrupt():
    deadline = time.time() + 180
    while time.time() < deadline:
      logs = [pathlib.Path(f"out/{name}/seed0/log.txt") for name in ("base", "none")]
      if all(log.exists() and "step      5/30" in log.read_text() for log in logs):
        return os.kill(os.getpid(), signal.SIGINT)
      time.sleep(0.02)

  arms = TWO[:-1] + ", arm('later', {'train.steps': 20})]"
  # A shell starts background jobs with SIGINT ignored, and a sweep leaves it so.
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    threading.Thread(target=interrupt, daemon=True).start()
    code, _, statuses = sweep(arms, jobs=2)
  finally:
    signal.signal(signal.SIGINT, before)
  assert code == 128 + signal.SIGINT
  assert statuses == {"base": "stopped", "none": "stopped", "later": "waiting"}
  assert "SIGTERM: saved step 5" in log_of("base") and not reports
  assert "stopped; the same command goes on" in capsys.readouterr().out
  slow.unlink()
  code, _, statuses = sweep(arms, jobs=2)
  assert code == 0 and set(statuses.values()) == {"finished"}
  assert "resuming at step 5" in log_of("none") and log_of("none").count("step      5/30") == 1


def test_one_sweep_at_a_time(fake, tmp_path):
  sweep, _ = fake
  out = tmp_path / "out"
  out.mkdir()
  with runner.locked(out), pytest.raises(UserError, match="another sweep works there"):
    sweep("[arm('a')]")
  assert sweep("[arm('a')]")[0] == 0


def test_a_broken_report_loses_no_run(fake, monkeypatch, capsys):
  def broken(out):
    raise KeyError("load_ZE")

  monkeypatch.setattr(report, "compare", broken)
  code, _, statuses = fake[0]("[arm('a')]")
  assert code == 1 and statuses == {"a": "finished"}
  assert "no report: KeyError: 'load_ZE'" in capsys.readouterr().out


ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PJRT_NPROC"}
ENVIRONMENT["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # one device, and compiles faster


def start_real(tmp_path, arms, *options):
  path = write_sweep(tmp_path, arms, seeds=(0,))
  cache = [f"--config.data.cache_dir={tmp_path / 'cache'}", "--config.train.log_every=1"]
  return subprocess.Popen(
    [sys.executable, "sweep.py", f"--sweep={path}", f"--out={tmp_path / 'out'}", *cache, *options],
    cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, start_new_session=True,
  )  # fmt: skip


def statuses_of(tmp_path):
  return [r["status"] for r in json.loads((tmp_path / "out/sweep.json").read_text())["runs"]]


@pytest.mark.slow
def test_real_runs(tmp_path):
  """Interrupted, continued past an arm that fails, and finished; then the sweep has changed."""
  arms = "[arm('good', {'eval.final_batches': 1}), arm('bad', {'data.name': 'text', 'data.path': 'nowhere'})]"  # noqa: E501
  process = start_real(tmp_path, arms)
  log = tmp_path / "out/good/seed0/log.txt"
  deadline = time.time() + 120
  while not (log.exists() and "step      3/30" in log.read_text()) and time.time() < deadline:
    time.sleep(0.05)
  os.killpg(process.pid, signal.SIGINT)  # to all of the terminal's processes, as Ctrl-C does
  process.communicate(timeout=60)
  assert process.returncode == 130 and statuses_of(tmp_path) == ["stopped", "waiting"]
  assert "SIGTERM: saved step" in log.read_text()

  process = start_real(tmp_path, arms)
  output, _ = process.communicate(timeout=200)
  assert process.returncode == 1 and statuses_of(tmp_path) == ["finished", "failed"], output
  assert "resuming" in log.read_text() and "bad/seed0 FAILED with code 2: error: " in output
  assert (tmp_path / "out/report.html").exists() and (tmp_path / "out/report.md").exists()
  lines = (tmp_path / "out/good/seed0/metrics.jsonl").read_text().splitlines()
  steps = [json.loads(line)["step"] for line in lines if "train/loss" in line]
  assert steps == list(range(1, 31))

  process = start_real(tmp_path, arms.replace("1}", "1, 'optimizer.b2': 0.9}"), "--arms=good")
  output, _ = process.communicate(timeout=100)
  assert process.returncode == 1 and statuses_of(tmp_path) == ["failed", "failed"]
  assert "config.optimizer.b2=0.9 (was 0.95)" in output
