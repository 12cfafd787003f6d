#!/usr/bin/env python3
"""Runs the steps of a Dockerfile without a container engine, then serves from the result as the container would.

    sudo deploy/try_image.py build deploy/Dockerfile.cpu ROOTS
    sudo deploy/try_image.py serve deploy/Dockerfile.cpu ROOTS MODEL [-- VLLM_ARGS]
    sudo deploy/try_image.py build deploy/Dockerfile.cuda ROOTS --stage kernels

`build` makes a clean Debian in a folder of ROOTS (debootstrap, in place of the base image) and runs COPY and RUN there, each
RUN as its user in a chroot with nothing of this machine's environment. `serve` starts ENTRYPOINT and CMD as the image's user
with MODEL at /model and what deploy/chart asks of a cluster: the root read-only, memory at /tmp, /dev/shm (neither may hold
programs) and the user's cache, no capabilities, no way to new privileges, no network but the loopback of its own. It waits
for HEALTHCHECK, asks for a completion and for the metrics, and stops the server with SIGTERM.

Needs root, Linux, debootstrap and util-linux; for `build` the network. Behind a mirror or a proxy: --mirror, --env
PIP_INDEX_URL=..., and --mount FOLDER for what pip or apt are to find at the same place as here. A file that a package of the root
brings along, as /etc/ssl/certs/ca-certificates.crt, cannot be one of these: copy it elsewhere and name it in PIP_CERT.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

CONTEXT = Path(__file__).resolve().parent.parent
BASE = re.compile(r"debian:(?P<suite>[a-z]+)-slim")
DEVICES = ("null", "zero", "full", "random", "urandom")
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
ADDRESS = "http://127.0.0.1:8000"
BELOW = "SPARSIFY_TRY_IMAGE"  # set in the process that has namespaces of its own


def say(text: str) -> None:
    print(f"[try-image] {text}", file=sys.stderr, flush=True)


def fail(text: str) -> NoReturn:
    say(f"error: {text}")
    raise SystemExit(1)


@dataclass
class Stage:
    """What one FROM begins."""

    name: str
    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)  # (instruction, its text)


def read_dockerfile(file: Path) -> list[Stage]:
    """The stages of a Dockerfile; the last one is called `image` where it has no name."""
    stages: list[Stage] = []
    lines = [line for line in file.read_text().splitlines() if not line.lstrip().startswith("#")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        instruction, _, text = line.strip().partition(" ")
        if instruction == "FROM":
            base, _, name = text.partition(" AS ")
            stages.append(Stage(name or "image", base))
        elif instruction:
            stages[-1].steps.append((instruction, text.strip()))
    return stages


@dataclass
class Image:
    """A stage with its root, and what its instructions have set so far."""

    root: Path
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": DEFAULT_PATH})
    user: str = "0:0"
    folder: str = "/"
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    healthcheck: list[str] = field(default_factory=list)

    def note(self, instruction: str, text: str) -> bool:
        """Take in an instruction that changes settings only; False for COPY and RUN."""
        if instruction == "ENV":
            self.environment.update(re.findall(r"(\w+)=(\S+)", text))
        elif instruction == "USER":
            self.user = text
        elif instruction == "WORKDIR":
            self.folder = text
        elif instruction == "ENTRYPOINT":
            self.entrypoint = json.loads(text)
        elif instruction == "CMD":
            self.command = json.loads(text)
        elif instruction == "HEALTHCHECK":
            self.healthcheck = json.loads(text.partition(" CMD ")[2])
        elif instruction != "EXPOSE":
            return False
        return True

    def inside(
        self, command: list[str], extra: dict[str, str] | None = None, rights: tuple[str, ...] = ()
    ) -> list[str]:
        """The command line that runs `command` in the root as the image's user, with its environment and nothing else."""
        user, _, group = self.user.partition(":")
        variables = [
            f"{name}={value}" for name, value in {"HOME": "/root", **self.environment, **(extra or {})}.items()
        ]
        privileges = ["setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups", *rights]
        enter = ["sh", "-c", 'cd "$0" && exec "$@"', self.folder]
        return ["chroot", str(self.root), *privileges, "env", "-i", *variables, *enter, *command]


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def mount_system(root: Path) -> None:
    """/proc, /sys and the devices that programs expect; the namespace's end takes all mounts away again."""
    mount("-t", "proc", "proc", str(root / "proc"))
    mount("-t", "sysfs", "-o", "ro", "sysfs", str(root / "sys"))
    mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", str(root / "dev"))
    for name in DEVICES:
        (root / "dev" / name).touch()
        mount("--bind", f"/dev/{name}", str(root / "dev" / name))
    for name, target in {"fd": "/proc/self/fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2"}.items():
        (root / "dev" / name).symlink_to(target)
    for name in ("shm", "pts"):
        (root / "dev" / name).mkdir()
    mount("-t", "devpts", "-o", "newinstance,ptmxmode=0666", "devpts", str(root / "dev" / "pts"))
    (root / "dev" / "ptmx").symlink_to("pts/ptmx")
    mount("-t", "tmpfs", "-o", "nosuid,nodev,noexec,mode=1777", "tmpfs", str(root / "dev" / "shm"))


