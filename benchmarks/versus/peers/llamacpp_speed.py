"""Run by the Python of .venv-llamacpp: llama.cpp's library at the work that vLLM's benchmarks do. `python llamacpp_speed.py JOB.json`

The job: model (a .gguf file), threads, input_len, output_len, iterations, warmup, prompts, result. Prompts are random tokens,
answers the likeliest ones, always of full length. RESULT gets

    first_token_seconds, request_seconds    one sequence, each iteration: one token, and all of them
    elapsed_seconds                         all prompts at once: read together, then decoded together, a token each per step
    versions, system                        the library's own line about the instructions that it was compiled for
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

BATCH = 2048  # tokens that are handed over at once, llama.cpp's own default


class Engine:
    """A model with room for `sequences` of `length` tokens at a time."""

    def __init__(self, model: str, threads: int, sequences: int, length: int) -> None:
        self.model = llama_cpp.llama_model_load_from_file(model.encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            sys.exit(f"llama.cpp cannot load {model}")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = (sequences * length + 255) // 256 * 256
        settings.n_batch = BATCH
        settings.n_seq_max = sequences
        settings.n_threads = settings.n_threads_batch = threads
        settings.kv_unified = True
        settings.no_perf = True
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        if not self.context:
            sys.exit(f"llama.cpp cannot make a context of {settings.n_ctx} tokens")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(BATCH, 0, 1)

    def decode(self, tokens: list[tuple[int, int, int, bool]]) -> list[int]:
        """tokens: (token, position, sequence, whether what follows is wanted), at most BATCH. The likeliest next tokens."""
        for place, (token, position, sequence, wanted) in enumerate(tokens):
            self.batch.token[place], self.batch.pos[place] = token, position
            self.batch.n_seq_id[place], self.batch.seq_id[place][0] = 1, sequence
            self.batch.logits[place] = wanted
        self.batch.n_tokens = len(tokens)
        if status := llama_cpp.llama_decode(self.context, self.batch):
            sys.exit(f"llama_decode failed with {status}")
        found = []
        for place, (_, _, _, wanted) in enumerate(tokens):
            if wanted:
                logits = llama_cpp.llama_get_logits_ith(self.context, place)
                found.append(int(np.ctypeslib.as_array(logits, (self.vocabulary,)).argmax()))
        return found

    def answer(self, prompts: list[list[int]], output_len: int) -> float:
        """Seconds of reading prompts together and giving each `output_len` tokens."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        started = time.perf_counter()
        whole = [
            (token, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        latest: list[int] = []
        for begin in range(0, len(whole), BATCH):
            latest += self.decode(whole[begin : begin + BATCH])
        for step in range(output_len - 1):
            latest = self.decode(
                [(token, len(prompts[sequence]) + step, sequence, True) for sequence, token in enumerate(latest)]
            )
        return time.perf_counter() - started


def main(job_file: str) -> None:
    job: dict[str, Any] = json.loads(Path(job_file).read_text(encoding="utf-8"))
    llama_cpp.llama_backend_init()
    inputs, outputs, count = job["input_len"], job["output_len"], job["prompts"]
    engine = Engine(job["model"], job["threads"], count, inputs + outputs)
    drawn = np.random.default_rng(0).integers(0, engine.vocabulary, (count, inputs)).tolist()
    one = [drawn[0]]
    found: dict[str, Any] = {}
    for name, length in (("first_token_seconds", 1), ("request_seconds", outputs)):
        times = [engine.answer(one, length) for _ in range(job["warmup"] + job["iterations"])]
        found[name] = times[job["warmup"] :]
    engine.answer(drawn, 2)
    found["elapsed_seconds"] = [engine.answer(drawn, outputs)]
    found["versions"] = {"llama-cpp-python": version("llama-cpp-python")}
    found["system"] = llama_cpp.llama_print_system_info().decode().strip()
    Path(job["result"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
