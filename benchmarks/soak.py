"""A served model under a mixed load: memory, failed requests, and whether greedy answers stay what they are alone.

    python benchmarks/soak.py out/smollm2 --minutes 30 --clients 32 --output out/soak.json
    python benchmarks/soak.py out/smollm2 --adapter out/lora/adapter ...     half of the requests with that adapter

It starts `sparsify serve`, asks every prompt once alone, and then lets the clients send prompts of many lengths, hang up in the
middle of an answer, and send requests that are none. An answer that differs from the one alone is allowed where, at the first
token that differs, the two likeliest tokens were within 0.02 of each other alone (the gap of log-probabilities is that of logits).
It ends with status 1 where a request was answered with 5xx, an answer differs without such a tie, the server died, or its
anonymous memory grew by more than --growth from the second tenth of the time to the last. Ctrl-C ends the load before its time,
and the record says how long it was.

The KV cache counts as memory from the first use of each of its blocks on: `-- --num-gpu-blocks-override 160` keeps it so small that
all of it is used before the second tenth. Ties are those of the type in which the model runs: logits of bfloat16 between 16 and 32
are 0.125 apart, so answers in bfloat16 part at gaps of that size; `-- --dtype float32` shows what 0.02 can show.
"""

from __future__ import annotations

import argparse
import datetime
import http.client
import json
import random
import shlex
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sparsify.bench.machine import describe_machine, installed_versions

TIE = 0.02
LENGTHS = (1, 4, 16, 64, 200)  # words of prompts
TOKENS = (1, 8, 32, 64)  # of answers
PROMPTS = 40
START_SECONDS = 1800
INTERVAL = 5.0  # seconds between two samples of memory
WORDS = (
    "the sea of a river was and in light stone he had to that green by night with they from house where water".split()
)
MALFORMED: tuple[bytes, ...] = (
    b"", b"{", b"[]", b'{"model": "NAME"}', b'{"model": "no such model", "prompt": "a"}', b'{"model": "NAME", "prompt": 3.5}',
    b'{"model": "NAME", "prompt": "a", "max_tokens": -1}', b'{"model": "NAME", "prompt": "a", "temperature": "hot"}',
    b'{"model": "NAME", "prompt": "a", "n": 1000000}', b'{"model": "NAME", "prompt": "a", "max_tokens": 1000000000}',
    b'{"model": "NAME", "prompt": [[1, 2], "a"]}', b'{"model": "NAME", "prompt": [99999999]}', b"\xff\xfe",
    b'{"model": "NAME", "prompt": "a", "logprobs": 5000}', b'{"model": "NAME", "prompt": "' + b"a " * 20_000 + b'"}',
)  # fmt: skip


@dataclass
class Tally:
    """What happened so far. Clients write to it under its lock."""

    statuses: Counter[str] = field(default_factory=Counter)
    equal: int = 0
    ties: int = 0
    different: list[dict[str, Any]] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, status: str) -> None:
        with self.lock:
            self.statuses[status] += 1


@dataclass(frozen=True)
class Answer:
    """tokens: as text; gaps: between the log-probabilities of the two likeliest at each of them."""

    tokens: tuple[str, ...]
    gaps: tuple[float, ...]


@dataclass(frozen=True)
class Question:
    model: str
    prompt: str
    tokens: int

    def body(self, stream: bool = False) -> bytes:
        asked = {"model": self.model, "prompt": self.prompt, "max_tokens": self.tokens, "temperature": 0, "logprobs": 2}
        return json.dumps({**asked, "ignore_eos": True, "stream": stream}).encode()


def questions(models: list[str], seed: int) -> list[Question]:
    """Prompts of random words, of every length and with answers of every length."""
    chance = random.Random(seed)
    texts = [" ".join(chance.choices(WORDS, k=chance.choice(LENGTHS))) for _ in range(PROMPTS)]
    return [Question(chance.choice(models), text, chance.choice(TOKENS)) for text in texts]


def request(port: int, body: bytes) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    try:
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def answer_of(content: bytes) -> Answer:
    said = json.loads(content)["choices"][0]["logprobs"]
    gaps = [sorted(best.values(), reverse=True) for best in said["top_logprobs"]]
    return Answer(tuple(said["tokens"]), tuple(best[0] - best[1] if len(best) > 1 else 1.0 for best in gaps))


def ask(port: int, question: Question, tally: Tally) -> Answer | None:
    status, content = request(port, question.body())
    tally.note(str(status))
    return answer_of(content) if status == 200 else None


