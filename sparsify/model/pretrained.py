"""Configs, tokenizers and models through transformers: the one place that decides whether code that comes with a model runs.

It runs only where the user said so. transformers would ask on the terminal, and wait for an answer in a job without one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparsify.errors import CheckpointError
from sparsify.files import read_json

TRUST = "SPARSIFY_TRUST_REMOTE_CODE"


def trusts_remote_code() -> bool:
    """Whether Python code that comes with a model may run."""
    return os.environ.get(TRUST, "0") not in ("", "0")


@contextmanager
def trusting(trust: bool) -> Iterator[None]:
    """Let code that comes with models run inside of the block, in processes that it starts too."""
    before = os.environ.get(TRUST)
    if trust:
        os.environ[TRUST] = "1"
    try:
        yield
    finally:
        if trust:
            os.environ.pop(TRUST)
            os.environ.update({} if before is None else {TRUST: before})


def load_config(directory: str | Path, spec: str | None = None) -> Any:
    """The config of a model. spec: what the user calls it. Errors are those of transformers, but for code of its own."""
    from transformers import AutoConfig

    with _named(directory, spec):
        return AutoConfig.from_pretrained(directory, trust_remote_code=trusts_remote_code())


def load_tokenizer(directory: str | Path, spec: str | None = None, **settings: Any) -> Any:
    """The tokenizer of a model. settings: of `AutoTokenizer.from_pretrained`."""
    from transformers import AutoTokenizer

    with _named(directory, spec):
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=trusts_remote_code(), **settings)


def load_causal_lm(directory: str | Path, spec: str | None = None, **settings: Any) -> Any:
    """The causal language model of a directory. settings: of `AutoModelForCausalLM.from_pretrained`."""
    from transformers import AutoModelForCausalLM

    with _named(directory, spec):
        return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=trusts_remote_code(), **settings)


def causal_lm_of(config: Any, directory: str | Path, spec: str | None = None, **settings: Any) -> Any:
    """A causal language model without weights that a config describes. settings: of `AutoModelForCausalLM.from_config`."""
    from transformers import AutoModelForCausalLM

    with _named(directory, spec):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trusts_remote_code(), **settings)


@contextmanager
def _named(directory: str | Path, spec: str | None) -> Iterator[None]:
    """Turn the error about code that may not run into one sentence."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        if "trust_remote_code" not in str(error) or trusts_remote_code():
            raise
        code = ", ".join(_code(Path(directory))) or "no transformers class reads it"
        raise CheckpointError(
            f"{spec or directory} needs Python code that comes with it ({code}), which does not run unasked; read that "
            f"code, and where you trust it add --trust-remote-code (in Python: {TRUST}=1 in the environment)"
        ) from None


def _code(directory: Path) -> list[str]:
    """The files of code that the config and the tokenizer of a model name."""
    found: list[str] = []
    for name in ("config.json", "tokenizer_config.json"):
        try:
            settings = read_json(directory / name)
        except (CheckpointError, OSError):
            continue
        classes = settings.get("auto_map") if isinstance(settings, dict) else None
        for entry in classes.values() if isinstance(classes, dict) else ():
            for one in entry if isinstance(entry, list) else [entry]:
                if isinstance(one, str) and "." in one:
                    found.append(f"{one.rpartition('.')[0]}.py")
    return list(dict.fromkeys(found))
