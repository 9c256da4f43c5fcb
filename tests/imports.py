"""The import graph of the project, read from its source. `python tests/imports.py graph.png` draws it."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# the rooms of the house, lowest first: a module imports from its own room and from those below it
ROOMS = ("kernels", "kernels.drop_in", "configs", "loaders", "engine config", "engine.runtime", "engine.runs")
ROOMS += ("engine.models", "engine.objectives", "engine.analysis", "engine.reports", "engine.evaluation")
ROOMS += ("engine.training", "commands")


def room(module: str) -> str:
    """The room that a module, by its name without `seqjepa.`, stands in."""
    package, _, name = module.rpartition(".")
    if package.startswith("engine") and name in ("config", "compose"):  # sections stand apart: `--help` needs no torch
        return "engine config"
    if package == "engine" and (ROOT / "engine" / f"{name}.py").exists():
        return "commands"
    return max((known for known in ROOMS if f"{module}.".startswith(f"{known}.")), key=len, default="commands")


def graph() -> dict[str, set[str]]:
    """The modules of the project that each of its modules imports."""
    paths = {}
    for top in ("configs", "kernels", "loaders", "engine"):
        for path in sorted((ROOT / top).rglob("*.py")):
            paths[".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")] = path
    found: dict[str, set[str]] = {}
    for module, path in paths.items():
        package = module.split(".") if path.stem == "__init__" else module.split(".")[:-1]
        found[module] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                targets = [alias.name.removeprefix("seqjepa.") for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                above = package[: len(package) + 1 - node.level] if node.level else []
                base = [*above, *(node.module or "").removeprefix("seqjepa.").split(".")]
                base = ".".join(part for part in base if part)
                targets = [name if (name := f"{base}.{alias.name}") in paths else base for alias in node.names]
            else:
                continue
            found[module] |= {target for target in targets if target in paths and target != module}
    return found


def draw(path: str) -> None:
    from matplotlib.figure import Figure

    heights = {name: number for number, name in enumerate(ROOMS)}
    edges = {(room(a), room(b)) for a, targets in graph().items() for b in targets if room(a) != room(b)}
    axes = (figure := Figure((7, 8.5), layout="constrained")).add_subplot()
    for above, below in sorted(edges):
        high, low = heights[above], heights[below]
        color, bend = ("C0", 0.12 + 0.03 * (high - low)) if high > low else ("C3", -0.4)
        style = {"arrowstyle": "-|>", "color": color, "alpha": 0.5, "connectionstyle": f"arc3,rad={bend}"}
        axes.annotate("", (0, low + 0.2), (0, high - 0.2), arrowprops=style)
    for name, height in heights.items():
        count = sum(room(module) == name for module in graph())
        axes.text(0, height, f"{name}  ({count})", ha="center", va="center", bbox={"boxstyle": "round", "fc": "white"})
    axes.set(xlim=(-1.5, 1.5), ylim=(-0.7, len(ROOMS) - 0.3))
    axes.set_axis_off()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw(sys.argv[1])
