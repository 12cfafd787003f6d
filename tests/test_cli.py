"""The command line: what it accepts, what it prints where, and how it fails."""

import argparse
import errno
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from sparsify import __version__, cli
from sparsify.cli import bench, checkpoint, compress, doctor
from sparsify.errors import CheckpointError

COMMANDS = [
    "apply",
    "plan",
    "search",
    "inspect",
    "verify",
    "export",
    "eval",
    "bench",
    "serve",
    "doctor",
    "demo",
    "recipes",
    "report",
    "kernels",
]
NESTED = [
    ["bench", "latency"],
    ["bench", "throughput"],
    ["bench", "serve"],
    ["bench", "kernels"],
    ["kernels", "build"],
    ["kernels", "list"],
]
APPLY = ["apply", "2of4", "--model", "m", "--output", "o"]


def raising(error: BaseException) -> Callable[[argparse.Namespace], cli.Outcome]:
    def handler(args: argparse.Namespace) -> cli.Outcome:
        raise error

    return handler


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS), *NESTED])
def test_every_command_explains_itself(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, "--help"])
    assert stop.value.code == 0
    assert " ".join(["usage: sparsify", *command]) in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.strip() == f"sparsify {__version__}"


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["prune"],
        ["apply", "2of4", "--model", "m"],
        ["bench"],
        ["bench", "latency"],
        ["bench", "latency", "a", "--input-len", "many"],
        ["export", "a", "--output", "b"],
        ["inspect", "a", "--", "--port", "1"],
        ["doctor", "--quick"],
        ["kernels"],
        ["bench", "kernels", "smollm2-135m", "--", "--dtype", "half"],
        ["bench", "kernels", "--rows", "1;2"],
        ["bench", "kernels", "--group-size", "rows"],
        ["bench", "latency", "a", "--threads", "all", "--best-threads"],
    ],
)
def test_usage_errors_exit_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.out == ""
    assert "usage: sparsify" in captured.err and "error:" in captured.err


def command_lines(text: str) -> list[str]:
    """Lines of a help page or a document that begin with our command; explanations behind several spaces fall away."""
    joined = re.sub(r"\\\n\s*", "", text)
    lines = (re.sub(r"^[#$ ]+", "", line) for line in joined.splitlines())
    return [re.split(r"\s{3,}|\s#", line)[0] for line in lines if line.startswith("sparsify ")]


def test_every_example_in_a_help_page_is_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    seen = []
    for command in [[], *([name] for name in COMMANDS if name not in ("bench", "kernels")), *NESTED]:
        with pytest.raises(SystemExit):
            cli.main([*command, "--help"])
        examples = capsys.readouterr().out.partition("examples:")[2]
        seen += command_lines(examples)
    assert len(seen) >= 15
    for line in seen:
        cli.parse(shlex.split(line)[1:])


@pytest.mark.parametrize("document", ["README.md", ".github/CONTRIBUTING.md", "recipes/*.yaml", "recipes/README.md"])
def test_every_command_in_a_document_is_accepted(document: str, repository: Path) -> None:
    for path in repository.glob(document):
        for line in command_lines(path.read_text(encoding="utf-8")):
            cli.parse(shlex.split(line)[1:])


def test_arguments_after_the_dashes_go_to_vllm_untouched() -> None:
    args = cli.parse(["serve", "d", "--", "--port", "1", "--", "x"])
    assert (args.directory, args.vllm_args) == ("d", ["--port", "1", "--", "x"])
    args = cli.parse(["bench", "latency", "a", "b=c", "--json", "--", "--dtype", "half"])
    assert (args.directories, args.vllm_args, args.json) == (["a", "b=c"], ["--dtype", "half"], True)


def test_workload_defaults_are_those_of_the_benchmarks() -> None:
    from sparsify.bench import LatencyWorkload, ThroughputWorkload

    for workload, said in ((LatencyWorkload, bench.LATENCY), (ThroughputWorkload, bench.THROUGHPUT)):
        assert {field.name: field.default for field in fields(workload)} == said


