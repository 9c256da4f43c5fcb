"""The namespace of this package's operators. The Kernel Hub's builder puts a module with the same two names here.

It is a function of the package's name and source. So two copies or two versions in one process do not replace each
other's operators, and Inductor, which keeps compiled graphs on disk by the names of operators, never runs a graph of
before an operator changed.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

__all__ = ["add_op_namespace_prefix", "ops"]

_sources = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.rglob("*.py")))
_namespace = f"seqjepa_{hashlib.sha256(__package__.encode() + _sources).hexdigest()[:12]}"

ops = getattr(torch.ops, _namespace)
"""The operators, by name: `ops.sigreg.default`."""


def add_op_namespace_prefix(op_name: str) -> str:
    """Name under which an operator is registered."""
    return f"{_namespace}::{op_name}"
