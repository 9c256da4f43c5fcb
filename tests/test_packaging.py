"""The wheel has every module and config; no name collides with anybody else's."""

import ast
import json
import re
import shutil
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("engine", "kernels", "loaders", "configs")
BUILD = "import setuptools.build_meta as build, sys; print(getattr(build, sys.argv[1])(sys.argv[2]))"


def modules():
    yield "seqjepa"
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            if path.parent.name == "package":  # `seqjepa` itself
                continue
            parts = ("seqjepa", *path.relative_to(ROOT).with_suffix("").parts)
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what git knows: setuptools leaves folders where it works."""
    import subprocess

    if not (ROOT / ".git").exists():
        pytest.skip("in a clone only: git says which files there are")
    source = tmp_path_factory.mktemp("source")
    subprocess.run(["git", "init", "-q", str(source)], check=True)
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, check=True
    )
    for name in listed.stdout.decode().split("\0")[:-1]:
        if (ROOT / name).is_file() or (ROOT / name).is_symlink():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
    return source


@pytest.fixture(scope="module")
def installed(source, tmp_path_factory):
    """A folder with the wheel installed in it, and the names in the wheel."""
    import subprocess

    out = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(out), str(source)],
        check=True,
        capture_output=True,
    )
    (wheel,) = out.glob("*.whl")
    subprocess.run(
        [*pip, "install", "--no-deps", "--target", str(out / "site"), str(wheel)],
        check=True,
        capture_output=True,
    )
    return out / "site", zipfile.ZipFile(wheel).namelist()


def test_a_clone_of_that_name_does_not_hide_the_wheel(installed, python, tmp_path):
    """From the folder above it, as after `git clone ... seqjepa && pip install ./seqjepa`."""
    import subprocess

    site, _ = installed
    (tmp_path / "seqjepa").symlink_to(ROOT)
    environment = {"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin"}
    for module in ("seqjepa", "seqjepa.kernels._ops", "seqjepa.configs.errors"):
        code = f"import importlib; print(importlib.import_module({module!r}).__file__)"
        command = [python, "-c", code]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert result.stdout.startswith(str(site)), (module, result.stdout, result.stderr)


def test_the_wheel_says_that_it_is_typed(installed):
    """PEP 561: without the file no checker reads the annotations of an installed package."""
    assert "seqjepa/py.typed" in installed[1]


def test_wheel_holds_one_top_level_name(installed):
    _, names = installed
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"seqjepa"}


def test_every_module_imports_from_the_wheel(installed, run_process, python, tmp_path):
    site, _ = installed
    names = list(modules())
    assert len(names) > 30
    code = (
        "import importlib, json, sys\n"
        f"files = [importlib.import_module(name).__file__ for name in {names}]\n"
        "from seqjepa.engine.config import compose\n"
        "epochs = compose(['configs/smoke.yaml']).config.run.epochs\n"
        "print(json.dumps([files, epochs]))"
    )
    import subprocess

    environment = {"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    result = subprocess.run([python, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    files, epochs = json.loads(result.stdout)
    assert all(file.startswith(str(site)) for file in files)
    assert epochs == 60


OF_TRAINING = [
    "torchvision",
    "timm",
    "accelerate",
    "psutil",
    "pydantic",
    "yaml",
    "PIL",
    "filelock",
    "safetensors",
    "rich",
]
OF_TRAINING += ["sklearn", "scipy", "matplotlib", "wandb", "argcomplete", "annotated_types"]


def test_the_base_installation_has_the_kernels_and_says_what_the_rest_needs(installed, python, tmp_path):
    """All that `seqjepa[train]` brings is taken away; torch itself needs filelock, which it has imported by then."""
    import subprocess

    site, _ = installed
    hide = f"import sys, torch\nfor name in {OF_TRAINING}: sys.modules[name] = None\n"
    environment = {"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}

    def run(code):
        command = [python, "-W", "ignore", "-c", hide + code]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    (line,) = re.findall('-c "(.* seqjepa.kernels .*)"', (ROOT / ".github/workflows/tests.yml").read_text())
    used = run(
        f"{line}\n"
        "from seqjepa.kernels import AdamWEMA, coding_rate, ema_update_, sigreg\n"
        "from seqjepa.kernels.drop_in.simdino import MCRLoss\n"
        "z = torch.randn(8, 4, requires_grad=True); coding_rate(z, eps=0.5).backward(); print(z.grad.shape)"
    )
    assert (used.returncode, used.stdout.splitlines()[-1]) == (0, "torch.Size([8, 4])"), used.stderr
    told = run(
        "from seqjepa.__main__ import main\nimport seqjepa\n"
        "print(main(['train']))\n"
        "try: seqjepa.train()\nexcept ImportError as error: print(error)\n"
        "main(['--help'])"
    )
    assert told.stderr.endswith(" is not installed; pip install 'seqjepa[train]', in a clone pip install '.[train]'\n")
    assert told.stderr.count("\n") == 1
    code, missing, help_page = told.stdout.split("\n", 2)
    assert (told.returncode, code) == (0, "2")
    assert missing.startswith("seqjepa.train needs ")
    assert "pip install 'seqjepa[train]'" in missing
    assert "COMMAND" in help_page


@pytest.fixture(scope="module")
def unpacked(source, python, tmp_path_factory):
    """The source distribution, unpacked."""
    import subprocess

    out = tmp_path_factory.mktemp("sdist")
    made = subprocess.run([python, "-c", BUILD, "build_sdist", str(out)], cwd=source, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    with tarfile.open(out / made.stdout.splitlines()[-1]) as archive:
        archive.extractall(out, filter="data")
    (folder,) = (path for path in out.iterdir() if path.is_dir())
    return folder


def test_the_source_distribution_has_the_files_of_the_repository(source, unpacked):
    """All but .ci/seqjepa, a link to the root, for editors, by which it would have every file twice."""
    # where Hugging Face's `kernels` is installed setuptools imports it, finds our folder, and Python leaves byte code
    ours = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    theirs = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    made = (".git/", "build/", "seqjepa.egg-info/", "PKG-INFO", "setup.cfg")
    ours, theirs = ({name for name in names if not name.startswith(made)} for names in (ours, theirs))
    assert len(ours) > 400
    assert theirs == ours


@pytest.mark.slow
def test_the_source_distribution_makes_the_same_wheel(installed, unpacked, python, tmp_path):
    import subprocess

    wheel = subprocess.run(
        [python, "-c", BUILD, "build_wheel", str(tmp_path)], cwd=unpacked, capture_output=True, text=True
    )
    assert wheel.returncode == 0, wheel.stderr
    names = zipfile.ZipFile(tmp_path / wheel.stdout.splitlines()[-1]).namelist()
    assert sorted(names) == sorted(installed[1])


def test_configs_travel(installed):
    _, names = installed
    ours = {f"seqjepa/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.yaml")}
    assert len(ours) >= 10
    assert ours <= set(names)


def test_engine_modules_shadow_nothing(run_process, python):
    """`accelerate launch engine/train.py` puts engine/ first on sys.path, until the script takes it off again."""
    found = {path.stem for path in (ROOT / "engine").iterdir()}
    assert not found & set(sys.stdlib_module_names)
    for script in ("train", "evaluate"):
        code = (
            f"import runpy, sys; sys.path[0] = {str(ROOT / 'engine')!r}; sys.argv = ['x', '--help']\n"
            f"try: runpy.run_path({str(ROOT / 'engine' / script) + '.py'!r}, run_name='__main__')\n"
            f"except SystemExit as end: assert end.code == 0\nassert {str(ROOT / 'engine')!r} not in sys.path"
        )
        result = run_process(python, "-c", code)
        assert result.returncode == 0, result.stderr


def test_hugging_faces_kernels_is_not_shadowed(run_process, python):
    pytest.importorskip("importlib.metadata").version("kernels")
    code = "from kernels import get_kernel; import kernels; print(get_kernel.__module__, kernels.__file__)"
    result = run_process(python, "-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("kernels.")
    assert str(ROOT / "kernels") not in result.stdout
    both = (
        "import seqjepa.kernels, kernels; print(seqjepa.kernels.ema_update_.__module__, kernels.get_kernel.__module__)"
    )
    assert run_process(python, "-c", both).stdout.split()[0] == "seqjepa.kernels.ema"


def test_kernels_know_nothing_of_the_rest():
    allowed = {*sys.stdlib_module_names, "torch", "triton"}
    for path in (ROOT / "kernels").rglob("*.py"):
        imported = {
            name.split(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            for name in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module]
                if isinstance(node, ast.ImportFrom) and not node.level
                else []
            )
        }
        assert imported <= allowed, path


def test_heavy_imports_stay_where_they_are_used(run_process, python):
    code = (
        "import sys, seqjepa.engine.training.trainer, seqjepa.loaders.write\n"
        "print(sorted({'wandb', 'ffcv', 'matplotlib', 'tensorboard', 'sklearn'} & set(sys.modules)))"
    )
    assert run_process(python, "-c", code).stdout.strip() == "[]"


def test_every_dependency_says_why_it_is_there():
    text = (ROOT / "pyproject.toml").read_text()
    project = tomllib.loads(text)["project"]
    wanted = [
        *project["dependencies"],
        *(d for extra in project["optional-dependencies"].values() for d in extra),
    ]
    for requirement in wanted:
        lines = [
            line
            for line in text.splitlines()
            if line.strip().startswith(f'"{requirement}"') or f'["{requirement}"]' in line
        ]
        assert any(line.partition("#")[2].strip() for line in lines), requirement
