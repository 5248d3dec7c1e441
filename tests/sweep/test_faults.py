"""Sweeps with faults: damaged and planted files, links, full disks, runs that are killed."""

import json
import os
import pathlib
import signal
import threading
import time

import pytest

from moe_jax.config.run import to_json
from moe_jax.errors import DamagedError, StorageError, UserError
from moe_jax.start import command_line
from tests.support.disks import small_disk
from tests.support.fake_runs import fakes_in
from tests.support.sweeps import TWO

OUT = pathlib.Path("out")


@pytest.fixture
def fake(tmp_path):
  with fakes_in(tmp_path) as made:
    yield made


def contents():
  return {path: path.read_bytes() for path in pathlib.Path().rglob("*") if path.is_file()}


def record():
  return json.loads((OUT / "sweep.json").read_text())


def statuses():
  return {run["arm"]: run["status"] for run in record()["runs"]}


def plant(changes, arm="base"):
  """Changes what sweep.json says of an arm's run."""
  values = record()
  for entry in values["runs"]:
    if entry["arm"] == arm:
      entry |= changes
  (OUT / "sweep.json").write_text(json.dumps(values))


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
  """A finished sweep of two arms; its files may be damaged, but must be put back."""
  with fakes_in(tmp_path_factory.mktemp("fakes")) as made:
    assert made.sweep(TWO).code == 0
    yield made


# (content of sweep.json, or changes of an entry; what the error says)
DAMAGE = [
  (b"", "Expecting value"), (b"\xff\x00", "not UTF-8"), (b"[1]", "it holds a list"),
  (b'{"arms": [', "sweep.json is damaged"), (b"[" * 100_000, "sweep.json is damaged"),
  (b'{"parameters": {"lr": [1, 2]}, "method": "grid"}', "it has no 'arms'"),
  (b'{"format": 2}', "is of format 2, made by a newer moe_jax; update this one"),
  ({"workdir": "../../x"}, "its workdir '../../x' is not in this folder"),
  ({"workdir": "/tmp"}, "its workdir '/tmp' is not in this folder"),
  ({"workdir": 7}, "workdir is 7, not a text"), ({"seed": 0.5}, "seed is 0.5, not an integer"),
  ({"seconds": "long"}, "seconds is 'long', not a number"), ({"status": "?"}, "status is '?'"),
  ({"command": "python 'train.py"}, "No closing quotation"),
  ({"evaluate": None}, "evaluate is None, not a command line"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "words"), DAMAGE, ids=range(len(DAMAGE)))
def test_a_damaged_record_stops_a_sweep_before_it_writes_anything(damage, words, swept):
  path = OUT / "sweep.json"
  good = path.read_bytes()
  try:
    plant(damage) if isinstance(damage, dict) else path.write_bytes(damage)
    before = contents()
    with pytest.raises(DamagedError) as error:
      swept.sweep(TWO)
    assert contents() == before
  finally:
    path.write_bytes(good)
  assert words in str(error.value) and "\n" not in str(error.value) and error.value.code == 4


def test_measurements_of_an_older_version_are_left_out(fake):
  """It matched by wall-clock, too, and kept the times."""
  fake.sweep(TWO)
  (OUT / "sweep.json").write_text(json.dumps(record() | {"measured": {"a": {"width": 3}}}))
  swept = fake.sweep(TWO)
  assert swept.code == 0 and swept.logs["base"].count("evaluated") == 1
  assert "measured" not in swept.record


def test_without_its_record_a_sweep_finds_the_finished_runs(fake):
  """As the message about a damaged record says."""
  before = fake.sweep(TWO)
  base = command_line.load_file("configs/debug.py")
  (OUT / "base/seed0/config.json").write_text(to_json(base))
  (OUT / "sweep.json").rename("moved")
  after = fake.sweep(TWO, names=["base"])
  assert after.code == 0 and after.logs["base"] == before.logs["base"]


