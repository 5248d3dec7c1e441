"""What the environment says about the processes of a run."""

import socket

import pytest

from moe_jax.errors import UserError
from moe_jax.start import startup
from tests.support.scripts import ONE_DEVICE, python

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


def test_jax_is_asked_for_what_the_environment_does_not_say(environment):
  environment("host:1234", None, None)
  assert startup.place() == ("host:1234", None, None)


@pytest.mark.parametrize(
  "values, message",
  [
    (("host:1234", "two", "0"), "JAX_NUM_PROCESSES=two: write a whole number"),
    (("host:1234", "2", "-1"), "JAX_PROCESS_ID=-1: write a whole number"),
    (("host", "2", "0"), "JAX_COORDINATOR_ADDRESS=host: write HOST:PORT"),
    (("host:99999", "2", "0"), "JAX_COORDINATOR_ADDRESS=host:99999: write HOST:PORT"),
  ],
)
def test_a_wrong_environment_is_one_line(values, message, environment):
  environment(*values)
  with pytest.raises(UserError) as error:
    startup.place()
  assert str(error.value).startswith(message)


@pytest.mark.parametrize(
  "values, message",
  [
    (("localhost:1234", None, None), "Number of processes must be defined."),
    ((None, None, None), "coordinator_address should be defined."),
    (("localhost:1234", "2", "2"), "process_id and num_processes must be nonnegative, with"),
  ],
)
def test_processes_that_nothing_or_a_wrong_number_names_are_one_line(values, message):
  place = {name: value for name, value in zip(NAMES, values, strict=True) if value}
  command = ["train.py", "--config=configs/debug.py", "--workdir=/tmp/none", "--multihost"]
  done = python(*command, env=ONE_DEVICE | place)
  assert done.returncode == 2 and done.stderr.startswith(f"error: --multihost: {message}")
  assert done.stderr.count("\n") == 1 and f"JAX_COORDINATOR_ADDRESS ({values[0]})" in done.stderr


def test_a_port_in_use_is_one_line(environment):
  with socket.create_server(("", 0)) as server:
    port = server.getsockname()[1]
    environment(f"localhost:{port}", "2", "0")
    with pytest.raises(UserError, match=rf"cannot listen at port {port} \(Address already in use"):
      startup.place()
    environment(f"localhost:{port}", "2", "1")
    startup.place()  # it is process 0 that listens
