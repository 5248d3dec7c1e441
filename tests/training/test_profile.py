"""--profile traces the steps that it names, and says where the trace is."""

import jax
import pytest

from moe_jax.config import Config, Data, Eval, Model, Optimizer, Train
from moe_jax.errors import UserError
from moe_jax.training import profiling
from moe_jax.training import run as run_lib
from moe_jax.training import setup as setup_lib


@pytest.mark.parametrize(
  ("text", "said"),
  [
    ("10", "write --profile=FIRST:LAST"),
    ("a:b", "write --profile=FIRST:LAST"),
    ("-1:3", "write --profile=FIRST:LAST"),
    ("0:3", "out of the run's steps 1 to 20"),
    ("4:3", "in this order"),
    ("19:21", "config.train.steps=20"),
  ],
)
def test_a_window_outside_the_run_is_one_line(text, said):
  with pytest.raises(UserError, match=f"--profile={text}: .*{said}"):
    profiling.parse(text, 20)


def test_both_ends_are_included():
  assert profiling.parse("10:20", 20) == (10, 20)
  assert profiling.parse("3:3", 20) == (3, 3)
  assert profiling.parse("", 20) is None


@pytest.mark.parametrize(
  ("start", "said", "traced"),
  [
    (9, "", [10, 11, 12, 13]),
    (11, "the run is already at step 11, so this traces the steps 12 to 13", [12, 13]),
    (13, "the run is already at step 13, so this traces nothing", []),
  ],
)
def test_a_resumed_run_traces_what_is_left(tmp_path, monkeypatch, capsys, start, said, traced):
  running = []
  monkeypatch.setattr(profiling.jax.profiler, "start_trace", lambda _: running.append(True))
  monkeypatch.setattr(profiling.jax.profiler, "stop_trace", running.clear)
  profiler = profiling.Profiler(profiling.parse("10:13", 20), tmp_path, start)
  assert said in capsys.readouterr().out
  inside = []
  for step in range(start + 1, 17):
    profiler.before(step, ())
    inside += [step] * bool(running)
    profiler.after(step, ())
  profiler.close()
  assert inside == traced
  assert bool(traced) == (f"--logdir={tmp_path / 'profile'}" in capsys.readouterr().out)


@pytest.mark.slow
def test_a_run_leaves_a_trace_of_its_steps(tmp_path, capsys):
  """The file is what XProf opens; it names the traced steps and no other."""
  (tmp_path / "text").mkdir()
  for n in range(40):
    (tmp_path / "text" / f"{n}.txt").write_text(f"document {n} is about the number {n}. " * 40)
  config = Config(
    model=Model(num_layers=1, dim=8, num_heads=1, num_kv_heads=1, head_dim=8, ffn_dim=8),
    data=Data(name="text", path=str(tmp_path / "text"), seq_len=16, batch_size=8),
    optimizer=Optimizer(warmup_steps=0),
    train=Train(steps=5, eval_every=5, checkpoint_every=5),
    eval=Eval(batches=1),
  )
  run_lib.run(setup_lib.prepare(config), str(tmp_path / "run"), profile="3:4")
  (trace,) = (tmp_path / "run/profile/plugins/profile").glob("*/*.xplane.pb")
  assert f"xprof --logdir={tmp_path / 'run/profile'}" in capsys.readouterr().out
  planes = jax.profiler.ProfileData.from_file(str(trace)).planes
  events = [event for plane in planes for line in plane.lines for event in line.events]
  steps = {dict(event.stats)["step_num"] for event in events if event.name == "train"}
  assert steps == {3, 4}