def show(root: Path, place: str) -> None:
    """A folder or file of this machine, at the same place in the root and read-only."""
    source, target = Path(place), root / place.lstrip("/")
    if source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
    mount("--bind", str(source), str(target))
    mount("-o", "remount,bind,ro", str(target))


def copy(image: Image, text: str, roots: Path) -> None:
    """COPY, with --from=STAGE."""
    words = text.split()
    origin = roots / words.pop(0).partition("=")[2] if words[0].startswith("--from=") else CONTEXT
    *sources, last = words
    target = image.root / (Path(image.folder) / last).as_posix().lstrip("/")
    for name in sources:
        source = origin / name.lstrip("/")
        if source.is_dir():
            shutil.copytree(
                source, target, dirs_exist_ok=True, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
            )
            continue
        several = last.endswith("/") or len(sources) > 1
        (target if several else target.parent).mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target / source.name if several else target)


def new_root(root: Path, base: str, mirror: str) -> None:
    found = BASE.fullmatch(base)
    if found is None:
        fail(f"the base image {base} has no counterpart here; known: debian:SUITE-slim")
    say(f"debootstrap {found['suite']} in place of {base}")
    subprocess.run(
        ["debootstrap", "--variant=minbase", found["suite"], str(root), mirror], check=True, stdout=subprocess.DEVNULL
    )


def build(arguments: argparse.Namespace) -> None:
    """Run the steps of a stage, in a root that is new."""
    stage = find_stage(arguments.dockerfile, arguments.stage)
    root = arguments.roots.resolve() / stage.name
    if root.exists():
        fail(f"{root} is there already; remove it or name another folder")
    arguments.roots.mkdir(parents=True, exist_ok=True)
    new_root(root, stage.base, arguments.mirror)
    shutil.copyfile("/etc/resolv.conf", root / "etc" / "resolv.conf")
    mount_system(root)
    for place in arguments.mount:
        show(root, place)
    extra = dict(pair.split("=", 1) for pair in arguments.env)
    image = Image(root)
    for number, (instruction, text) in enumerate(stage.steps, 1):
        if image.note(instruction, text):
            (root / image.folder.lstrip("/")).mkdir(parents=True, exist_ok=True)
        elif instruction == "COPY":
            copy(image, text, arguments.roots)
        elif instruction == "RUN":
            started = time.monotonic()
            say(f"step {number}/{len(stage.steps)} as {image.user}: RUN {text[:100]}")
            done = subprocess.run(image.inside(["/bin/sh", "-c", text], extra), stdin=subprocess.DEVNULL)
            if done.returncode:
                fail(f"step {number} ended with {done.returncode}: RUN {text}")
            say(f"step {number}: {time.monotonic() - started:.0f} s")
        else:
            fail(f"step {number}: {instruction} is not known here")
    say(f"all {len(stage.steps)} steps of {stage.name} ran: {root}")


def find_stage(dockerfile: Path, name: str) -> Stage:
    stages = {stage.name: stage for stage in read_dockerfile(dockerfile)}
    if name not in stages:
        fail(f"{dockerfile} has no stage {name}; it has {', '.join(stages)}")
    return stages[name]


def loopback_up() -> None:
    """Switch on the loopback device of a new network namespace, which is down."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16sH14s", b"lo", 0x1 | 0x40, b"")  # IFF_UP | IFF_RUNNING
        fcntl.ioctl(sock, 0x8914, request)  # SIOCSIFFLAGS


def seal(image: Image, model: Path) -> None:
    """The root read-only, the model in it, and memory where the chart mounts an emptyDir."""
    root = image.root
    (root / "model").mkdir(exist_ok=True)
    mount("--bind", str(root), str(root))
    mount("-o", "remount,bind,ro", str(root))
    mount_system(root)
    mount("--bind", str(model), str(root / "model"))
    mount("-o", "remount,bind,ro", str(root / "model"))
    user, _, group = image.user.partition(":")
    cache = root / image.environment["HOME"].lstrip("/") / ".cache"
    mount("-t", "tmpfs", "-o", f"nosuid,nodev,mode=700,uid={user},gid={group}", "tmpfs", str(cache))
    mount("-t", "tmpfs", "-o", "nosuid,nodev,noexec,mode=1777", "tmpfs", str(root / "tmp"))


def ask(path: str, body: dict[str, object] | None = None) -> str:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(ADDRESS + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as reply:
        return reply.read().decode()


def check_rights(proc: Path, pid: int, user: str) -> None:
    """What the kernel says of the server: its user, no capabilities. proc: that of the server's own processes."""
    status = dict(
        line.split(":\t", 1) for line in (proc / str(pid) / "status").read_text().splitlines() if ":\t" in line
    )
    rights = {name: status.get(name, "").strip() for name in ("Uid", "CapEff", "CapBnd", "NoNewPrivs")}
    say(f"the server: {rights}")
    if rights["Uid"].split() != [user.partition(":")[0]] * 4 or int(rights["CapEff"], 16):
        fail("the server has more rights than it should")


