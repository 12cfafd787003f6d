"""What lies beside the weights of a checkpoint: tokenizer, templates, code of its own, licence. All of it goes with the model.

Left out are weights, what `sparsify` writes itself, what looks like a credential, and other models in folders of their own.
A link may lead anywhere inside of the directory, and from a Hub snapshot into the cache of that repository; one that leads
out of it is refused, since it would put a foreign file into something that people publish.
"""

import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path

from sparsify.errors import CheckpointError
from sparsify.files import kind_problem
from sparsify.manifest import MANIFEST

WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|gguf|ggml|h5|msgpack|npz|tflite|pte|distcp|onnx([._]data)?)"
    r"|.*\.(safetensors|bin|h5|msgpack)\.index(\.[^.]+)?\.json|consolidated.*"
    # these say how weights that stay behind are to be read: without them, or beside others, they mislead
    r"|adapter_config\.json|quantize_config\.json|quant_config\.json|hf_quant_config\.json",
    re.IGNORECASE,
)
OURS = {
    "config.json",
    "README.md",
    "recipe.yaml",
    "metrics.json",
    "run.json",
    "training.jsonl",
    MANIFEST,
}  # in the top folder, written anew
HIDDEN = {".gitattributes", ".gitignore"}  # the only files and folders with a leading dot that come along
WASTE = re.compile(r"__pycache__|.*\.(pyc|partial|incomplete|lock|tmp)")
CODE = re.compile(r".*\.(py|jinja|jinja2)", re.IGNORECASE)
SECRET_CODE = re.compile(r"(secrets?|credentials?|passwords?)\.py", re.IGNORECASE)
SECRETS = re.compile(
    r"id_(rsa|dsa|ecdsa|ed25519)\b.*|_?netrc|.*\.(env|pem|key|p12|pfx|ppk|jks|keystore|kdbx|token)|env"
    r"|.*(credential|secret|password|passwd|api[._-]?key|private[._-]?key|service[._-]?account).*"
    r"|(.*[._-])?token(\.(txt|json|ya?ml|cfg|ini|bak))?"
    r"|(.*[._-])?(access|auth|api|bearer|hf|hub|huggingface|github|gh|gitlab|wandb|openai)[._-]?tokens?\b.*|auth\.json|kubeconfig|venv",
    re.IGNORECASE,
)
OTHER_MODELS = re.compile(r"original|checkpoint-\d+")  # Meta's first format; the states of a training
MODEL_SETTINGS = {"config.json", "params.json", "adapter_config.json"}


def sidecars(directory: Path, apart_from: Collection[Path] = ()) -> dict[str, Path]:
    """The files beside the weights: path inside `directory` -> where its bytes are, in order of name.

    apart_from: folders that are skipped, such as an output that lies in `directory`.
    CheckpointError names a link that leads out of the directory, or nowhere.
    """
    root = directory.resolve()
    skipped = {path.resolve() for path in apart_from}
    found = {name: inside(directory, name) for name in _walk(root, "", skipped, ())}
    return dict(sorted(found.items()))


def secrets(directory: Path) -> list[str]:
    """Names in the top folder that stay behind because they look like a credential, so that a user can be told."""
    return sorted(entry.name for entry in directory.iterdir() if entry.name[0] != "." and _is_secret(entry.name))


def inside(directory: Path, name: str) -> Path:
    """The file `name` of a directory with all links followed; CheckpointError when they lead out, or nowhere."""
    root = directory.resolve()
    path = (root / name).resolve()
    if not path.exists():
        raise CheckpointError(f"{directory / name} is a link to {path}, which does not exist; repair or remove it")
    if not path.is_dir() and (problem := kind_problem(path)):
        raise CheckpointError(f"{directory / name} {problem}, or remove it")
    bound = _bound(root)
    if not path.is_relative_to(bound):
        raise CheckpointError(
            f"{directory / name} is a link to {path}, which is outside of {bound}; put the file itself there, or remove it"
        )
    return path


def _bound(root: Path) -> Path:
    """What links may not leave: the directory, or the cache of the Hub repository that it is a snapshot of."""
    repository = root.parent.parent
    return repository if root.parent.name == "snapshots" and (repository / "blobs").is_dir() else root


def _walk(root: Path, folder: str, skipped: Collection[Path], within: tuple[Path, ...]) -> Iterator[str]:
    """Names of the files under a folder of `root`. within: the real folders around it, in which a link must not end again."""
    place = (root / folder).resolve()
    entries = sorted(os.scandir(root / folder), key=lambda entry: entry.name)
    names = {entry.name for entry in entries}
    if folder and names & MODEL_SETTINGS and any(WEIGHTS.fullmatch(name) for name in names - MODEL_SETTINGS):
        return  # another model
    for entry in entries:
        name = f"{folder}{entry.name}"
        if not _comes_along(entry.name) or (not folder and entry.name in OURS):
            continue
        if entry.is_dir():
            real = inside(root, name) if entry.is_symlink() else place / entry.name
            if not OTHER_MODELS.fullmatch(entry.name) and real not in {*skipped, *within, place}:
                yield from _walk(root, f"{name}/", skipped, (*within, place))
        elif entry.is_file() or entry.is_symlink():
            yield name


def _comes_along(name: str) -> bool:
    if name.startswith(".") and name not in HIDDEN:
        return False
    return not (_is_secret(name) or WEIGHTS.fullmatch(name) or WASTE.fullmatch(name))


def _is_secret(name: str) -> bool:
    return (SECRET_CODE if CODE.fullmatch(name) else SECRETS).fullmatch(name) is not None
