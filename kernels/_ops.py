"""The namespace of this package's operators. The Kernel Hub's builder puts a module with the same two names here.

It is a function of the package's name and source. So two copies or two versions in one process do not replace each
other's operators, and Inductor, which keeps compiled graphs on disk by the names of operators, never runs a graph of
before an operator changed. A package that is imported anew in one process gets a number besides: its functions of
before, which somebody may still hold, keep their operators.
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
"""The operators, by name: `ops.sigreg.default`."""


def add_op_namespace_prefix(op_name: str) -> str:
    """Name under which an operator is registered."""
    return f"{_namespace}::{op_name}"