def test_json_is_alone_on_stdout(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Python, native code and child processes may print what they like: it ends on stderr."""

    def noisy(args: argparse.Namespace) -> cli.Outcome:
        print("from python")
        os.write(1, b"from native code\n")
        subprocess.run([sys.executable, "-c", "print('from a child')"], check=True)
        return cli.Outcome({"perplexity": 1.5}, ["for people"])

    monkeypatch.setattr(compress, "recipes", noisy)
    assert cli.main(["recipes", "--json"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out) == {"perplexity": 1.5}
    assert all(f"from {who}" in err for who in ("python", "native code", "a child"))

    assert cli.main(["recipes"]) == 0
    assert capfd.readouterr().out == "for people\n"


def test_exit_status_of_the_outcome(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "doctor", lambda args: cli.Outcome({"healthy": False}, [], status=1))
    assert cli.main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == {"healthy": False}


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (CheckpointError("x.safetensors is truncated"), 1, "error: x.safetensors is truncated"),
        (
            OSError(errno.ENOSPC, "No space left on device", "o/a"),
            1,
            "no space left on the disk (o/a): free some; finished",
        ),
        (
            RuntimeError("I/O error: No space left on device (os error 28)"),
            1,
            "error: no space left on the disk: free some",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "/o"), 1, "error: permission denied (/o)"),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "t.txt"),
            1,
            "error: No such file or directory (t.txt)",
        ),
        (
            OSError(errno.EIO, "Input/output error", "o/a"),
            1,
            "error: Input/output error (o/a); finished blocks are kept",
        ),
        (
            RuntimeError("I/O error: Input/output error (os error 5)"),
            1,
            "error: Input/output error; finished blocks are kept",
        ),
        (
            RuntimeError("unable to mmap 117112 bytes from file </o/a.safetensors>: Input/output error (5)"),
            1,
            "error: Input/output error (/o/a.safetensors); finished blocks are kept",
        ),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 46336 vs 46224"),
            1,
            "error: Input/output",
        ),
        (RuntimeError("PytorchStreamWriter failed writing file data/0"), 1, "error: Input/output error; finished"),
        (RuntimeError("basic_ios::clear: iostream error"), 1, "error: Input/output error; finished"),
        (
            MemoryError(),
            1,
            "error: out of memory: use fewer or shorter calibration samples, or a lower --memory; finished",
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 12"), 1, "error: out of memory"),
        (RuntimeError("std::bad_alloc"), 1, "error: out of memory"),
        (ValueError("two\nlines"), 1, "error: ValueError: two lines (this is a bug"),
        (KeyboardInterrupt(), 130, "interrupted; finished blocks are kept, go on with: sparsify apply"),
    ],
)
def test_errors_are_one_sentence(
    error: BaseException, status: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("SPARSIFY_DEBUG", raising=False)
    monkeypatch.setattr(compress, "apply", raising(error))
    assert cli.main([*APPLY, "--json"]) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err
    assert captured.err.count("\n") == 1, "one line"


def test_a_process_that_lost_another_one_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:5")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(compress, "apply", raising(lost))
    assert cli.main(APPLY) == 1
    said = capsys.readouterr().err
    assert "another process of this run has ended" in said and "--resume" in said and said.count("\n") == 1


def test_only_apply_speaks_of_resume(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(checkpoint, "evaluate", raising(KeyboardInterrupt()))
    assert cli.main(["eval", "d"]) == 130
    assert capsys.readouterr().err == "interrupted\n"

    monkeypatch.setattr(compress, "apply", raising(KeyboardInterrupt()))
    cli.main([*APPLY, "--resume"])
    assert capsys.readouterr().err.count("--resume") == 1


@pytest.mark.parametrize("argv", [["--debug", "doctor"], ["doctor", "--debug"], ["doctor"]])
def test_tracebacks_are_for_those_who_ask(
    argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("SPARSIFY_DEBUG", raising=False)
    monkeypatch.setattr(doctor, "doctor", raising(ZeroDivisionError("here")))
    assert cli.main(argv) == 1
    assert ("Traceback" in capsys.readouterr().err) is ("--debug" in argv)
    monkeypatch.setenv("SPARSIFY_DEBUG", "1")
    cli.main(argv)
    assert "Traceback" in capsys.readouterr().err


def test_a_recipe_without_a_model_needs_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "2of4"]) == 1
    assert "names no model: add --model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["plan", "2of4-w4a17", "--model", "m"], "2of4-w4a16"),
        (["plan", "2of4", "--model", "m", "--set", "calibration.sample=1"], "samples"),
        (["apply", "2of4", "--model", "./nowhere", "--output", "o"], "./nowhere"),
        (["inspect", "nowhere"], "nowhere"),
        (["verify", "nowhere"], "nowhere"),
        (["export", "./nowhere", "--format", "dense", "--output", "o"], "./nowhere"),
        (["eval", "./nowhere", "--text", "t.txt"], "./nowhere"),
        (["bench", "latency", "./nowhere"], "./nowhere" if find_spec("vllm") else "sparsify-24[cpu]"),
        (["serve", "./nowhere"], "./nowhere" if find_spec("vllm") else "sparsify-24[cpu]"),
    ],
)
def test_bad_input_is_named(
    argv: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(argv) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    last = captured.err.splitlines()[-1]  # progress may stand above it
    assert last.startswith("error: ") and said in last and "bug" not in last
    assert list(tmp_path.iterdir()) == []


def test_task_files_are_written_without_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "quiz.jsonl").write_text('{"question": "q", "choices": ["a", "b"], "answer": 1}')
    arguments = ["eval", "--tasks", str(tmp_path), "--write-task-files", str(tmp_path / "out"), "--limit", "1"]
    assert cli.main(arguments) == 0
    told = capsys.readouterr().out
    assert "--tasks sparsify_quiz --limit 1" in told and f"--include_path {tmp_path / 'out'}" in told
    written = yaml.safe_load((tmp_path / "out" / "sparsify_quiz.yaml").read_text())
    assert written["dataset_kwargs"] == {"data_files": {"test": str(tmp_path / "quiz.jsonl")}}
    assert cli.main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"task_files": [str(tmp_path / "out" / "sparsify_quiz.yaml")]}
    for incomplete, said in (
        (["eval"], "give a checkpoint directory"),
        (["eval", "--tasks", str(tmp_path)], "give a checkpoint directory"),
        (["eval", "d", "--write-task-files", "o"], "writes the tasks of --tasks FOLDER"),
    ):
        assert cli.main(incomplete) == 1
        assert said in capsys.readouterr().err


def test_ready_recipes_are_listed_with_what_they_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["recipes"]
    assert {"quickstart", "2of4", "w4a16", "2of4-w4a16"} <= set(found)
    assert all(len(entry["description"]) > 20 and Path(entry["path"]).is_file() for entry in found.values())


def test_first_comment() -> None:
    assert (
        compress.first_comment("# yaml-language-server: $schema=schema.json\n#\n# What it does.\nversion: 1")
        == "What it does."
    )
    assert compress.first_comment("version: 1") == ""


def test_the_module_is_the_command_and_a_closed_pipe_is_no_traceback() -> None:
    command = [sys.executable, "-m", "sparsify", "recipes"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()  # like `| head` that has seen enough
        assert process.stderr.read() == ""
        process.wait()


def test_images_and_manifests_say_where_they_listen(repository: Path) -> None:
    """A container is reached by its own address, so loopback, the default, would serve nobody."""
    commands = [
        json.loads(line.removeprefix("CMD "))
        for line in (repository / "deploy" / "Dockerfile.cpu").read_text().splitlines()
        if line.startswith("CMD [")
    ]
    for document in yaml.safe_load_all((repository / "deploy" / "kubernetes.yaml").read_text()):
        for container in document.get("spec", {}).get("template", {"spec": {}})["spec"].get("containers", ()):
            commands.append(container["args"])
    assert len(commands) == 2
    for command in commands:
        args = cli.parse(command)
        assert args.host == "0.0.0.0" and args.vllm_args[:2] == ["--port", "8000"]
    assert cli.parse(["serve", "d"]).host is None
