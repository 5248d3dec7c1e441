"""From sys.argv to a Config, with one line for whatever is wrong with either, and back to text."""

import argparse
import contextlib
import dataclasses
import difflib
import enum
import errno
import faulthandler
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

from absl import logging

from moe_jax.config import Config
from moe_jax.config.fields import Bounds, flatten, spelled
from moe_jax.config.run import changes, field_names, unknown_field
from moe_jax.errors import StorageError, UserError, end, is_storage, notice
from moe_jax.storage import files
from moe_jax.storage import workdir as workdir_lib

PLATFORM_FLAGS = "MOE_JAX_PLATFORM_FLAGS"  # "off" in this process and in those that it starts


class Parser(argparse.ArgumentParser):
  """Reads sys.argv; a mistake in it is a UserError. Every command has --cache_dir and more.

  Args:
    doc: the docstring of the command, which --help prints.
    fields: whether it takes --config.SECTION.FIELD=VALUE, as args.overrides; --help lists them.
  """

  def __init__(self, doc: str | None, *, fields: bool = False) -> None:
    style, none = argparse.RawDescriptionHelpFormatter, argparse.SUPPRESS
    super().__init__(description=doc, usage=none, allow_abbrev=False, formatter_class=style)
    self._fields = fields
    self.flag("cache_dir", "", "folder of tokens and programs ($MOE_JAX_CACHE or the user's cache)")
    self.flag("platform_flags", "on", "whether the flags of flags.toml are set", ["on", "off"])

  def flag(self, name: str, default: Any, help: str, choices: Any = None, **bounds: Any) -> None:
    """Adds --NAME, of the type of its default.

    Where that is False the flag has no value; a list is words with commas between them.
    """
    if default is False:
      self.add_argument(f"--{name}", action="store_true", help=help)
      return

    def read(text: str) -> Any:
      if isinstance(default, list):
        return [word.strip() for word in text.split(",")] if text else []
      value = type(default)(text)
      if bounds and (wrong := Bounds(**bounds).wrong(value)):
        raise argparse.ArgumentTypeError(f"{text} {wrong}")
      return value

    read.__name__ = type(default).__name__  # which argparse says of text that is no number
    help += f" ({default})" if default else ""
    self.add_argument(f"--{name}", type=read, default=default, help=help, choices=choices)

  def multihost_flags(self) -> None:
    """Adds those of a script that can be one of several processes."""
    self.flag("multihost", False, "this is one of several processes")
    what = "with --multihost: seconds without a heartbeat until a process counts as lost"
    self.flag("heartbeat_timeout", 60, what, at_least=5)

  def read(self) -> argparse.Namespace:
    """Returns the arguments, and sets the cache and the logging of this process."""
    overrides, rest = take_overrides(sys.argv[1:]) if self._fields else ({}, sys.argv[1:])
    args, unknown = self.parse_known_args(rest, argparse.Namespace(overrides=overrides))
    if unknown:
      flag = unknown[0].partition("=")[0]
      close = difflib.get_close_matches(flag, self._option_string_actions, 1)
      near = f"; the nearest is {close[0]}" if close else ": options start with --"
      raise UserError(f"unexpected argument {unknown[0]!r}{near}")
    set_cache(args.cache_dir)
    if args.platform_flags == "off":
      os.environ[PLATFORM_FLAGS] = "off"
    logging.use_absl_handler()
    logging.set_verbosity(logging.FATAL)  # Orbax logs every step of a save, and errors it raises
    faulthandler.enable(2)  # a crash in compiled code says from where it was called
    return args

  def format_help(self) -> str:
    text = super().format_help()
    if self._fields:
      from moe_jax.config import docs

      text += "\nfields, --config.SECTION.FIELD=VALUE (docs/config.md):\n\n" + docs.text()
    return text

  def error(self, message: str) -> NoReturn:
    raise UserError(message.removeprefix("argument "))


def set_cache(folder: str) -> None:
  """Makes --cache_dir=folder the cache of this process and of those that it starts."""
  if "://" in folder:
    raise UserError(f"--cache_dir={folder}: the cache is a folder on this machine")
  if folder:
    os.environ["MOE_JAX_CACHE"] = os.path.abspath(os.path.expanduser(folder))


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
  except UserError as error:
    notice(f"error: {error}")
    end(error.code)
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
    raise UserError(
      f"--config={path}: no such file and no workdir of a run (in configs/: {', '.join(shipped)})"
    )
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
  except (Exception, SystemExit) as error:  # whatever the file does wrong, say where
    raise UserError(_explain(error, path)) from None
  if not isinstance(value, kind):
    raise UserError(f"{path}: {name}() returned {type(value).__name__}, not a {kind.__name__}")
  return value, (module["__doc__"] or "").strip()


def _explain(error: BaseException, path: str) -> str:
  frames = traceback.extract_tb(error.__traceback__)
  lines = [f.lineno for f in frames if os.path.abspath(f.filename) == os.path.abspath(path)]
  where, message = f"{path}:{lines[-1]}" if lines else path, str(error)
  if isinstance(error, UserError):
    return f"{where}: {message}"
  if isinstance(error, SyntaxError):
    where, message = f"{error.filename or path}:{error.lineno or 1}", error.msg
  # The second is what Python 3.11 says of a field that there is not.
  if isinstance(error, dataclasses.FrozenInstanceError) or message.startswith("super(type, obj)"):
    frame = frames[-2]  # that called __setattr__
    return (
      f"{frame.filename}:{frame.lineno}: {frame.line}: a config does not change; "
      'make another: override(config, {"model.moe.top_k": 1}), or dataclasses.replace'
    )
  what = r"(?:\.__init__\(\) got an unexpected keyword argument|' object has no attribute)"
  unknown = re.match(rf"'?(\w+){what} '(\w+)'", message)
  sections = {name.rpartition(".")[0] for name in field_names()}
  paths = {type(operator.attrgetter(name)(Config())).__name__: name + "." for name in sections}
  paths["Config"] = ""
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
  """Splits arguments into {"train.steps": 20} of --config.train.steps=20, and the rest."""
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
