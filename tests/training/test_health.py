"""What training says of its experts: by hand, and in a run that goes wrong."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import Health, OnAlarm, OnNonfinite, QKNorm
from moe_jax.model import cost
from moe_jax.moe import counts
from moe_jax.training import health, metrics
from tests.support.scripts import python
from tests.support.toys import toy_config


def test_moe_metrics_by_hand():
  """Two layers, four experts, top-2 of 10 tokens; the second layer lost a quarter."""
  stats = counts.zeros(2, 4, 2)._replace(
    tokens=jnp.array([10, 10]),
    routed_E=jnp.array([[5, 5, 5, 5], [10, 9, 1, 0]]),
    kept_E=jnp.array([[5, 5, 5, 5], [7, 7, 1, 0]]),
    kept_K=jnp.array([[10, 10], [9, 6]]),
    routed_P=jnp.array([[2, 2, 2, 2, 4, 4, 2, 2]] * 2),
    kept_P=jnp.array([[2, 2, 2, 2, 4, 4, 2, 2], [2, 2, 2, 2, 4, 2, 1, 0]]),
    importance_E=jnp.array([[2.5, 2.5, 2.5, 2.5], [4.0, 4.0, 2.0, 0.0]]),
    gate_kept=jnp.array([10.0, 8.0]),
    z=jnp.array([20.0, 5.0]),
    entropy=jnp.array([10.0, 5.0]),
  )
  got = metrics.moe_metrics(stats)
  log = np.log
  want = {
    "load_ZE": [[0.25] * 4, [0.5, 0.45, 0.05, 0]],
    "load_entropy_Z": [log(4), -0.5 * log(0.5) - 0.45 * log(0.45) - 0.05 * log(0.05)],
    "max_vio_Z": [0, 1],
    "dead_experts_Z": [0, 1],
    "router_entropy_Z": [1, 0.5],
    "router_z_Z": [2, 0.5],
    "drop_fraction_Z": [0, 0.25],
    "drop_by_rank_ZK": [[0, 0], [0.1, 0.4]],
    "drop_by_position_ZP": [[0] * 8, [0, 0, 0, 0, 0, 0.5, 0.5, 1]],
    "gate_drop_fraction_Z": [0, 0.2],
    "overflow_fraction_Z": [0, 0],
  }
  assert set(got) == set(want)
  for name, value in want.items():
    np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
  overload_Z = metrics.device_overload(np.array(want["load_ZE"]), 2)
  np.testing.assert_allclose(overload_Z, [1, 2 * 0.95])


def test_gradient_norms_by_group():
  """Every parameter of a model with all kinds of them is in the group that its name says."""
  config = toy_config(
    {"model.tied_head": False, "model.qk_norm": QKNorm.HEAD}, first_dense=1, shared_experts=1
  )
  groups = {}
  for path in cost.parameters(config.model):
    groups.setdefault(metrics.parameter_group(path[-1]), set()).add(path[-1])
  assert groups == {
    "embed": {"embed_VD"},
    "head": {"head_DV"},
    "norm": {"norm_D", "norm_A"},
    "attention": {"q_DHA", "k_DGA", "v_DGA", "out_HAD"},
    "router": {"router_DE"},
    "experts": {"gate_EDF", "up_EDF", "down_EFD"},
    "ffn": {"gate_DF", "up_DF", "down_FD"},
  }
  norms = metrics.gradient_norms({"a": {"router_DE": jnp.full((2, 2), 3.0), "norm_D": jnp.ones(4)}})
  assert {name: float(n) for name, n in norms.items()} == pytest.approx(
    {"grad_norm": 40**0.5, "grad_norm_router": 6.0, "grad_norm_norm": 2.0}
  )


def monitor(tmp_path, resume_step=0, **limits):
  config = toy_config({"health": Health(window=4, patience=3, **limits)})
  watch = health.Monitor(config, [1, 3], tmp_path, resume_step)
  return lambda step, values: watch(step, values, lambda step: [10 * step, 10 * step + 1])


def values(loss=2.0, load=(0.25, 0.25, 0.25, 0.25), dead=0, drop=0.0, z=1.0):
  return {
    "loss": np.float32(loss),
    "grad_norm_router": np.float32(1.0),
    "load_ZE": np.array([[0.25] * 4, load]),
    "window_load_ZE": np.array([[0.25] * 4, load]),
    "window_dead_experts_Z": np.array([0, dead]),
    "drop_fraction_Z": np.array([0.0, drop]),
    "router_z_Z": np.array([1.0, z]),
  }


@pytest.mark.parametrize(
  ("name", "bad", "value"),
  [
    ("collapse", dict(load=(0.48, 0.2, 0.2, 0.12)), 0.96),  # top-2: of 96% of the tokens
    ("dead_experts", dict(dead=3), 0.75),
    ("drop_rate", dict(drop=0.6), 0.6),
  ],
)
def test_alarms_wait_and_do_not_repeat(name, bad, value, tmp_path, capsys):
  watch = monitor(tmp_path)
  seen = []
  for step, is_bad in enumerate([1, 1, 0, 1, 1, 1, 1, 1, 0, 1, 1, 1], 1):
    seen += watch(step, values(**bad) if is_bad else values())
  # Three steps in a row; once until it has been well again.
  assert [(a.alarm, a.step, a.layer) for a in seen] == [(name, 6, 3), (name, 12, 3)]
  assert seen[0].value == pytest.approx(value)
  lines = [json.loads(line) for line in (tmp_path / "alarms.jsonl").read_text().splitlines()]
  assert [line["step"] for line in lines] == [6, 12]
  assert "layer 3 at step 6" in capsys.readouterr().out
  monitor(tmp_path)  # starts the run again, from step 0
  assert (tmp_path / "alarms.jsonl").read_text() == ""


def test_a_run_killed_while_it_wrote_an_alarm_goes_on(tmp_path):
  path = tmp_path / "alarms.jsonl"
  path.write_text('{"step": 3, "alarm": "collapse"}\n{"step": 9, "alarm": "collapse"}\n{"step": 1')
  monitor(tmp_path, resume_step=5)
  assert path.read_text() == '{"step": 3, "alarm": "collapse"}\n'


def test_a_loss_spike_is_one_alarm(tmp_path):
  watch = monitor(tmp_path)
  losses = [3.0, 2.0, 2.0, 2.0, 3.2, 3.4, 2.0, 2.0, 2.0, 2.0]  # mean 2.25 before the spike
  alarms = [a for step, loss in enumerate(losses, 1) for a in watch(step, values(loss=loss))]
  assert [(a.step, a.alarm, a.layer) for a in alarms] == [(6, "loss_spike", -1)]
  assert alarms[0].value == pytest.approx(3.4 - 2.3)


def test_a_limit_of_zero_is_off(tmp_path):
  watch = monitor(tmp_path, token_share=0.0, dead_fraction=0.0, drop_fraction=0.0, loss_spike=0.0)
  for step in range(1, 9):
    bad = values(loss=step**3, load=(0.5, 0.5, 0, 0), dead=4, drop=1.0)
    assert watch(step, bad) == []
  assert monitor(tmp_path, on_alarm=OnAlarm.OFF)(1, values()) == []


def test_stop_and_warn(tmp_path):
  with pytest.raises(health.StopAlarm, match="layer 3 at step 3: 75% of the experts are") as alarm:
    watch = monitor(tmp_path, on_alarm=OnAlarm.STOP)
    for step in (1, 2, 3):
      watch(step, values(dead=3))
  assert alarm.type is health.StopAlarm
  where = "not finite at step 7: loss, router_z_Z; first in the router of layer 3; --replay=7 looks"
  with pytest.raises(health.NotFiniteAlarm, match=where):
    monitor(tmp_path)(7, values(loss=np.nan, z=np.inf))
  warned = monitor(tmp_path, on_nonfinite=OnNonfinite.WARN)
  assert [a.layer for a in warned(1, values(loss=np.nan, z=np.nan))] == [3]
  assert warned(2, values(loss=np.nan)) == []  # said already


def test_skipped_updates_are_lines_with_their_rows(tmp_path):
  watch = monitor(tmp_path, on_nonfinite=OnNonfinite.SKIP, skip_limit=3)
  for step, loss in enumerate([np.nan, np.inf, 2.0, np.nan, np.nan], 1):
    watch(step, values(loss=loss))
  with pytest.raises(health.NotFiniteAlarm, match=r"skip_limit=3 updates in a row .* at step 6"):
    watch(6, values(loss=np.nan))
  lines = [json.loads(line) for line in (tmp_path / "alarms.jsonl").read_text().splitlines()]
  assert [(line["alarm"], line["step"]) for line in lines] == [("skip", n) for n in (1, 2, 4, 5, 6)]
  assert [line["rows"] for line in lines[:2]] == [[10, 11], [20, 21]]
  assert "update skipped (5 in this run): not finite at step 6" in lines[-1]["message"]
  config = toy_config({"health.on_nonfinite": OnNonfinite.SKIP})
  assert health.Monitor(config, [1, 3], tmp_path, 4).skipped == 3  # what is counted is on disk


def test_a_rewind_leaves_the_loop(tmp_path):
  with pytest.raises(health.Rewind) as rewind:
    monitor(tmp_path, on_nonfinite=OnNonfinite.REWIND)(7, values(loss=np.nan))
  assert rewind.value.alarm.rows == [70, 71]


@pytest.mark.slow
def test_a_run_that_blows_up_says_where(tmp_path):
  """A real run at an absurd learning rate, stopped by a spike; the alarm is on disk."""
  done = python(
    "train.py",
    "--config=configs/debug.py",
    f"--workdir={tmp_path}",
    "--config.optimizer.learning_rate=3.0",
    "--config.health.on_alarm=stop",
    "--config.health.window=3",
    "--config.train.eval_every=30",
  )
  assert done.returncode == health.StopAlarm.code
  (line,) = (tmp_path / "alarms.jsonl").read_text().splitlines()
  alarm = json.loads(line)
  assert alarm["alarm"] in done.stderr and f"at step {alarm['step']}" in done.stderr
  assert "no usable checkpoint yet, so lower config.optimizer.learning_rate=3.0" in done.stderr
