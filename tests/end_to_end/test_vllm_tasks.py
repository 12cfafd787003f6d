"""Tasks scored in vLLM through the plugin: the answers of transformers on the same checkpoint, but for those that nearly tie."""

import json
import random
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from sparsify.evaluation import evaluate
from tests.helpers.compressed import MIXED, compress, make_dense

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("needs_vllm")]
ITEMS = 40


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed (extra eval)")
def test_the_answers_are_those_of_transformers(tmp_path: Path) -> None:
    make_dense("qwen2", tmp_path / "dense", tie_word_embeddings=True)
    compress(tmp_path / "dense", tmp_path / "sparse24", "sparse24", {**MIXED, "lm_head": None})
    rng, words = random.Random(1), "the of and to in a is was for that he on as it with by at from".split()
    items = [
        {"question": " ".join(rng.choices(words, k=6)), "choices": [" ".join(rng.choices(words, k=2)) for _ in range(3)], "answer": 0}
        for _ in range(ITEMS)
    ]  # fmt: skip
    (tmp_path / "quiz.jsonl").write_text("\n".join(map(json.dumps, items)))
    command = [
        sys.executable, "-m", "sparsify", "eval", str(tmp_path / "sparse24"), "--tasks", str(tmp_path / "quiz.jsonl"),
        "--backend", "vllm", "--json", "--quiet",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    served = json.loads(done.stdout)
    assert served["backend"] == "vllm" and served["texts"] == {}
    assert any(name.startswith("vllm") for name in served["versions"])
    ours = evaluate(tmp_path / "sparse24", tasks=tmp_path / "quiz.jsonl", quiet=True).tasks["quiz"]
    theirs = served["tasks"]["quiz"]["right"]
    differing = sum(a != b for a, b in zip(ours.right, theirs, strict=True))
    assert differing <= ITEMS // 10 and 0 < ours.accuracy < 1
