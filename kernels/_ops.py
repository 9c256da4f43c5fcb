"""The namespace of this package's operators. Hugging Face's kernel builder puts a module with the same two names here.

The namespace is a hash of the package's name and source. Two copies or versions in one process therefore do not
overwrite each other's operators, and Inductor, whose cache on disk goes by operator names, never runs a graph that was
compiled before an operator changed. If the package is imported a second time in one process, a number is appended:
functions of the first import may still be in use and keep their operators.
"""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

import torch

__all__ = ["add_op_namespace_prefix", "ops"]

_sources = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.rglob("*.py")))
_name = f"seqjepa_{hashlib.sha256(__name__.encode() + _sources).hexdigest()[:12]}"
_taken = {operator.split("::")[0] for operator in torch._C._dispatch_get_all_op_names()}
_numbered = itertools.chain([_name], (f"{_name}_{number}" for number in itertools.count(2)))
_namespace = next(name for name in _numbered if name not in _taken)

ops = getattr(torch.ops, _namespace)
"""The operators by name, for example `ops.sigreg.default`."""


def add_op_namespace_prefix(op_name: str) -> str:
    """The operator's name with this package's namespace, as it is registered."""
    return f"{_namespace}::{op_name}"
