"""The wheel, installed where nothing of this checkout can be imported, gives commands that work from any folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

import seqsetvae

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def call(words: Sequence[str | Path], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    variables |= {"OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [str(word) for word in words], cwd=folder, env=variables, capture_output=True, text=True, check=False
    )


def build(kind: str, source: Path, target: Path) -> Path:
    done = call([sys.executable, "-c", BUILD, f"build_{kind}", target], source)
    assert done.returncode == 0, done.stderr
    return target / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the repository, or of an unpacked source distribution, without what was built in them."""
    ignored = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "demo", "site", "shared")
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("source") / "copy", ignore=ignored))


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that the source distribution builds, as a registry would serve both."""
    folder = tmp_path_factory.mktemp("built")
    with tarfile.open(build("sdist", source, folder)) as archive:
        archive.extractall(folder, filter="data")
    unpacked = folder / f"seqsetvae-{PROJECT['version']}"
    assert (unpacked / "tests" / "test_packaging.py").exists()
    assert (unpacked / "docs" / "format.md").exists()
    return build("wheel", unpacked, folder)


@pytest.fixture(scope="module")
def commands(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the programs of an environment in which the wheel is installed, beside the packages it needs."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel]
    done = call(pip, folder)
    assert done.returncode == 0, done.stderr
    [packages] = folder.glob("lib/python*/site-packages")
    # A folder on the path whose own .pth files are not read: an editable install of this checkout stays unseen.
    others = [path for path in sys.path if Path(path).name == "site-packages"]
    (packages / "others.pth").write_text("\n".join(others), encoding="utf-8")
    return folder / "bin"


def test_the_wheel_has_types_templates_and_no_more(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {f"{package}/py.typed" for package in ("pipeline", "model", "training")}
    wanted |= {
        str(path.relative_to(ROOT))
        for room in ("pipeline", "model", "training")
        for path in (ROOT / room).rglob("*.*")
        if path.suffix in (".py", ".csv", ".jinja", ".mplstyle")
    }
    assert wanted - names == set()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"integrations", "pipeline", "model", "training", "preprocess.py", "seqsetvae.py", "train.py"}


def test_the_commands_work_from_another_folder(commands: Path, tmp_path: Path) -> None:
    made = call([commands / "seqsetvae-preprocess", "synthetic", "--num_patients", "24", "--output", "data"], tmp_path)
    assert made.returncode == 0, made.stderr
    flags = ["--preset", "small", "--max_epochs", "1", "--threads", "1", "--device", "cpu"]
    trained = call([commands / "seqsetvae-train", "--data_dir", "data", "--output_dir", "run", *flags], tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] >= 1
    (tmp_path / "run" / "report.html").unlink()
    shown = call([commands / "seqsetvae-report", "run"], tmp_path)
    assert (shown.returncode, shown.stdout) == (0, "run/report.html\n"), shown.stderr
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize("file", ["model.py", "pipeline/__init__.py", "training.py", "model/weights.py"])
def test_a_file_that_hides_a_package_is_named_in_one_line(commands: Path, tmp_path: Path, file: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("weights = 1\n")
    for command in ("report", "plan"):
        done = call([commands / f"seqsetvae-{command}", "run"], tmp_path, PYTHONPATH=str(tmp_path))
        if file == "model/weights.py":  # a folder without __init__.py does not hide an installed package
            assert "hides" not in done.stderr
            continue
        package = re.split(r"[./]", file)[0]
        line = f"seqsetvae-{command}: {tmp_path / file} hides the package {package} of SeqSetVAE; rename it, or "
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert done.stderr.startswith(line)


def test_a_module_that_is_run_from_beside_a_model_of_the_user_says_so(commands: Path, tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text("weights = 1\n")
    done = call([commands / "python", "-m", "training.report", "run"], tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith(f"training: {tmp_path / 'model.py'} hides the package model of SeqSetVAE")
    imported = call([commands / "python", "-c", "import training"], tmp_path)
    assert imported.returncode == 1
    assert imported.stderr.splitlines()[-1].startswith(f"ImportError: {tmp_path / 'model.py'} hides the package model")


def test_every_command_is_a_function_of_the_module_that_cannot_be_hidden() -> None:
    for command, function in PROJECT["scripts"].items():
        module, name = function.split(":")
        assert module == "seqsetvae", command
        assert command == f"seqsetvae-{name}"
        assert getattr(seqsetvae, name).args[0] == command


def test_the_other_descriptions_of_the_project_agree_with_its_own() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    renamed = {"pytorch": "torch", "matplotlib-base": "matplotlib"}
    needed = {re.split(r"(?=[<>=])", line, maxsplit=1)[0]: line for line in environment if isinstance(line, str)}
    needed = {renamed.get(name, name): renamed.get(name, name) + line[len(name) :] for name, line in needed.items()}
    assert needed.pop("python").startswith(f"python{PROJECT['requires-python']}")
    assert {line for name, line in needed.items() if name != "pip"} == set(PROJECT["dependencies"])
    copied = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    allowed = (ROOT / ".dockerignore").read_text(encoding="utf-8")
    for name in re.findall(r"[\w.]+", " ".join(re.findall(r"^COPY (.*)$", copied, flags=re.MULTILINE))):
        assert name in (".",) or f"!{name}" in allowed, name
