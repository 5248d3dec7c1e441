"""The errors that end a program with one line, and its exit codes (docs/reliability.md)."""

import errno

# Errors of the operating system that mean "this disk cannot be written (or read) now".
_STORAGE = {
  errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG, errno.ESTALE, errno.ENOTCONN,
}  # fmt: skip


class UserError(ValueError):
  """A mistake that one line explains: the field, its value, and the remedy."""

  code = 2  # the exit code


class StorageError(UserError):
  """A disk is full, read-only or gone. The same command goes on once it can be written again."""

  code = 3


class DamagedError(UserError):
  """A file of a run is not what was written, and nothing whole can take its place."""

  code = 4


class BusyError(UserError):
  """Another process is training in this workdir."""

  code = 5


class PeerError(UserError):
  """Another process of the run is gone. The same command on all hosts goes on."""

  code = 7  # 6 is training.health.StopAlarm


def is_storage(error: OSError) -> bool:
  """Returns whether the error means that a disk cannot be used now."""
  return error.errno in _STORAGE
