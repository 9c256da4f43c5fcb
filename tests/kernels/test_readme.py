"""The page for users of other codebases: each of its snippets runs by itself."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "kernels" / "README.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_each_operation_has_a_snippet():
    together = "".join(SNIPPETS)
    for name in ("coding_rate(", "sigreg(", "EMA(", "AdamWEMA(", "drop_in"):
        assert name in together


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippets_run(number):
    space = {}
    exec(compile(SNIPPETS[number], f"{PAGE.name}, snippet {number}", "exec"), space)
    results = [space.get(name) for name in ("rate", "loss", "target") if name in space]
    for value in results:
        assert value.isfinite().all()
    if "teacher" in space:  # it has followed
        assert not space["teacher"].weight.equal(space["model"].weight)
