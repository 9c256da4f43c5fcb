"""Builds the site of the documentation in site/: `make docs`, or `python docs/build.py` with `seqjepa[docs]`.

Its pages are those of the repository, where they stand, so that their links lead to each other. Added are the reference
of all settings, from their sections, and of the Python API, from its docstrings; and the notebook, executed. A link
that leads nowhere fails the build, and so does a cell of the notebook.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from seqjepa.configs.help import about, section_lines
from seqjepa.engine.config import Config

ROOT = Path(__file__).resolve().parent.parent
# modules and packages of the reference, by heading
API = {
    "From Python": ["seqjepa.engine.api", "seqjepa.engine.encoder"],
    "Kernels": [
        "coding_rate",
        "rate_statistics",
        "local_rate",
        "sigreg",
        "token_statistics",
        "ema",
        "adamw_ema",
        "adamw_step",
        "layers",
    ],
    "Drop-in losses": ["mcr2", "simdino", "simdinov2", "emp_ssl", "lightly", "lejepa", "eb_jepa", "seq_jepa"],
    "Data": ["seqjepa.loaders.loader", "seqjepa.loaders.batch", "seqjepa.loaders.sampler"],
    "Network": ["seqjepa.engine.models.seq_jepa"],
}
FOLDERS = ("bench", "configs", "docs", "engine", "kernels", "loaders", "tests")
PACKAGES = {"Kernels": "seqjepa.kernels.", "Drop-in losses": "seqjepa.kernels.drop_in."}


def main() -> int:
    with tempfile.TemporaryDirectory() as place:
        pages, package = Path(place) / "pages", Path(place) / "package" / "seqjepa"
        copy_repository(pages)
        (pages / "reference").mkdir()
        (pages / "reference" / "config.md").write_text(settings(), encoding="utf-8")
        (pages / "reference" / "api.md").write_text(api(), encoding="utf-8")
        execute(pages / "docs" / "first_steps.ipynb", Path(place))
        # where the reference finds the docstrings: as an installation would have the modules
        shutil.copytree(ROOT / "engine" / "package", package)
        for name in ("configs", "engine", "kernels", "loaders"):
            (package / name).symlink_to(ROOT / name)
        given = {
            "PAGES": str(pages),
            "SITE": str(ROOT / "site"),
            "PACKAGE": str(package.parent),
            "NO_MKDOCS_2_WARNING": "1",
        }
        command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(ROOT / "docs/mkdocs.yml")]
        return subprocess.run(command, env=os.environ | given, check=False).returncode


def copy_repository(pages: Path) -> None:
    """Copy the pages, and the files that they link to; an unpacked source distribution has them too, without git."""
    pages.mkdir()
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copyfile(path, pages / path.name)
        elif path.name in FOLDERS:
            shutil.copytree(path, pages / path.name, ignore=shutil.ignore_patterns("__pycache__"))


def settings() -> str:
    """The reference of all settings: a part for each section, as `seqjepa train --help` prints it."""
    lines = [
        "# Settings",
        "",
        "Every setting with its default, what it allows, and what it means: `section.key=value`.",
        "",
    ]
    for name, field in Config.model_fields.items():
        lines += [f"## {name}", "", about(field), "", "```text", *section_lines(name, field), "```", ""]
    return "\n".join(lines)


def api() -> str:
    """The reference of the Python API: what mkdocstrings replaces by docstrings."""
    lines = ["# Python", ""]
    for heading, modules in API.items():
        lines += [f"## {heading}", ""]
        for module in modules:
            lines += [f"::: {PACKAGES.get(heading, '')}{module}", ""]
    return "\n".join(lines)


def execute(notebook: Path, place: Path) -> None:
    """Run a notebook elsewhere, because a kernel works where its notebook lies, and put a page of it in its place."""
    work = place / "work"
    work.mkdir()
    shutil.move(notebook, work / notebook.name)
    words = ["--to", "markdown", "--execute", "--output-dir", str(notebook.parent), str(work / notebook.name)]
    environment = os.environ | {"PYTHONWARNINGS": "ignore", "TERM": "dumb"}
    subprocess.run([sys.executable, "-m", "nbconvert", *words, "--log-level=ERROR"], env=environment, check=True)
    for page in notebook.parent.parent.rglob("*.md"):  # links to the notebook lead to its page
        page.write_text(
            page.read_text(encoding="utf-8").replace(f"{notebook.stem}.ipynb", f"{notebook.stem}.md"), "utf-8"
        )


if __name__ == "__main__":
    sys.exit(main())