def test_another_sweep_is_not_overwritten(swept):
  before = contents()
  with pytest.raises(UserError, match=r"--out=out holds another sweep, of .*sweep_file.py, which"):
    swept.sweep("[arm('other', {'loss.z': 0.25})]")
  after = contents()
  changed = {str(path) for path in after if after[path] != before.get(path)}
  assert changed <= {"sweep_file.py"}  # which this test has written


def test_commands_and_folders_of_a_record_are_made_again(fake):
  """One that came with a downloaded folder is never run, also not for a run that is not chosen."""
  fake.sweep(TWO)
  evil = {"command": 'python -c \'open("evil", "w")\'', "status": "failed"}
  plant(evil | {"evaluate": evil["command"]})
  swept = fake.sweep(TWO)
  assert swept.code == 0 and not pathlib.Path("evil").exists()
  plant({"workdir": "none/seed0"})
  swept = fake.sweep(TWO, names=["none"])
  entry = swept.record["runs"][0]
  assert entry["workdir"] == "base/seed0" and entry["command"].endswith("--workdir=out/base/seed0")


@pytest.mark.parametrize("place", ["base", "base/seed0", "base/seed0/log.txt", "base/seed0/a/b"])
def test_a_sweep_writes_through_no_link(place, fake):
  outside = fake.folder / "outside"
  outside.mkdir()
  path = OUT / place
  path.parent.mkdir(parents=True)
  path.symlink_to(outside)
  with pytest.raises(UserError, match=rf"out/{place} is a symbolic link, .*; remove it"):
    fake.sweep(TWO)
  assert not [p for p in outside.rglob("*") if p.is_file()] and not (OUT / "sweep.json").exists()


def test_a_record_that_is_a_link_is_replaced(fake):
  fake.sweep("[arm('base')]")
  os.replace("out/sweep.json", "out/moved.json")
  (OUT / "sweep.json").symlink_to("moved.json")
  (OUT / "sweep.json.new").symlink_to("../victim")
  before = (OUT / "moved.json").read_bytes()
  assert fake.sweep(TWO).code == 0
  assert (OUT / "moved.json").read_bytes() == before and not pathlib.Path("victim").exists()
  assert not (OUT / "sweep.json").is_symlink()


def test_an_out_that_is_a_file_is_refused(fake):
  OUT.write_text("mine")
  with pytest.raises(UserError, match="--out=out is no folder"):
    fake.sweep(TWO)
  assert OUT.read_text() == "mine"


def test_a_damaged_evaluation_is_made_again(fake):
  fake.sweep(TWO)
  (OUT / "none/seed0/eval.json").write_bytes(b"\xff[")
  swept = fake.sweep(TWO)
  assert swept.code == 0 and swept.logs["none"].count("evaluated") == 2
  assert swept.logs["base"].count("evaluated") == 1
  assert json.loads((OUT / "none/seed0/eval.json").read_text())["loss"] == 1.5


def test_a_run_whose_evaluation_is_damaged_has_failed(fake):
  pathlib.Path("eval.py").write_text(
    "import sys; open(sys.argv[1].split('=')[1] + '/eval.json', 'w').write('{')"
  )
  swept = fake.sweep("[arm('base')]")
  assert swept.code == 1 and "eval.json is damaged" in swept.record["runs"][0]["error"]


def test_a_log_may_hold_any_bytes(fake):
  """Also where its end begins in the middle of a letter."""
  end = r"b'\n\xff\x00 broken'"
  code = f"sys.stdout.buffer.write('\u00b1'.encode() * 9000 + {end}); sys.exit(1)"
  pathlib.Path("base.py").write_text(code)
  swept = fake.sweep(TWO)
  assert swept.code == 1 and swept.statuses == {"base": "failed", "none": "finished"}
  assert "FAILED with code 1: \ufffd\x00 broken" in swept.output


