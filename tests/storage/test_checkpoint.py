"""Checkpoints that are damaged, of another model, or not finite are never used in silence."""

import contextlib
import errno
import gc
import os
import random
import resource
import shutil
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import sharding
from moe_jax.config import override
from moe_jax.errors import DamagedError, StorageError, UserError, why_unread
from moe_jax.storage import checkpoint, verification, workdir
from moe_jax.training import run
from moe_jax.training import setup as setup_lib
from tests.support.toys import mesh_of

# The libraries leave the reads of other arrays behind when one cannot be read.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

# Of a checkpoint, by name; those below a folder d/ have names of their own in each checkpoint.
FILES = (
  "_CHECKPOINT_METADATA", "commit_success.txt", "about/commit_success.txt", "about/metadata",
  "metrics/commit_success.txt", "metrics/metrics", "state/_METADATA", "state/_sharding",
  "state/array_metadatas/process_0", "state/commit_success.txt", "state/d/*",
  "state/manifest.ocdbt", "state/ocdbt.process_0/d/*", "state/ocdbt.process_0/manifest.ocdbt",
)  # fmt: skip
# Those of which a change is noticed at once, whatever else the libraries read.
ARRAYS = {"state/d/*", "about/metadata", "metrics/metrics", "state/manifest.ocdbt"}


def flip(path, rng):
  data = bytearray(path.read_bytes())
  data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
  path.write_bytes(data)


