"""Makes the links of README.md absolute, for a page that stands elsewhere: `python docs/absolute.py URL TAG`.

URL is the repository's address and TAG names the version, whose pages and pictures the links lead to. The release
workflow runs this before it builds what PyPI shows; nobody else needs to.
"""

import re
import sys
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"
LINK = re.compile(r"(?P<picture>!?)\[(?P<text>[^\]]*)\]\((?P<target>(?!\w+:|#)[^)]+)\)")


def absolute(text: str, url: str, tag: str) -> str:
    """Markdown whose relative links and pictures lead to a tag of the repository at `url`, as GitHub has them."""

    def linked(found: re.Match) -> str:
        kind = "raw" if found["picture"] else "blob"
        return f"{found['picture']}[{found['text']}]({url.rstrip('/')}/{kind}/{tag}/{found['target']})"

    return LINK.sub(linked, text)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    README.write_text(absolute(README.read_text(encoding="utf-8"), *sys.argv[1:]), encoding="utf-8")
