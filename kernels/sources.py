"""Whether the shared library of CPU kernels was made of the C++ sources that are there."""

import ctypes
import hashlib
from pathlib import Path


def check_sources(handle: ctypes.CDLL, path: Path, folder: Path) -> None:
    """Raise a RuntimeError if `folder` has C++ sources and others made the library at `path`."""
    files = [path for kind in ("*.cpp", "*.h") for path in folder.rglob(kind)]
    if not files:  # an installed wheel
        return
    digests = sorted(hashlib.sha256(path.read_bytes()).hexdigest() for path in files)
    try:
        handle.lk_sources.restype = ctypes.c_char_p
        made_of = handle.lk_sources().decode()
    except AttributeError:  # older than this check
        made_of = None
    if made_of != hashlib.sha256(";".join(digests).encode()).hexdigest():
        raise RuntimeError(
            f"{path} was made of other sources than those in {folder}; build it again "
            "(pip install -e .)"
        )
