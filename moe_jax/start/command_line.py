"""From sys.argv to a Config, with one line for whatever is wrong with either, and back to text."""

import contextlib
import copy
import dataclasses
import enum
import errno
import functools
import io
import operator
import os
import pathlib
import re
import runpy
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging

from moe_jax.config import Config
from moe_jax.config.fields import flatten, from_plain, plain, spelled
from moe_jax.config.run import changes, field_names, unknown_field
from moe_jax.errors import StorageError, UserError, end, is_storage, notice
from moe_jax.storage import files
from moe_jax.storage import workdir as workdir_lib

CACHE_DIR = "folder of tokens and compiled programs ($MOE_JAX_CACHE, else the user's cache)"


def run(main: Callable[..., None], *, overrides: bool = False) -> None:
  """Parses sys.argv into absl flags and calls `main`; see `one_line_errors`.

  With `overrides`, for a script without --config, `main` gets those of `take_overrides`. Every
  script has the flag --cache_dir.
  """
  flags.DEFINE_string("cache_dir", "", CACHE_DIR)
  flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS["cache_dir"])  # for --help
  given_overrides: list[dict[str, Any]] = []

  def parse(argv: list[str]) -> list[str]:
    if "--help" in argv:
      print(help_text(overrides))
      sys.exit()
    if overrides:
      given, argv = take_overrides(argv)
      given_overrides.append(given)
    _check_config_arguments(argv)
    rest = flags.FLAGS(argv)
    if len(rest) > 1:
      raise UserError(f"unexpected argument {rest[1]!r}: options start with --")
    set_cache(flags.FLAGS.cache_dir)
    if not flags.FLAGS["verbosity"].present:
      quiet()
    return rest

  one_line_errors(lambda: app.run(lambda _: main(*given_overrides), flags_parser=parse))


def quiet() -> None:
  """Silences Orbax, which logs every step of every save, and errors that it also raises."""
  logging.set_verbosity(logging.FATAL)


def multihost_flags() -> tuple["flags.FlagHolder[bool]", "flags.FlagHolder[int]"]:
  """Defines --multihost and --heartbeat_timeout, for a script that may be one of several."""
  multihost = flags.DEFINE_bool("multihost", False, "this is one of several processes")
  what = "with --multihost: seconds without a heartbeat until a process counts as lost"
  timeout = flags.DEFINE_integer("heartbeat_timeout", 60, what, lower_bound=5)
  for flag in (multihost, timeout):
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[flag.name])  # for --help
  return multihost, timeout


def set_cache(folder: str) -> None:
  """Makes --cache_dir=folder the cache of this process and of those that it starts."""
  if "://" in folder:
    raise UserError(f"--cache_dir={folder}: the cache is a folder on this machine")
  if folder:
    os.environ["MOE_JAX_CACHE"] = os.path.abspath(os.path.expanduser(folder))


def help_text(overrides: bool = False) -> str:
  """Returns the text of --help: a script's docstring, its flags, and the fields it can set."""
  from moe_jax.config import docs as config_docs

  parts = [sys.modules["__main__"].__doc__ or "", flags.FLAGS.main_module_help()]
  if overrides or "config" in flags.FLAGS:
    parts.append("fields, --config.SECTION.FIELD=VALUE (docs/config.md):\n\n" + config_docs.text())
  return "\n\n".join(part.strip("\n") for part in parts)


def one_line_errors(main: Callable[[], None], end: Callable[[int], NoReturn] = end) -> None:
  """Calls `main`; a UserError becomes one line on stderr and its class's exit code.

  A reader of the output that closes it, as `head` does, ends the program as SIGPIPE would: 141.
  Ctrl-C ends it as SIGINT would: 130.
  """
  _open_streams()
  sys.unraisablehook = functools.partial(_end_if_interrupted, sys.unraisablehook)
  try:
    try:
      main()
    finally:
      sys.stdout.flush()
  except KeyboardInterrupt:
    sys.exit(128 + signal.SIGINT)
  except (UserError, flags.Error) as error:
    notice(f"error: {error}")
    end(error.code if isinstance(error, UserError) else UserError.code)
  except BrokenPipeError:  # the reader has what it wanted, as `head` does
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(128 + signal.SIGPIPE)
  except Exception as error:
    if not is_storage(error):
      raise
    name, text = getattr(error, "filename", None), getattr(error, "strerror", None)
    notice(f"error: {name or 'a file'}: {text}" if text else f"error: {str(error)[:300]}")
    end(StorageError.code)