def serve(arguments: argparse.Namespace) -> None:
    """Start the server as the container would, ask it, stop it."""
    stage = find_stage(arguments.dockerfile, "image")
    image = Image(arguments.roots.resolve() / stage.name)
    for instruction, text in stage.steps:
        image.note(instruction, text)
    loopback_up()
    seal(image, arguments.model.resolve())
    rights = ("--no-new-privs", "--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all")
    extra = dict(pair.split("=", 1) for pair in arguments.env)
    command = [*image.entrypoint, *image.command, *arguments.vllm_args]
    started = time.monotonic()
    with arguments.log.open("wb") as log:
        server = subprocess.Popen(image.inside(command, extra, rights), stdout=log, stderr=log)
    try:
        wait_for_health(server, image, rights, arguments)
        say(f"healthy after {time.monotonic() - started:.0f} s")
        check_rights(image.root / "proc", server.pid, image.user)
        body = {"model": "model", "prompt": arguments.prompt, "max_tokens": 8, "temperature": 0}
        say(f"completion: {json.loads(ask('/v1/completions', body))['choices'][0]['text']!r}")
        for line in ask("/metrics").splitlines():
            if line.startswith(("sparsify_", "vllm:num_requests_waiting")):
                say(line)
        said = [line for line in arguments.log.read_text().splitlines() if "sparse24: back end" in line]
        for line in said:
            say(line)
        if not said:
            fail(f"no line of {arguments.log} says which back end serves")
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            say(f"after SIGTERM the server ended with {server.wait(120)}")
        except subprocess.TimeoutExpired:
            server.kill()
            say("the server did not end within 120 s of SIGTERM and was killed")


def wait_for_health(
    server: subprocess.Popen[bytes], image: Image, rights: tuple[str, ...], arguments: argparse.Namespace
) -> None:
    end = time.monotonic() + arguments.seconds
    while time.monotonic() < end:
        if server.poll() is not None:
            fail(f"the server ended with {server.returncode}:\n{arguments.log.read_text()[-4000:]}")
        check = subprocess.run(image.inside(image.healthcheck, None, rights), capture_output=True)
        if check.returncode == 0:
            return
        time.sleep(5)
    fail(f"not healthy after {arguments.seconds} s; see {arguments.log}")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True)
    for name, handler in (("build", build), ("serve", serve)):
        command = commands.add_parser(name)
        command.set_defaults(handler=handler)
        command.add_argument("dockerfile", type=Path)
        command.add_argument("roots", type=Path, metavar="ROOTS", help="folder with the root of each stage")
        command.add_argument("--env", action="append", default=[], metavar="NAME=VALUE")
        if name == "build":
            command.add_argument("--stage", default="image", help="stage to run (the last)")
            command.add_argument("--mirror", default="http://deb.debian.org/debian", help="of Debian")
            command.add_argument(
                "--mount", action="append", default=[], metavar="PLACE", help="readable in the root too"
            )
        else:
            command.add_argument("model", type=Path, metavar="MODEL", help="checkpoint directory")
            command.add_argument("--log", type=Path, default=Path("server.log"), help="of the server (server.log)")
            command.add_argument("--prompt", default="Hello")
            command.add_argument("--seconds", type=int, default=900, help="until the server must be healthy (900)")
    return top


def main() -> None:
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    arguments = parser().parse_args(words[:end])
    arguments.vllm_args = words[end + 1 :]
    if os.environ.get(BELOW) != "1":
        os.environ[BELOW] = "1"
        spaces = (
            ["--mount"] if arguments.command == "build" else ["--mount", "--net", "--pid", "--fork", "--kill-child"]
        )
        os.execvp("unshare", ["unshare", *spaces, sys.executable, str(Path(__file__).resolve()), *sys.argv[1:]])
    arguments.handler(arguments)


if __name__ == "__main__":
    main()
