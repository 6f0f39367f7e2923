"""Renames a folder without replacing anything, or exchanges two names, each in one step.

Linux has a call for both (renameat2), but Python's os does not. Some file systems (NFS, many FUSE
ones), old kernels and some C libraries lack it. Then the callers do it in another way.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from pathlib import Path

AT_FDCWD = -100  # fcntl.h: relative paths start at the working directory
RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2  # linux/fs.h
# Error numbers of a kernel, file system or sandbox that lacks the call.
UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)


def rename_new(source: Path, target: Path) -> None:
    """Renames the folder `source` to `target`, which must not exist.

    Raises:
        FileExistsError: target exists, even as a dangling link.
        OSError: the system refused.
    """
    if _renameat2(source, target, RENAME_NOREPLACE):
        return
    # Without renameat2, the rename below can only replace an empty folder made after this check.
    if os.path.lexists(target):
        raise _exists(target)
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise _exists(target) from None
        raise


def exchange(one: Path, other: Path) -> bool:
    """Exchanges the names of two folders. Neither name is missing at any time.

    Returns False if the system cannot do it. Raises OSError if it refused.
    """
    return _renameat2(one, other, RENAME_EXCHANGE)


def _renameat2(source: Path, target: Path, flags: int) -> bool:
    call = _find_renameat2()
    if call is None:
        return False
    # As os.rename does, so that audit hooks see this rename too.
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
