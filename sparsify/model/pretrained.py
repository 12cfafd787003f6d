"""Configs, tokenizers and models through transformers: the one place that decides whether code that comes with a model runs.

It runs only where the user said so. transformers would ask on the terminal, and wait for an answer in a job without one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sparsify.errors import CalibrationError, CheckpointError, SparsifyError
from sparsify.files import read_json
from sparsify.model.belonging import refuse_badly_loaded
from sparsify.model.permissions import trusts_remote_code
from sparsify.model.sidecars import inside
from sparsify.progress import say

NAME_CODE = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
LONGEST = 300  # characters of an error of transformers that ours repeat
ADAPTER = "adapter_config.json"
MODULE = re.compile(r"[\w-]+([./][\w-]+)*")  # of Python code in the directory
# Classes of transformers that load a model, in the order in which they are asked: for text, and for text with pictures.
LOADERS = ("AutoModelForCausalLM", "AutoModelForImageTextToText")
HUB_ID = re.compile(r"\w[\w-]*(\.[\w-]+)*/\w[\w-]*(\.[\w-]+)*")

_said: set[tuple[str, str]] = set()  # foreign code that was named already


def load_config(directory: str | Path, spec: str | None = None) -> Any:
    """The config of a model. spec: what the user calls it. Errors are those of transformers, but for code of its own."""
    from transformers import AutoConfig

    with _named(directory, spec):
        return AutoConfig.from_pretrained(directory, trust_remote_code=trusts_remote_code())


def load_tokenizer(directory: str | Path, spec: str | None = None, **settings: Any) -> Any:
    """The tokenizer of a model. settings: of `AutoTokenizer.from_pretrained`.

    OSError, ValueError, KeyError or ImportError of transformers where it has none; CheckpointError where it is damaged.
    """
    from transformers import AutoTokenizer

    try:
        with _named(directory, spec):
            return AutoTokenizer.from_pretrained(directory, trust_remote_code=trusts_remote_code(), **settings)
    except (SparsifyError, OSError, ValueError, KeyError, ImportError):
        raise
    except Exception as error:  # the library of fast tokenizers raises this very class
        told = " ".join(str(error).split())[:LONGEST] or type(error).__name__
        raise CheckpointError(
            f"{spec or directory}: its tokenizer cannot be read ({told}); copy tokenizer.json and tokenizer_config.json from "
            "the dense model"
        ) from None


def tokenizer_for_text(directory: str | Path, spec: str) -> Any:
    """The tokenizer of a model that reads text; CalibrationError where it has none."""
    try:
        return load_tokenizer(directory, spec)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CalibrationError(
            f"{spec} has no tokenizer, which text needs ({str(error).splitlines()[0]}); copy tokenizer.json and "
            "tokenizer_config.json into it (in Python tokenizer=...), or give token ids"
        ) from None


def loader_of(config: Any, spec: str) -> Any:
    """The class of transformers that loads the model of a config: the first of `LOADERS` that knows it; for a wrapper of a text
    tower, of which the first may know no more than the tower (Llama 4), the last.

    CheckpointError for a model of an encoder and a decoder, of which no part generates text from text alone.
    """
    import transformers

    loaders = [getattr(transformers, name) for name in LOADERS]
    wraps = config.get_text_config(decoder=True) is not config
    asked = reversed(loaders) if wraps else loaders
    known = next((loader for loader in asked if type(config) in loader._model_mapping), None)
    translates = known is None and type(config) in transformers.AutoModelForSeq2SeqLM._model_mapping
    if translates or getattr(config, "is_encoder_decoder", False):
        raise CheckpointError(
            f"{spec}: {config.model_type} has an encoder and a decoder, and only models of one list of blocks can be compressed"
        )
    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    return loaders[0] if own_code or known is None else known


def setting(config: Any, key: str) -> Any:
    """A setting of a config, the largest of its layers where they differ; None where it has none."""
    try:
        return getattr(config, key, None)
    except RuntimeError:  # transformers raises it for one that differs between layers (Gemma 4)
        layers = (config.per_layer_config[index] for index in range(config.num_hidden_layers))
        return max((value for layer in layers if (value := getattr(layer, key, None)) is not None), default=None)


def class_of(config: Any) -> type | None:
    """The class of transformers that a config is of; None where code that comes with the model has it, or where none is."""
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return None
    mapping = loader_of(config, "the model")._model_mapping
    found = mapping.get(type(config), None)
    return found[0] if isinstance(found, tuple) else found


def load_causal_lm(directory: str | Path, spec: str | None = None, **settings: Any) -> Any:
    """The language model of a directory, with the tower for pictures of one that has such. settings: of `from_pretrained`.

    CheckpointError where tensors are missing, unknown or of another shape, which transformers at most mentions.
    """
    with _named(directory, spec), _without_adapter(Path(directory)) as place:
        config = load_config(place, spec)
        model, info = loader_of(config, str(spec or directory)).from_pretrained(
            place,
            config=config,
            trust_remote_code=trusts_remote_code(),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            **settings,
        )
    refuse_badly_loaded(model, info, directory, spec)
    model.name_or_path = model.config._name_or_path = str(directory)
    return model


@contextmanager
def _without_adapter(directory: Path) -> Iterator[Path]:
    """The directory, or one of links to its files but for an adapter, which transformers would put on the weights unasked:
    what is compressed is the model without it."""
    if not (directory / ADAPTER).exists():
        yield directory
        return
    say(f"{directory}: the adapter beside the weights ({ADAPTER}) is left out; merge it first where it is wanted")
    with TemporaryDirectory(prefix="sparsify-") as folder:
        for file in directory.iterdir():
            if file.name != ADAPTER:
                (Path(folder) / file.name).symlink_to(file.resolve())
        yield Path(folder)


def causal_lm_of(config: Any, directory: str | Path, spec: str | None = None, **settings: Any) -> Any:
    """A language model without weights that a config describes. settings: of `AutoModelForCausalLM.from_config`."""
    with _named(directory, spec):
        return loader_of(config, str(spec or directory)).from_config(
            config, trust_remote_code=trusts_remote_code(), **settings
        )


@contextmanager
def _named(directory: str | Path, spec: str | None) -> Iterator[None]:
    """Turn the error about code that may not run, and those of damaged settings, into one sentence."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except RecursionError:
        raise CheckpointError(
            f"{spec or directory}: a JSON file of it is nested too deeply to be read; download the model again"
        ) from None
    except StrictDataclassError as error:  # what transformers' classes of configs raise
        told = " ".join(str(error).split())[:LONGEST]
        raise CheckpointError(f"{spec or directory}: config.json describes no model: {told}") from None
    except (ValueError, OSError, ImportError) as error:
        if "trust_remote_code" not in str(error) or trusts_remote_code():
            raise
        code = ", ".join(_code(Path(directory))) or "no transformers class reads it"
        raise CheckpointError(
            f"{spec or directory} needs Python code that comes with it ({code}), which does not run unasked; read that "
            f"code, and where you trust it add --trust-remote-code (in Python trust_remote_code=True)"
        ) from None


