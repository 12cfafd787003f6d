"""`sparsify serve`: vLLM's server on a model, in the environment in which the benchmarks measure it."""

from __future__ import annotations

import ipaddress
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from sparsify.bench.engine_setup import (
    build_for,
    int8_environment,
    one_process_environment,
    require_vllm,
    tensor_parallel_ranks,
)
from sparsify.bench.machine import BIND, serving_environment, thread_binding, thread_environment
from sparsify.errors import SparsifyError
from sparsify.formats.belonging import check_tensors
from sparsify.manifest import VERIFIED, refuse_changed
from sparsify.model.checkpoint import open_checkpoint
from sparsify.model.permissions import trusts_remote_code
from sparsify.progress import warn

LOOPBACK = "127.0.0.1"
KEY = "VLLM_API_KEY"  # vLLM reads it where --api-key is not given


def serve(
    directory: str | Path,
    extra_args: Sequence[str] = (),
    threads: str | None = None,
    one_process: bool = False,
    int8: bool = False,
    replace: Callable[..., Any] = os.execvpe,
    host: str | None = None,
    verified: bool = False,
) -> None:
    """Replaces this process by `vllm serve` on a model, with the environment the benchmarks use; does not return.

    host: the address to listen on. Default: the one in `extra_args` or in a file that their --config names, else
    loopback, where vLLM itself would listen on all interfaces.
    verified: compare the files with their manifest first, which works for every format.
    """
    require_vllm()
    if verified:
        refuse_changed(directory)
    overrides = {BIND: thread_binding(threads, tensor_parallel_ranks(extra_args))} if threads else {}
    overrides |= one_process_environment(extra_args) if one_process else {}
    overrides |= int8_environment(int8)
    environment = serving_environment(overrides)
    environment |= thread_environment(environment[BIND], environment)
    checkpoint = open_checkpoint(directory)
    check_tensors(checkpoint)
    if verified:
        environment[VERIFIED] = str(checkpoint.directory)
    build_for([str((checkpoint.config.get("quantization_config") or {}).get("format"))])
    command = [sys.executable, "-m", "sparsify.bench.vllm_cli", "serve", str(checkpoint.directory), *extra_args]
    told = _value(extra_args, "--host")
    if host is not None and told is not None:
        raise SparsifyError(f"--host is given twice, as {host} and behind -- as {told}; keep one of the two")
    address = next(a for a in (host, told, _config_value(extra_args, "host"), LOOPBACK) if a is not None)
    if _value(extra_args, "--uds") is None:  # a socket in the file system has no address
        if told is None:
            command += ["--host", address]
        if not (_is_loopback(address) or _has_key(extra_args, environment)):
            warn(
                f"the server listens on {address or 'all addresses'} and checks no key: whoever reaches this machine "
                f"can use the model; set {KEY}, or listen on {LOOPBACK}"
            )
    if trusts_remote_code():
        command.append("--trust-remote-code")
    if _value(extra_args, "--served-model-name") is None:
        # A path of the server makes a poor name in every client; the directory's name is what people call the model.
        command += [
            "--served-model-name",
            Path(directory).resolve().name if Path(directory).is_dir() else str(directory),
        ]
    replace(command[0], command, environment)


def _value(arguments: Sequence[str], option: str) -> str | None:
    """What `--option value` or `--option=value` says, the last time; None where it is not there."""
    found = None
    for argument, following in pairwise([*arguments, ""]):
        name, equals, value = argument.partition("=")
        if name.replace("_", "-") == option:  # vLLM takes both spellings
            found = value if equals else following
    return found


def _config_value(arguments: Sequence[str], key: str) -> str | None:
    """What the file behind vLLM's --config says of `key`; whatever is wrong with that file is left to vLLM to say."""
    file = _value(arguments, "--config")
    if file is None or not Path(file).is_file():
        return None
    try:
        settings = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    found = settings.get(key) if isinstance(settings, dict) else None
    return None if found is None else str(found)


def _has_key(arguments: Sequence[str], environment: Mapping[str, str]) -> bool:
    return bool(_value(arguments, "--api-key") or environment.get(KEY) or _config_value(arguments, "api-key"))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