@contextlib.contextmanager
def importing() -> Iterator[None]:
  """Lets Ctrl-C end the program at once: raised inside a library that starts, it would abort."""
  handler = signal.getsignal(signal.SIGINT)
  if handler is signal.default_int_handler:  # and not ignored, as under nohup
    signal.signal(signal.SIGINT, signal.SIG_DFL)
  try:
    yield
  finally:
    signal.signal(signal.SIGINT, handler)


def _end_if_interrupted(hook: Callable[..., Any], lost: "sys.UnraisableHookArgs") -> None:
  """Ends the program at a Ctrl-C that Python would lose, as it does inside jax's hook of gc."""
  if lost.exc_type is KeyboardInterrupt:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.raise_signal(signal.SIGINT)
  hook(lost)


def _open_streams() -> None:
  """Makes stdin, stdout and stderr safe to use, however this process was started.

  Where one is closed, the next file that is opened would take its number, and what libraries print
  would be written into that file.
  """
  for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
    if getattr(sys, name) is None:
      null = os.open(os.devnull, os.O_RDWR)
      os.dup2(null, number)
      setattr(sys, name, os.fdopen(number, mode))
  if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may not have all characters


def _check_config_arguments(argv: list[str]) -> None:
  # config_flags reports these with a traceback, so look first.
  seen_file = False
  for position, argument in enumerate(argv[1:], 1):
    name, equals, value = argument.lstrip("-").partition("=")
    if name == "config":
      if seen_file:
        raise UserError(f"{argument}: --config is given twice; name one file")
      seen_file = True
      load_file(value if equals else argv[position + 1] if position + 1 < len(argv) else "")
    elif name.startswith("config.") and name.removeprefix("config.") not in field_names():
      raise UserError(unknown_field(name.removeprefix("config."), argument))
    elif name.startswith("config.") and not seen_file:
      raise UserError(f"{argument}: --config is missing before it, --config=configs/tiny_moe.py")


def load_file(path: str) -> Config:
  """Runs `get_config()` of a Python file, with one-line errors for what can go wrong in it.

  FILE.py:WORD runs `get_config("WORD")`. The workdir of a run or an import stands for its config.
  """
  arguments = []
  if path and not os.path.isfile(path):
    workdir = workdir_lib.open_path(path)
    if files.exists(workdir / workdir_lib.CONFIG):
      with importing():
        return workdir_lib.read_config(workdir)
  if not os.path.isfile(path) and ":" in path:
    path, _, word = path.partition(":")
    arguments = [word]
  if not os.path.isfile(path):
    shipped = sorted(p.stem for p in pathlib.Path("configs").glob("*.py"))
    raise UserError(f"--config={path}: no such file and no workdir of a run (in configs/: "
                    f"{', '.join(shipped)})")  # fmt: skip
  if not path.endswith(".py"):
    raise UserError(f"--config={path}: not a Python file; name one that ends in .py")
  return run_file(path, "get_config", Config, *arguments)[0]


def run_file(path: str, name: str, kind: type, *arguments: str) -> tuple[Any, str]:
  """Returns what a function of a user's file returns, and the file's docstring.

  Raises:
    UserError: the file or the function fails, with the line, or it returns another kind.
  """
  try:
    module = runpy.run_path(path)
    if name not in module:
      raise UserError(f"it defines no {name}(), which has to return a {kind.__name__}")
    value = module[name](*arguments)
  except UserError as error:
    raise UserError(f"{_place(error, path)}: {error}") from None
  except (Exception, SystemExit) as error:  # whatever the file does wrong, say where
    raise UserError(_explain(error, path)) from None
  if not isinstance(value, kind):
    raise UserError(f"{path}: {name}() returned {type(value).__name__}, not a {kind.__name__}")
  return value, (module["__doc__"] or "").strip()


def _place(error: BaseException, path: str) -> str:
  frames = traceback.extract_tb(error.__traceback__)
  lines = [f.lineno for f in frames if os.path.abspath(f.filename) == os.path.abspath(path)]
  return f"{path}:{lines[-1]}" if lines else path