def hang_up(port: int, question: Question, chance: random.Random, tally: Tally) -> None:
    """Read the beginning of a streamed answer and close the connection."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    try:
        connection.request("POST", "/v1/completions", question.body(stream=True), {"Content-Type": "application/json"})
        if chance.random() < 0.7:
            connection.getresponse().read(chance.choice((1, 100, 2000)))
        tally.note("hung up")
    finally:
        connection.close()


def compare(question: Question, alone: Answer, found: Answer, tally: Tally) -> None:
    """Count an answer as equal, as parted at a tie, or as different."""
    pairs = zip(alone.tokens, found.tokens, strict=False)
    place = next((i for i, (one, other) in enumerate(pairs) if one != other), None)
    with tally.lock:
        if place is None and len(alone.tokens) == len(found.tokens):
            tally.equal += 1
        elif place is not None and alone.gaps[place] <= TIE:
            tally.ties += 1
        else:
            gap = None if place is None else alone.gaps[place]
            tally.different.append(
                {"prompt": question.prompt[:80], "model": question.model, "token": place, "gap": gap}
            )


def client(
    port: int, seed: int, asked: list[Question], alone: dict[Question, Answer], over: threading.Event, tally: Tally
) -> None:
    """One client: of ten requests seven are answered, two hung up, one malformed."""
    chance = random.Random(seed)
    while not over.is_set():
        question, kind = chance.choice(asked), chance.random()
        try:
            if kind < 0.1:
                body = chance.choice(MALFORMED).replace(b"NAME", question.model.encode())
                tally.note(f"malformed {request(port, body)[0]}")
            elif kind < 0.3:
                hang_up(port, question, chance, tally)
            elif (found := ask(port, question, tally)) is not None:
                compare(question, alone[question], found, tally)
        except (OSError, http.client.HTTPException, ValueError, LookupError) as error:
            tally.note(f"failed: {type(error).__name__}")
            time.sleep(0.2)


def tree(process: int) -> list[int]:
    """A process and all below it."""
    found, pending = [], [process]
    while pending:
        found.append(one := pending.pop())
        try:
            pending += map(int, Path(f"/proc/{one}/task/{one}/children").read_text().split())
        except OSError:
            continue
    return found


def anonymous(process: int) -> int:
    """RssAnon of a process and all below it, in bytes."""
    total = 0
    for one in tree(process):
        try:
            lines = Path(f"/proc/{one}/status").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))
    return total


def watch(server: subprocess.Popen[bytes], over: threading.Event, tally: Tally) -> None:
    while server.poll() is None and not over.is_set():
        tally.memory.append(anonymous(server.pid))
        over.wait(INTERVAL)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def started(args: argparse.Namespace, port: int, log: Path) -> subprocess.Popen[bytes]:
    """The server, once it answers."""
    command = [sys.executable, "-m", "sparsify", "serve", args.directory, "--", "--port", str(port), *args.vllm]
    if args.adapter:
        command += ["--enable-lora", "--max-lora-rank", "64", "--lora-modules", f"adapter={args.adapter}"]
    with log.open("wb") as stream:
        server = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until and server.poll() is None:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return server
        except OSError:
            time.sleep(1)
    server.terminate()
    raise SystemExit(f"the server does not answer; its log is {log}:\n{log.read_text(errors='replace')[-3000:]}")


def growth(memory: list[int]) -> float | None:
    """The median of the last tenth of the samples over that of the second tenth, less 1."""
    tenth = len(memory) // 10
    if not tenth:
        return None
    return statistics.median(memory[-tenth:]) / statistics.median(memory[tenth : 2 * tenth]) - 1


def load(args: argparse.Namespace, port: int, server: subprocess.Popen[bytes], tally: Tally) -> float:
    """Every question alone, then all clients; returns the minutes for which they ran."""
    models = [Path(args.directory).resolve().name, *(["adapter"] if args.adapter else [])]
    asked = questions(models, args.seed)
    alone: dict[Question, Answer] = {}
    for question in asked:
        if (found := ask(port, question, tally)) is None:
            raise SystemExit(f"{question} is not answered: {dict(tally.statuses)}")
        alone[question] = found
    over, began = threading.Event(), time.monotonic()
    threads = [threading.Thread(target=watch, args=(server, over, tally))]
    threads += [
        threading.Thread(target=client, args=(port, args.seed + number, asked, alone, over, tally))
        for number in range(1, args.clients + 1)
    ]
    for thread in threads:
        thread.start()
    try:
        time.sleep(60 * args.minutes)
    except KeyboardInterrupt:
        print("the load ends before its time", file=sys.stderr)
    over.set()
    minutes = (time.monotonic() - began) / 60
    for thread in threads:
        thread.join()
    return minutes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", help="checkpoint directory")
    parser.add_argument("--adapter", help="a LoRA adapter that half of the requests use")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--growth", type=float, default=0.02, help="of memory, as a share")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("out/soak.json"))
    parser.usage = "soak.py [options] directory [-- VLLM_ARGS]"
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    args = parser.parse_args(words[:end])
    args.vllm = words[end + 1 :]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    port, tally = free_port(), Tally()
    server = started(args, port, args.output.with_suffix(".log"))
    try:
        minutes = load(args, port, server, tally)
        alive = server.poll() is None and request(port, b"{")[0] == 400
    finally:
        server.terminate()
        server.wait(60)
    grown = growth(tally.memory)
    failed = sum(
        count for status, count in tally.statuses.items() if status.split()[-1].startswith("5") or "failed" in status
    )
    result = {
        "date": datetime.date.today().isoformat(), "command": shlex.join(["python", "benchmarks/soak.py", *sys.argv[1:]]),
        "machine": describe_machine(), "versions": installed_versions(),
        "directory": args.directory, "adapter": args.adapter, "minutes": round(minutes, 1), "clients": args.clients,
        "requests": sum(tally.statuses.values()), "statuses": dict(sorted(tally.statuses.items())),
        "server_errors": failed, "alive": alive, "greedy_equal": tally.equal, "greedy_parted_at_a_tie": tally.ties,
        "greedy_different": tally.different[:50], "greedy_different_count": len(tally.different),
        "memory_before": tally.memory[0], "memory_after": tally.memory[-1], "memory_bytes": tally.memory, "memory_growth": grown,
    }  # fmt: skip
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "memory_bytes"}, indent=1))
    return int(bool(failed or tally.different or not alive or (grown is not None and grown > args.growth)))


if __name__ == "__main__":
    sys.exit(main())
