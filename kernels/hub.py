"""Write this package as a folder for Hugging Face's Hub; nothing is uploaded."""

import argparse
import json
import sys
from base64 import b64encode
from hashlib import sha256
from importlib.metadata import files, metadata
from pathlib import Path

from . import __all__ as functions
from .layers import __all__ as layers

OPS = 'import torch\n\nops = torch.ops.{id}\nadd_op_namespace_prefix = "{id}::{{}}".format\n'
CARD = """---\nlibrary_name: kernels\nlicense: {license}\ntags: [kernel, triton]\n---\n\n# seqjepa-kernels\n
seqjepa.kernels {release}, in Python and Triton, for {torch} and kernels>=0.16.\n
```python\nimport torch\nfrom kernels import get_kernel\n
kernels = get_kernel("OWNER/seqjepa-kernels", version={version}, trust_remote_code=["OWNER/seqjepa-kernels"])
z = torch.randn(512, 64, requires_grad=True)\nrate = kernels.coding_rate(z, eps=0.5)\nrate.backward()\n```\n
- Functions and modules: {functions}.
- Layers, for `kernelize`: {layers}. Their docstrings say which attributes they need.
- Triton kernels run on NVIDIA GPUs, Ampere and newer. CPUs run plain torch, with the same results up to rounding.
- Nothing can be differentiated twice, and a `torch.export` program needs the version that saved it.
- While the version is 0, names and arguments may change.\n"""


def write(folder: Path) -> None:
    """Write build/torch-cpu, build/torch-cuda, a card and the licence into `folder`."""
    about, here = metadata("seqjepa"), Path(__file__).parent
    common = {"name": "seqjepa-kernels", "license": about["License-Expression"].lower(), "kernels-minver": "0.16.0"}
    common |= {"version": int(about["Version"].partition(".")[0]), "python-depends": []}
    facts = {"release": about["Version"], "functions": ", ".join(functions), "layers": ", ".join(layers)}
    facts["torch"] = next(name for name in about.get_all("Requires-Dist", []) if name.startswith("torch>"))
    texts = {path.name: path.read_text("utf-8") for path in files("seqjepa") or [] if path.name == "LICENSE"}
    texts["README.md"] = CARD.format(**common, **facts)
    sources = {path.relative_to(here).as_posix(): path.read_text("utf-8") for path in sorted(here.rglob("*.py"))}
    del sources["hub.py"]
    sources["__init__.py"] += "\nfrom . import layers\n"
    unique = sha256(json.dumps(sources).encode()).hexdigest()[:12]
    # Triton compiles for the GPU that it finds: Ampere, or any newer one
    for backend in ({"type": "cpu"}, {"type": "cuda", "archs": ["8.0+PTX"]}):
        known = common | {"id": f"_seqjepa_kernels_{backend['type']}_{unique}", "backend": backend}
        built = sources | {"_ops.py": OPS.format(**known)}
        hashes = {name: b64encode(sha256(text.encode()).digest()).decode() for name, text in built.items()}
        known["digest"] = {"algorithm": "sha256", "files": hashes}
        built["metadata.json"] = json.dumps(known, indent=2)
        texts |= {f"build/torch-{backend['type']}/{name}": text for name, text in built.items()}
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.encode())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m seqjepa.kernels.hub", description=__doc__)
    parser.add_argument("folder", type=Path, help="to write into: new, or empty")
    folder = parser.parse_args().folder
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        sys.exit(f"{folder} is not an empty folder")
    write(folder)
