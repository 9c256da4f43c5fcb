"""Links between the pages lead somewhere, the README is short, and its configs and commands exist."""

import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from seqjepa.__main__ import COMMANDS
from seqjepa.engine.config import compose

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("[bck]*/README.md")])
LINK = re.compile(r"\]\((?!https?:)([^)\s]+)\)")


def anchors(page):
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in LINK.findall(text):
        file, _, anchor = target.partition("#")
        place = (page.parent / file).resolve() if file else page
        assert place.exists(), target
        if anchor:
            assert anchor in anchors(place), target


def test_pypis_page_leads_to_the_files_of_its_version(run_process, tmp_path):
    """As the release workflow makes it: no relative link is left, and each path after the tag exists here."""
    docs = tmp_path / "docs"
    docs.mkdir()
    shutil.copy(ROOT / "docs/absolute.py", docs)
    shutil.copy(ROOT / "README.md", tmp_path)
    made = run_process(sys.executable, docs / "absolute.py", "https://example.org/some/seqjepa", "v1.2")
    assert made.returncode == 0, made.stderr
    before, after = (re.findall(r"(!?)\[[^]]*\]\(([^)]+)\)", (d / "README.md").read_text()) for d in (ROOT, tmp_path))
    assert len(before) == len(after) > 10
    for (picture, target), (_, found) in zip(before, after, strict=True):
        if target.startswith("http"):
            assert found == target
            continue
        prefix, path = re.fullmatch(r"(https://example\.org/some/seqjepa/\w+/v1\.2/)(.+)", found).groups()
        assert ("/raw/" if picture else "/blob/") in prefix
        assert (ROOT / path.partition("#")[0]).exists()


def test_the_readme_is_at_most_eighty_lines():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 80


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_configs_of_a_page_exist(page):
    """Each `seqjepa train` of a code block composes, and every other word after seqjepa is a command."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL)
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        words = line.partition("  #")[0].split()
        if words[:1] != ["seqjepa"]:
            continue
        assert words[1] in COMMANDS, line
        if words[1] == "train" and not any(word.startswith(("configs/...", "...")) for word in words):
            compose([word for word in words[2:] if not word.startswith("--")])


@pytest.mark.parametrize("path", sorted((ROOT / ".github/workflows").iterdir()), ids=lambda path: path.stem)
def test_workflows_are_yaml_with_jobs(path):
    for job in yaml.safe_load(path.read_text())["jobs"].values():
        assert all({"run", "uses"} & step.keys() for step in job["steps"])


def test_the_sweep_sets_settings_that_there_are():
    """As W&B's agent writes them, name=value: every value that it may choose composes with the rest of its command."""
    sweep = yaml.safe_load((ROOT / "configs" / "launch" / "sweep.yaml").read_text())
    interpreter, program, command, *words, arguments = sweep["command"]
    assert [interpreter, program, command, arguments] == ["${env}", "seqjepa", "train", "${args_no_hyphens}"]
    tracked, metric = sweep["metric"]["name"].split("/")
    assert (tracked, metric) == ("val", "online_r2_test")
    for name, choice in sweep["parameters"].items():
        for value in choice.get("values", [choice.get("min"), choice.get("max")]):
            config = compose([*words, f"{name}={value}"]).config
            for part in name.split("."):
                config = getattr(config, part)
            assert config == value