def _explain(error: BaseException, path: str) -> str:
  where = _place(error, path)
  if isinstance(error, SyntaxError):
    where = f"{error.filename or path}:{error.lineno or 1}"
  message = error.msg if isinstance(error, SyntaxError) else str(error)
  argument = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", message)
  attribute = re.match(r"'(\w+)' object has no attribute '(\w+)'", message)
  unknown = argument or attribute
  paths = {"Config": ""} | {type(value).__name__: name + "." for name, value in sections(Config())}
  if unknown and unknown[1] in paths:
    return unknown_field(paths[unknown[1]] + unknown[2], where)
  return f"{where}: {type(error).__name__}: {message}"


def check_folder(flag: str, path: str) -> None:
  """Refuses a folder in which nothing can be made; a folder that is missing stays missing.

  Raises:
    StorageError: the disk is read-only or full.
    UserError: the path goes through a file, has too long a name, or belongs to somebody else.
  """
  if "://" in path:
    return  # no folder here; workdir.open_path says whether it can be used
  there, missing = os.path.abspath(path), [""]
  try:
    while not os.path.lexists(there):
      there, name = os.path.split(there)
      missing.append(name)
    longest = max(len(os.fsencode(name)) for name in missing)
    whole = len(os.fsencode(os.path.abspath(path)))
    if longest > os.pathconf(there, "PC_NAME_MAX") or whole >= os.pathconf(there, "PC_PATH_MAX"):
      raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    os.rmdir(tempfile.mkdtemp(prefix=".moe_jax-", dir=there))
  except OSError as error:
    kind = StorageError if is_storage(error) else UserError
    raise kind(
      f"--{flag}={path}: no folder can be made in {there} ({error.strerror}); name another folder"
    ) from None


def take_overrides(arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
  """Splits arguments into overrides, {"train.steps": 20} of --config.train.steps=20, and the rest.

  A field that is given twice has the last value.
  """
  values: dict[str, Any] = {}
  others = []
  for argument in arguments:
    name, equals, value = argument.lstrip("-").partition("=")
    if not argument.startswith("-") or not name.startswith("config."):
      others.append(argument)
      continue
    name = name.removeprefix("config.")
    if name not in field_names():
      raise UserError(unknown_field(name, argument))
    kind = type(operator.attrgetter(name)(Config()))
    if not equals or (kind is bool and value not in ("true", "false")):
      raise UserError(f"{argument}: write --config.{name}={'true' if kind is bool else 'VALUE'}")
    try:
      values[name] = value == "true" if kind is bool else kind(value)
    except ValueError:
      choices = ", ".join(m.value for m in kind) if issubclass(kind, enum.Enum) else kind.__name__
      raise UserError(f"{argument}: {value!r} is not of {choices}") from None
  return values, others


def override(config: Config, fields: dict[str, Any], where: str) -> Config:
  """A copy with {"model.moe.top_k": 1, ...} set; enums by member or value. Not validated.

  Args:
    where: begins the UserError about a field that there is not.
  """
  changed = copy.deepcopy(config)
  for name, value in fields.items():
    if name not in field_names():
      raise UserError(unknown_field(name, where))
    path, leaf = name.rsplit(".", 1)
    section = operator.attrgetter(path)(changed)
    (field,) = (f for f in dataclasses.fields(section) if f.name == leaf)
    setattr(section, leaf, from_plain(field, name, plain(value)))
  return changed


def words(base: Config, config: Config) -> list[str]:
  """Returns the arguments, such as --config.model.moe.top_k=1, that turn `base` into `config`."""
  return [f"--config.{n}={spelled(v)}" for n, v in changes(base, config).items()]


def difference(config: Config) -> str:
  """Returns a line for each changed field: "config.model.moe.top_k = 1   (default 2)"."""
  defaults = flatten(Config())
  lines = [
    f"config.{name} = {spelled(value)}   (default {spelled(defaults[name]) or 'empty'})"
    for name, value in changes(Config(), config).items()
  ]
  return "\n".join(lines) or "every field has its default"


def clock(seconds: float) -> str:
  """3661.2 -> '1:01:01'."""
  seconds = round(seconds)
  return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def sections(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
  """(name, section) of each section of a config, nested ones too."""
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      yield prefix + field.name, value
      yield from sections(value, f"{prefix}{field.name}.")
