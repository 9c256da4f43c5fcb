"""What the tools around the code must go on promising."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_no_type_error_is_tolerated():
    assert not (ROOT / ".basedpyright").exists()  # the list of known errors, which would grow


def test_actions_are_pinned_to_commits():
    """A tag can be moved to other code."""
    uses = [line for path in (ROOT / ".github").rglob("*.yml") for line in re.findall("uses: .*", path.read_text())]
    assert len(uses) > 2
    assert [line for line in uses if not re.fullmatch(r"uses: [\w/-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line)] == []
