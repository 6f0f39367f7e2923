"""Renaming a folder so that nothing is replaced, and exchanging two names, each in one step.

Linux has both (renameat2); Python's os has neither. Some file systems lack them (NFS, many FUSE
ones), and so do old kernels and some C libraries: the callers have another way then.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from pathlib import Path

AT_FDCWD = -100  # fcntl.h: relative paths start at the working directory
RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2  # linux/fs.h
# What a kernel, a file system or a sandbox answers that does not have it.
UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)


def rename_new(source: Path, target: Path) -> None:
    """Gives the folder `source` the name `target`, which nothing may have.

    Raises:
        FileExistsError: target exists, be it a dangling link.
        OSError: the system refused.
    """
    if _renameat2(source, target, RENAME_NOREPLACE):
        return
    # Without renameat2 a rename replaces at most an empty folder, made since this look.
    if os.path.lexists(target):
        raise _exists(target)
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise _exists(target) from None
        raise


def exchange(one: Path, other: Path) -> bool:
    """Lets two folders change names: neither name is missing at any time.

    Returns False where the system cannot; OSError where it refused.
    """
    return _renameat2(one, other, RENAME_EXCHANGE)


def _renameat2(source: Path, target: Path, flags: int) -> bool:
    call = _find_renameat2()
    if call is None:
        return False
    # As os.rename does: whoever audits file operations sees this one too.
    sys.audit("os.rename", str(source), str(target), -1, -1)
    if call(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), flags) == 0:
        return True
    number = ctypes.get_errno()
    if number in UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(source), None, str(target))


def _find_renameat2():
    """The C library's function, or None."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return None
    call.argtypes = (
        ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint
    )  # fmt: skip
    return call


def _exists(target: Path) -> FileExistsError:
    return FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