DAMAGES = {
  "flipped bit": flip,
  "cut": lambda path, rng: os.truncate(path, path.stat().st_size // 2),
  "empty": lambda path, rng: os.truncate(path, 0),
  "gone": lambda path, rng: path.unlink(),
  "garbage": lambda path, rng: path.write_bytes(rng.randbytes(path.stat().st_size + 9)),
}


class Restored(NamedTuple):
  step: int
  arrays: dict[str, str]
  next_batch: int


def newest_whole(folder, settings, during=None):
  """What a run in the folder would go on from; `during` is in force while it reads."""
  mesh = mesh_of()
  with jax.set_mesh(mesh):
    setup = setup_lib.make(settings, mesh)
    saver = checkpoint.Checkpointer.writing(
      folder, settings.train.keep_latest, settings.train.keep_best
    )
    try:
      with during or contextlib.nullcontext():
        found = run._restore_newest(saver, checkpoint.abstract(setup.shapes, setup.shardings))
      step, state, next_batch = found
    finally:
      saver.close()
  return Restored(step, verification.array_digests(state._asdict())[0], next_batch)


@pytest.fixture(scope="module", autouse=True)
def few_objects_to_collect():
  """What is there already is left out of collections, which take half a second otherwise."""
  gc.freeze()
  yield
  gc.unfreeze()


@pytest.fixture(autouse=True)
def leave_nothing_behind():
  """So that such a read ends in the test that it belongs to."""
  yield
  gc.collect()


@pytest.fixture(scope="module")
def undamaged(whole_run, tmp_path_factory):
  """The steps 8 and 12 of a run, and what they hold."""
  settings = workdir.read_config(whole_run.workdir)
  found = {}
  for step in (12, 8):
    folder = tmp_path_factory.mktemp("whole") / "run"
    shutil.copytree(whole_run.workdir, folder)
    if step == 8:
      workdir.set_aside(folder, 12, "to read the other one")
    found[step] = newest_whole(folder, settings)
  assert found[8].arrays != found[12].arrays
  return found


def damaged_copy(whole_run, folder, name, damage, rng):
  shutil.copytree(whole_run.workdir, folder)
  (path, *more) = sorted((folder / "checkpoints/12").glob(name))
  DAMAGES[damage](rng.choice([path, *more]), rng)


@pytest.mark.parametrize("name", [*sorted(ARRAYS), "_CHECKPOINT_METADATA", "commit_success.txt"])
def test_a_damaged_file_is_noticed_or_does_no_harm(name, whole_run, undamaged, tmp_path, capfd):
  settings = workdir.read_config(whole_run.workdir)
  rng = random.Random(name)
  damage = rng.choice([*DAMAGES]) if name not in ARRAYS else "flipped bit"
  damaged_copy(whole_run, tmp_path / "run", name, damage, rng)
  check_falls_back(name, settings, undamaged, tmp_path / "run", capfd)


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_every_file_in_every_way(damage, whole_run, undamaged, tmp_path, capfd):
  settings = workdir.read_config(whole_run.workdir)
  for name in FILES:
    for seed in range(2 if damage == "flipped bit" else 1):
      folder = tmp_path / f"{name.replace('/', '-')}-{seed}"
      damaged_copy(whole_run, folder, name, damage, random.Random(f"{name}{damage}{seed}"))
      check_falls_back(name, settings, undamaged, folder, capfd)


def check_falls_back(name, settings, undamaged, folder, capfd):
  found = newest_whole(folder, settings)
  assert found == undamaged[found.step]
  said = capfd.readouterr().err
  assert "Traceback" not in said
  if found.step == 8:
    assert (folder / "set_aside/12.0").is_dir() and workdir.recorded_step(folder) == 8
    assert said.count("\n") == 1 and "checkpoint 12 is set aside as" in said
  else:
    assert name not in ARRAYS and not said


def test_what_a_library_answers_late_is_not_printed(capsys):
  checkpoint._silence_late_answers()
  sys.excepthook(RuntimeError, RuntimeError("Event loop is closed"), None)
  assert not capsys.readouterr().err
  sys.excepthook(ValueError, ValueError("another"), None)
  assert "ValueError: another" in capsys.readouterr().err


def test_the_files_are_those_of_a_checkpoint(whole_run):
  folder = whole_run.workdir / "checkpoints/12"
  names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
  known = {str(p.relative_to(folder)) for name in FILES for p in folder.glob(name)}
  assert names == known


def test_the_only_checkpoint_stays_where_it_is(whole_run, tmp_path):
  """Nothing begins again from zero in silence."""
  folder = tmp_path / "run"
  shutil.copytree(whole_run.workdir, folder)
  shutil.rmtree(folder / "checkpoints/8")
  (path,) = (folder / "checkpoints/12/state/d").iterdir()
  os.truncate(path, 10)
  with pytest.raises(
    DamagedError, match=r"12 is damaged .*; put a whole checkpoint there, or begin"
  ):
    newest_whole(folder, workdir.read_config(folder))
  assert workdir.saved_steps(folder) == [12]


def test_no_pipe_in_a_checkpoint_is_waited_for(whole_run, tmp_path, capfd):
  folder = shutil.copytree(whole_run.workdir, tmp_path / "run")
  (folder / "checkpoints/12/state/_METADATA").unlink()
  os.mkfifo(folder / "checkpoints/12/state/_METADATA")
  assert newest_whole(folder, workdir.read_config(folder)).step == 8
  assert "12 is damaged (a pipe is in the place of a file)" in capfd.readouterr().err


def test_a_checkpoint_of_another_model_is_refused_and_stays(whole_run, tmp_path):
  folder = tmp_path / "run"
  shutil.copytree(whole_run.workdir, folder)
  settings = override(workdir.read_config(folder), {"model.moe.expert_dim": 48})
  with pytest.raises(
    UserError, match=r"of another model or optimizer: .*_EFD is float32\[2,4,32,32\]"
  ):
    newest_whole(folder, settings)
  assert workdir.saved_steps(folder) == [8, 12]


class State(NamedTuple):
  weights_DF: jax.Array


def test_whole_files_of_another_state_are_noticed(tmp_path):
  """Storage finds no fault with them: of the same step, names and shapes, with other values."""
  for name, value in (("ours", 1.0), ("theirs", 2.0)):
    saver = checkpoint.Checkpointer.writing(tmp_path / name)
    assert saver.save(1, State(jnp.full((2, 3), value)), 1, 1.0)
    saver.wait()
    saver.close()
  ours, theirs = (tmp_path / name / "checkpoints/1/state" for name in ("ours", "theirs"))
  shutil.rmtree(ours)
  shutil.copytree(theirs, ours)
  like = State(jnp.zeros((2, 3)))
  fields = checkpoint.abstract(like, State(like.weights_DF.sharding))._asdict()
  with (
    contextlib.closing(checkpoint.Checkpointer.reading(tmp_path / "ours")) as reader,
    pytest.raises(DamagedError, match="other values than were saved in weights_DF"),
  ):
    reader.restore_fields(1, fields)


def test_a_state_with_more_arrays_than_the_config_has_is_refused(tmp_path):
  """A part of it can be read, and makes another run."""
  saved = {"weights_DF": jnp.ones((2, 3)), "more_D": jnp.ones(2)}
  with contextlib.closing(checkpoint.Checkpointer.writing(tmp_path)) as saver:
    assert saver.save(1, State(saved), 1, 1.0)
    saver.wait()
  like = State({"weights_DF": jnp.zeros((2, 3))})
  fields = checkpoint.abstract(like, jax.tree.map(lambda x: x.sharding, like))
  with contextlib.closing(checkpoint.Checkpointer.reading(tmp_path)) as reader:
    assert reader.restore_fields(1, fields._asdict())["weights_DF"]["weights_DF"].sum() == 6
    with pytest.raises(DamagedError, match=r"structures do not match: .*more_D"):
      reader.restore(1, fields)


def test_a_state_that_is_not_finite_is_not_saved(tmp_path):
  """It would take the place of one that a run can go on from."""
  with contextlib.closing(checkpoint.Checkpointer.writing(tmp_path)) as saver:
    assert saver.save(1, State(jnp.ones((2, 3))), 1, 2.0)
    for step, bad in enumerate((np.nan, np.inf), 2):
      assert not saver.save(step, State(jnp.ones((2, 3)).at[1, 2].set(bad)), step, 1.0)
    saver.wait()
    assert saver.steps() == [1] and workdir.recorded_step(tmp_path) == 1


def test_a_deletion_that_is_cut_off_leaves_no_part_of_a_checkpoint(tmp_path, monkeypatch):
  """The next start deletes the rest of it, and a process that only reads leaves it alone."""
  cut_off = tmp_path / "checkpoints/deleted/1"
  with monkeypatch.context() as patch:
    patch.setattr(checkpoint, "_delete_all", lambda paths: None)
    saver = checkpoint.Checkpointer.writing(tmp_path)
    for step in (1, 2):
      assert saver.save(step, State(jnp.ones((2, 3))), step, 1.0)
    saver.wait()
    saver.close()
  assert (cut_off / "metrics/metrics").is_file() and workdir.saved_steps(tmp_path) == [2]
  reader = checkpoint.Checkpointer.reading(tmp_path)
  assert reader.steps() == [2]
  reader.close()
  assert cut_off.exists()
  checkpoint.Checkpointer.writing(tmp_path).close()
  assert not cut_off.parent.exists() and workdir.saved_steps(tmp_path) == [2]


def test_a_changed_loss_does_not_decide_which_checkpoints_are_kept(tmp_path, capfd):
  """That of the lowest loss would seem the worst, and would be deleted; it is set aside."""
  keep = (1, 1)
  saver = checkpoint.Checkpointer.writing(tmp_path, *keep)
  for step, loss in enumerate((1.5, 3.0, 2.0), 1):
    assert saver.save(step, State(jnp.ones((2, 3))), step, loss)
  saver.wait()
  saver.close()
  assert workdir.saved_steps(tmp_path) == [1, 3]
  (tmp_path / "checkpoints/1/metrics/metrics").write_text('{"loss": 9.5}')
  checkpoint.Checkpointer.writing(tmp_path, *keep).close()
  assert workdir.saved_steps(tmp_path) == [3] and (tmp_path / "set_aside/1.0/state").is_dir()
  assert capfd.readouterr().err.endswith("set_aside/1.0: the loss is 9.5, not 1.5\n")


def test_the_newest_may_be_replaced_while_it_is_asked_for(tmp_path):
  """By a training that keeps one; the newer one is read then, and is the only one that is."""
  mesh = mesh_of()
  saver = checkpoint.Checkpointer.writing(tmp_path)
  reader, needed = None, {"weights_DF": jax.ShapeDtypeStruct((2, 3), jnp.float32)}
  for step in (1, 2):
    assert saver.save(step, State(jnp.full((2, 3), float(step))), step, 1.0)
    saver.wait()
    reader = reader or checkpoint.Checkpointer.reading(tmp_path)
  assert reader.find(0) == 1
  with pytest.raises(DamagedError, match=r"checkpoints/1 is there no more; other .* there: \[2\]"):
    reader.restore_part(1, needed, mesh)
  step, fields = reader.restore_part(0, needed, mesh)
  assert step == 2 and float(fields["weights_DF"][0, 0]) == 2
  saver.close()
  reader.close()


def test_who_only_reads_gets_no_warning(whole_run, caplog):
  checkpoint.Checkpointer.reading(whole_run.workdir).close()
  assert not caplog.messages


def test_a_checkpoint_that_no_run_needs_is_deleted(tmp_path):
  saver = checkpoint.Checkpointer.writing(tmp_path)
  for step in (1, 2, 3):
    assert saver.save(step, State(jnp.ones((2, 3))), step, 1.0)
  saver.wait()
  saver.close()
  assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["3"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8"])
def test_a_digest_depends_on_every_bit_and_not_on_the_mesh(dtype):
  rng = np.random.default_rng(0)
  x_ED = jnp.asarray(rng.integers(0, 100, (8, 6)), dtype)
  (digest,) = verification.array_digests(x_ED)[0].values()
  mesh = mesh_of(expert=4, fsdp=2)
  where = jax.NamedSharding(mesh, sharding.param_spec("x_ED", x_ED.shape, mesh))
  spread = jax.device_put(x_ED, where)
  assert list(verification.array_digests(spread)[0].values()) == [digest]
  raw = np.asarray(x_ED).view(np.uint8)
  seen = {digest}
  for _ in range(40):
    changed = raw.copy()
    changed[rng.integers(8), rng.integers(raw.shape[1])] ^= 1 << rng.integers(8)
    seen.add(*verification.array_digests(jnp.asarray(changed.view(x_ED.dtype)))[0].values())
  assert len(seen) > 35 and digest in seen  # the same change may be drawn twice
  assert list(verification.array_digests(x_ED[::-1])[0].values()) != [digest]


@contextlib.contextmanager
def no_more_files():
  """No file can be opened in this process."""
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  opened = []
  resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 9, hard))
  try:
    with contextlib.suppress(OSError):
      while True:
        opened.append(os.open(os.devnull, os.O_RDONLY))
    yield
  finally:
    for number in opened:
      os.close(number)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_too_many_open_files_are_no_damage(whole_run, tmp_path):
  """The checkpoint is not set aside, and the run does not go on from an older one."""
  folder = shutil.copytree(whole_run.workdir, tmp_path / "run")
  settings = workdir.read_config(folder)
  assert newest_whole(folder, settings).step == 12  # what is imported late is there now
  with pytest.raises(StorageError, match=r"checkpoints/12.*: Too many open files; the same"):
    newest_whole(folder, settings, no_more_files())
  assert workdir.saved_steps(folder)[-1] == 12


def test_what_says_nothing_of_the_file():
  def raised(error, cause=None):
    error.__cause__ = cause
    return error

  assert why_unread(OSError(errno.EACCES, "")) == "Permission denied"
  assert why_unread(ValueError("UNAVAILABLE: [OS error 116: ESTALE]")) == "Stale file handle"
  assert why_unread(raised(ValueError("x"), MemoryError())) == "Cannot allocate memory"
  for number in (errno.ENOENT, errno.EISDIR):
    assert not why_unread(raised(ValueError("x"), OSError(number, "")))
