"""What the environment says about the processes of a run."""

import pytest

from moe_jax.errors import UserError
from moe_jax.start import startup

NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


@pytest.fixture
def environment(monkeypatch):
  def set_to(*values):
    for name, value in zip(NAMES, values, strict=True):
      if value is None:
        monkeypatch.delenv(name, raising=False)
      else:
        monkeypatch.setenv(name, value)

  return set_to


def test_three_variables_place_a_process(environment):
  environment("[::1]:1234", "16", "3")
  assert startup.place() == ("[::1]:1234", 16, 3)


def test_slurm_places_a_process(environment, monkeypatch):
  environment(None, None, None)
  slurm = {"JOB_ID": "7", "STEP_NODELIST": "node[01-02]", "NTASKS": "16", "PROCID": "3",
           "LOCALID": "3", "STEP_NUM_NODES": "2"}  # fmt: skip
  for name, value in slurm.items():
    monkeypatch.setenv(f"SLURM_{name}", value)
  address, count, index = startup.place()
  assert address.startswith("node01:") and (count, index) == (16, 3)


@pytest.mark.parametrize(
  "values, message",
  [
    (("host:1234", "two", "0"), "JAX_NUM_PROCESSES=two: write a whole number"),
    (("host:1234", "2", "-1"), "JAX_PROCESS_ID=-1: write a whole number"),
    (("host:1234", "2", "2"), "JAX_PROCESS_ID=2: the JAX_NUM_PROCESSES=2 processes have numbers"),
    (("host", "2", "0"), "JAX_COORDINATOR_ADDRESS=host: write HOST:PORT"),
    (("host:99999", "2", "0"), "JAX_COORDINATOR_ADDRESS=host:99999: write HOST:PORT"),
    (("host:1234", None, None), "--multihost: JAX_NUM_PROCESSES and JAX_PROCESS_ID not set"),
    ((None, None, None), "--multihost: JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES and"),
  ],
)
def test_a_wrong_environment_is_one_line(values, message, environment):
  environment(*values)
  with pytest.raises(UserError) as error:
    startup.place()
  assert str(error.value).startswith(message)
