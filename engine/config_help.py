"""The page that `--help` prints: every field with its doc, default and range, grouped by section."""

from __future__ import annotations

import textwrap

from pydantic import BaseModel

from seqjepa.engine.compose import CONFIGS, describe
from seqjepa.engine.config import Config

__all__ = ["help_page"]

USAGE = """\
usage: accelerate launch engine/train.py [CONFIG.yaml ...] [section.key=value ...] [--print-config] [--help]

Trains seq-JEPA. YAML files merge left to right, then overrides; without a file, configs/smoke.yaml.
  accelerate launch engine/train.py configs/data/cifar10_rot.yaml configs/tier/quick.yaml data.root=data/cifar10

--print-config   show the resolved config and stop
--help           show this page and stop

Exit codes: 0 done, 1 an enforced gate failed, 2 bad input, 3 diverged, 4 the machine failed the run,
128 + signal when interrupted (`accelerate launch` makes every failure 1)."""


def help_page(width: int = 110) -> str:
    """The help page, `width` columns wide."""
    files = sorted(
        p.relative_to(CONFIGS.parent).as_posix() for p in CONFIGS.rglob("*.yaml") if p.parent.name != "accelerate"
    )
    lines = [USAGE, "", *textwrap.wrap("Configs: " + ", ".join(files), width, subsequent_indent=" " * 9)]
    for name, section in Config.model_fields.items():
        model: type[BaseModel] = section.annotation
        lines += ["", f"{name}: {' '.join(model.__doc__.split())}"]
        for key, field in model.model_fields.items():
            lines.append(f"  {name}.{key} = {_yaml(field.default)}   [{describe(field)}]")
            lines += textwrap.wrap(field.description, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def _yaml(value: object) -> str:
    """A default as it would stand in a config."""
    return str({"None": "null", "True": "true", "False": "false"}.get(str(value), value))
