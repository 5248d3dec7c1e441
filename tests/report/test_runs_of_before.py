"""A run evaluated when a capacity factor of 0 was no limit is reported as it was meant."""

import json
import math

from moe_jax.config import Config
from moe_jax.config.fields import flatten
from moe_jax.config.run import to_json
from moe_jax.report import runs


def test_a_zero_was_no_limit(tmp_path):
  fields = {"model": {"moe": {"num_experts": 4, "capacity_factor": 0.0}}}
  (tmp_path / "config.json").write_text(json.dumps(fields))
  points = [{"capacity_factor": 1.0, "loss": 2.0}, {"capacity_factor": 0, "loss": 1.5}]
  (tmp_path / "eval.json").write_text(json.dumps({"capacity": points}))
  run = runs.read_run(tmp_path, "a")
  assert run.config["model.moe.capacity_factor"] == "inf"
  assert [point["capacity_factor"] for point in run.eval["capacity"]] == [1.0, math.inf]


def test_the_format_is_no_field(tmp_path):
  (tmp_path / "config.json").write_text(to_json(Config()))
  assert runs.read_run(tmp_path, "a").config == flatten(Config())