def _code(directory: Path) -> list[str]:
    """The files of code that the settings of a model name."""
    return list(dict.fromkeys(f"{reference.rpartition('.')[0]}.py" for _, reference in _references(directory)))


def _references(directory: Path) -> Iterator[tuple[str, str]]:
    """The classes that come with a model, `[REPOSITORY--]MODULE.CLASS`, each with the file that names it. directory: or a
    config.json of another name."""
    files = [directory] if directory.is_file() else [directory / name for name in NAME_CODE]
    for file in files:
        try:
            settings = read_json(file)
        except (CheckpointError, OSError):
            continue
        yield from ((file.name, reference) for reference in _in_auto_map(settings))


def _in_auto_map(settings: Any) -> Iterator[str]:
    for key, value in settings.items() if isinstance(settings, dict) else ():
        if key == "auto_map":
            entries = value.values() if isinstance(value, dict) else [value]
            for entry in entries:
                yield from (one for one in (entry if isinstance(entry, list) else [entry]) if isinstance(one, str))
        else:
            yield from _in_auto_map(value)


def refuse_foreign_code(directory: Path, spec: str) -> None:
    """CheckpointError where the settings of a model name code that does not lie in its directory. directory: or a config.json.

    A path out of the directory is refused always, another repository of the Hub unless remote code is trusted; then it is
    named on stderr.
    """
    folder = directory.parent if directory.is_file() else directory
    for file, reference in _references(directory):
        repository, is_elsewhere, own = reference.rpartition("--")
        module = own.rpartition(".")[0]
        if not MODULE.fullmatch(module) or (is_elsewhere and not HUB_ID.fullmatch(repository)):
            raise CheckpointError(
                f"{spec}: {file} names code outside of the directory (auto_map: {reference}), which never runs; "
                "take that entry out"
            )
        if not is_elsewhere:
            if (folder / f"{module}.py").is_symlink():
                inside(folder, f"{module}.py")
        elif not trusts_remote_code():
            raise CheckpointError(
                f"{spec}: {file} names Python code of another repository, {repository} (auto_map: {reference}); take that "
                "entry out where transformers knows the model itself, or read that code, and where you trust it add "
                "--trust-remote-code (in Python trust_remote_code=True)"
            )
        elif (spec, repository) not in _said:
            _said.add((spec, repository))
            say(f"{spec} may run Python code of another repository: {repository} ({module}.py)")
