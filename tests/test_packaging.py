"""What a wheel and a source distribution carry, and that the set-up scripts are sound."""

import subprocess
import sys
import tarfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def distributions(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(wheel, sdist), built from the source tree without the network."""
    if find_spec("hatchling") is None:
        pytest.skip("hatchling is not installed; make setup installs it")
    target = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(target)]
    subprocess.run(command, cwd=repository, check=True, capture_output=True)
    (wheel,) = target.glob("sparsify_24-*.whl")
    (sdist,) = target.glob("sparsify_24-*.tar.gz")
    return wheel, sdist


def sources(repository: Path, folder: str, suffixes: tuple[str, ...]) -> set[str]:
    files = (path for path in (repository / folder).rglob("*") if path.suffix in suffixes)
    return {path.relative_to(repository / folder).as_posix() for path in files}


def test_wheel_carries_recipes_and_kernel_sources(repository: Path, distributions: tuple[Path, Path]) -> None:
    names = set(zipfile.ZipFile(distributions[0]).namelist())
    recipes = sources(repository, "recipes", (".yaml", ".json"))
    kernels = sources(repository, "kernels", (".cpp", ".h", ".hpp", ".cu", ".cuh"))
    assert recipes and {f"sparsify/_recipes/{name}" for name in recipes} <= names
    assert {f"sparsify/_kernels/{name}" for name in kernels} <= names
    assert "sparsify/py.typed" in names
    templates = sources(repository, "sparsify/report/templates", (".j2", ".css"))
    assert len(templates) > 5 and {f"sparsify/report/templates/{name}" for name in templates} <= names
    assert not [name for name in names if name.startswith(("kernels/", "tests/", "recipes/"))]
    assert not [name for name in names if "_kernels" in name and name.endswith(("__init__.py", ".so", ".o"))]


def test_wheel_has_the_command_the_plugin_and_the_licence(distributions: tuple[Path, Path]) -> None:
    wheel = zipfile.ZipFile(distributions[0])
    info = next(name for name in wheel.namelist() if name.endswith("entry_points.txt")).rpartition("/")[0]
    entries = wheel.read(f"{info}/entry_points.txt").decode()
    assert "sparsify = sparsify.cli:main" in entries
    assert "[vllm.general_plugins]\nsparse24 = sparsify.runtime.vllm_entry:register" in entries
    assert "License-Expression: Apache-2.0" in wheel.read(f"{info}/METADATA").decode()
    assert "Apache License" in wheel.read(f"{info}/licenses/LICENSE").decode()


def test_an_installed_sparsify_finds_its_recipes(tmp_path: Path, distributions: tuple[Path, Path]) -> None:
    """The unpacked wheel is all there is: no source tree beside it."""
    zipfile.ZipFile(distributions[0]).extractall(tmp_path)
    code = "import sys; sys.path.insert(0, sys.argv[1]); from sparsify.recipe import load_recipe, ready_recipes; "
    code += "print(ready_recipes()['2of4-w4a16']); load_recipe('2of4-w4a16')"
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == str(tmp_path / "sparsify" / "_recipes" / "2of4-w4a16.yaml")


def test_sdist_is_complete(repository: Path, distributions: tuple[Path, Path]) -> None:
    with tarfile.open(distributions[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "Makefile",
        "deploy/setup.sh",
        "deploy/lock/cpu.txt",
        "tests/conftest.py",
    }
    wanted |= {f"recipes/{name}" for name in sources(repository, "recipes", (".yaml", ".json"))}
    wanted |= {f"sparsify/{name}" for name in sources(repository, "sparsify", (".py",))}
    assert wanted <= names
    assert not [name for name in names if name.startswith((".venv", "out/", ".git/"))]


@pytest.mark.parametrize("script", ["deploy/setup.sh", "deploy/lock.sh", "deploy/check_install.sh", ".ci/run"])
def test_scripts_are_sound(script: str, repository: Path) -> None:
    path = repository / script
    assert path.stat().st_mode & 0o111, f"{script} must be executable"
    subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.mark.parametrize(
    ("environment", "arguments", "said"),
    [
        ({}, ["friends"], "unknown environment 'friends'"),
        ({"LOCKED": "maybe"}, [], "LOCKED is 'maybe'"),
        ({"SPARSIFY_DEVICE": "abacus"}, [], "SPARSIFY_DEVICE is 'abacus'"),
        ({"SPARSIFY_DEVICE": "cpu", "PYTHON": "/bin/false"}, [], "PYTHON=/bin/false does not run"),
    ],
)
def test_setup_refuses_clearly(
    environment: dict[str, str], arguments: list[str], said: str, repository: Path, tmp_path: Path
) -> None:
    env = {"PATH": "/usr/bin:/bin", "VENV": str(tmp_path / "venv"), **environment}
    run = subprocess.run(
        ["bash", str(repository / "deploy/setup.sh"), *arguments], env=env, capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    assert said in run.stderr
    assert not (tmp_path / "venv").exists()


def test_make_without_a_target_explains_itself(repository: Path) -> None:
    run = subprocess.run(["make", "-C", str(repository)], capture_output=True, text=True, check=True)
    assert all(
        f"make {target}" in run.stdout
        for target in ("demo", "test", "lint", "docs", "coverage", "recipes", "peers", "lock", "clean")
    )
    assert all(f"make {target}" in run.stdout for target in ("check-install", "test-floor", "test-newest"))