def test_a_run_that_is_killed_has_a_reason(fake):
  """As by the system when memory is full; the run has no time to say so itself."""
  pathlib.Path("base.py").write_text("import os; os.kill(os.getpid(), signal.SIGKILL)")
  swept = fake.sweep(TWO)
  assert swept.code == 1 and swept.statuses == {"base": "failed", "none": "finished"}
  reason = "ended by signal 9 (Killed); the system does this when memory is full"
  assert swept.record["runs"][0]["error"].endswith(reason) and reason in swept.output


FULL = "error: cannot write x: No space left on device; the same command goes on"


def test_a_run_that_finds_its_disk_full_ends_the_sweep(fake):
  """Runs that have not begun would find the same. Those that run go on."""
  pathlib.Path("base.py").write_text(f"print({FULL!r}); sys.exit(3)")
  with pytest.raises(StorageError, match="base/seed0: cannot write x: No space left") as error:
    fake.sweep(TWO)
  assert error.value.code == 3 and statuses() == {"base": "stopped", "none": "waiting"}
  pathlib.Path("base.py").unlink()
  assert fake.sweep(TWO).code == 0


FILL = f"""
try:
  with open("out/filler", "ab", buffering=0) as file:
    while True:
      file.write(bytes(1 << 16))
except OSError:
  print({FULL!r})
  sys.exit(3)
"""


def test_a_full_disk_loses_nothing(fake):
  """It fills while a run trains, is still full when the sweep is started again, and then is not."""
  with small_disk(OUT, "1m"):
    pathlib.Path("none.py").write_text(FILL)
    with pytest.raises(StorageError, match="none/seed0: cannot write x"):
      fake.sweep(TWO[:-1] + ", arm('later', {'loss.load_balance': 0.5})]")
    assert statuses() == {"base": "finished", "none": "running", "later": "waiting"}
    before = contents()
    with pytest.raises(
      StorageError, match=r"cannot write \S+: No space left on device; .* the same"
    ):
      fake.sweep(TWO[:-1] + ", arm('later', {'loss.load_balance': 0.5})]")
    assert contents() == before
    (OUT / "filler").unlink()
    pathlib.Path("none.py").unlink()
    swept = fake.sweep(TWO[:-1] + ", arm('later', {'loss.load_balance': 0.5})]")
    assert swept.code == 0 and set(swept.statuses.values()) == {"finished"}
    assert swept.logs["base"].count("evaluated") == 1


# Waits at step 5, says when it is asked to stop, and does not stop before the second or third time.
STUBBORN = """
import os
asked = []
def ask(*_):
  asked.append(1)
  print("asked", len(asked), flush=True)
  if len(asked) == {times}:
    sys.exit(1)
signal.signal(signal.SIGTERM, ask)
pathlib.Path(f"{{workdir.parent.name}}.pid").write_text(str(os.getpid()))
deadline = time.time() + 600
while time.time() < deadline:
  time.sleep(0.02)
"""


def interrupt(times, log):
  """Sends so many signals, each after the one before has arrived."""
  deadline = time.time() + 600
  for number in range(times):
    words = f"asked {number}" if number else "$ python"
    while time.time() < deadline and not (
      pathlib.Path("base.pid").exists() and log.exists() and words in log.read_text()
    ):
      time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(("obeys", "signals"), [(2, 2), (9, 3)])
def test_a_sweep_that_is_asked_again_does_not_wait(obeys, signals, fake):
  """The second signal ends runs without saving; the third ends those that do not react at all."""
  pathlib.Path("base.py").write_text(STUBBORN.format(times=obeys))
  thread = threading.Thread(
    target=interrupt, args=(signals, OUT / "base/seed0/log.txt"), daemon=True
  )
  thread.start()
  swept = fake.sweep(TWO)
  thread.join(60)
  assert swept.code == 128 + signal.SIGTERM
  assert swept.statuses == {"base": "stopped", "none": "waiting"}
  assert swept.logs["base"].count("asked") == 2
  with pytest.raises(ProcessLookupError):
    os.kill(int(pathlib.Path("base.pid").read_text()), 0)
  pathlib.Path("base.py").unlink()
  assert fake.sweep(TWO).code == 0
