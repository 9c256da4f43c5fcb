"""Train seq-JEPA and its relatives: `seqjepa.kernels`, `seqjepa.loaders`, `seqjepa.engine`, `seqjepa.configs`.

In an installation this file is `seqjepa/__init__.py` (pyproject.toml says so). With it, an installed package comes
before a folder named seqjepa, as a clone may be, that lies where Python starts.
"""
