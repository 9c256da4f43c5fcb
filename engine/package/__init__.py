"""Train seq-JEPA and its relatives: `seqjepa.kernels`, `seqjepa.loaders`, `seqjepa.engine`, `seqjepa.configs`.

`seqjepa.train`, `seqjepa.load_encoder` and the other names in `__all__` are imported when they are first used, so that
`import seqjepa.kernels` needs no more than torch.

In an installation this file is `seqjepa/__init__.py` (pyproject.toml says so). With it, an installed package comes
before a folder named seqjepa, as a clone may be, that lies where Python starts.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seqjepa.configs.errors import InputError as InputError
    from seqjepa.engine.api import Result as Result
    from seqjepa.engine.api import RunFailed as RunFailed
    from seqjepa.engine.api import train as train
    from seqjepa.engine.encoder import Encoder as Encoder
    from seqjepa.engine.encoder import load_encoder as load_encoder

_PLACES = {
    "InputError": "configs.errors",
    "Result": "engine.api",
    "RunFailed": "engine.api",
    "train": "engine.api",
    "Encoder": "engine.encoder",
    "load_encoder": "engine.encoder",
}
__all__ = ["Encoder", "InputError", "Result", "RunFailed", "load_encoder", "train"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("seqjepa")
    if name in _PLACES:
        try:
            return getattr(importlib.import_module(f".{_PLACES[name]}", __name__), name)
        except ModuleNotFoundError as error:
            how = "pip install 'seqjepa[train]', in a clone '.[train]'"
            missing = f"seqjepa.{name} needs {error.name}, which is not installed: {how}"
            raise ImportError(missing, name=error.name) from error
    raise AttributeError(f"module 'seqjepa' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])
