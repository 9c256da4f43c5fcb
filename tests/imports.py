"""The import graph of the project, read from its source. `python tests/imports.py graph.png` draws it."""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# the packages, lowest first: a module imports only from its own package and from those below it
ENGINE = ["runtime", "runs", "models", "objectives", "analysis", "reports", "evaluation", "training"]
ROOMS = ["kernels.internal", "kernels", "kernels.drop_in", "configs", "loaders", "engine config"]
ROOMS += [*(f"engine.{name}" for name in ENGINE), "commands"]


def room(module: str) -> str:
    """The package that holds a module, given by its name without `seqjepa.`."""
    if module.startswith("engine.") and module.endswith(".config"):  # no torch
        return "engine config"
    return max((known for known in ROOMS if f"{module}.".startswith(f"{known}.")), key=len, default="commands")


def graph() -> dict[str, set[str]]:
    """The modules of the project that each of its modules imports, also within functions."""
    paths = [path for top in ("configs", "kernels", "loaders", "engine") for path in sorted((ROOT / top).rglob("*.py"))]
    names = [".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in paths]
    found: dict[str, set[str]] = {name: set() for name in names}
    for module, path in zip(names, paths, strict=True):
        package = module.split(".")[: None if path.stem == "__init__" else -1]
        for node in ast.walk(ast.parse(path.read_text())):
            targets = (
                [alias.name.removeprefix("seqjepa.") for alias in node.names] if isinstance(node, ast.Import) else []
            )
            if isinstance(node, ast.ImportFrom):
                above = package[: len(package) + 1 - node.level] if node.level else []
                base = ".".join([*above, *filter(None, [(node.module or "").removeprefix("seqjepa.")])])
                targets = [name if (name := f"{base}.{alias.name}") in found else base for alias in node.names]
            found[module] |= {target for target in targets if target in found and target != module}
    return found


def draw(path: str) -> None:
    from matplotlib.figure import Figure

    edges = {(room(a), room(b)) for a, targets in graph().items() for b in targets if room(a) != room(b)}
    axes = (figure := Figure((7, 8.5), layout="constrained")).add_subplot()
    for high, low in sorted((ROOMS.index(above), ROOMS.index(below)) for above, below in edges):
        color, bend = ("C0", 0.12 + 0.03 * (high - low)) if high > low else ("C3", -0.4)
        style = {"arrowstyle": "-|>", "color": color, "alpha": 0.5, "connectionstyle": f"arc3,rad={bend}"}
        axes.annotate("", (0, low + 0.2), (0, high - 0.2), arrowprops=style)
    for height, name in enumerate(ROOMS):
        count = sum(room(module) == name for module in graph())
        axes.text(0, height, f"{name}  ({count})", ha="center", va="center", bbox={"boxstyle": "round", "fc": "white"})
    axes.set(xlim=(-1.5, 1.5), ylim=(-0.7, len(ROOMS) - 0.3))
    axes.set_axis_off()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw(sys.argv[1])
