"""Every picture of a page as files: SVG and CSV, and PNG where a program that converts is installed."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from sparsify.files import atomic_write
from sparsify.report.parts import Picture

SCALE = 2  # pixels of a PNG for one of the SVG
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
VARIABLE = re.compile(r"--([\w-]+):\s*([^;]+);")


def write_figures(context: Any, folder: str | Path) -> list[Path]:
    """Write every picture in a context of the templates; returns the files. In light colours, as for paper."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    convert = converter()
    written, names = [], set()
    for picture in pictures(context):
        name, number = picture.name, 2
        while name in names:
            name, number = f"{picture.name}-{number}", number + 1
        names.add(name)
        drawn, table = folder / f"{name}.svg", folder / f"{name}.csv"
        atomic_write(drawn, standalone(picture.wide))
        atomic_write(table, picture.csv)
        written += [drawn, table]
        if convert is not None and (converted := _converted(convert, picture.wide, folder / f"{name}.png")):
            written.append(converted)
    return written


def pictures(context: Any) -> Iterator[Picture]:
    """Every picture in a context, in its order."""
    if isinstance(context, Picture):
        yield context
    elif isinstance(context, Mapping):
        for value in context.values():
            yield from pictures(value)
    elif isinstance(context, Sequence) and not isinstance(context, str):
        for value in context:
            yield from pictures(value)


def standalone(drawing: str) -> str:
    """An SVG that needs nothing beside it: with its name space, the page's rules for pictures, and its light colours."""
    templates = files("sparsify.report") / "templates"
    colours = dict(VARIABLE.findall((templates / "style.css").read_text().split("@media")[0]))
    rules = re.sub(r"var\(--([\w-]+)\)", lambda found: colours[found[1]], (templates / "pictures.css").read_text())
    start = drawing.index(">") + 1
    head = drawing[:start].replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    ground = f'<rect width="100%" height="100%" fill="{colours["card"]}"/>'
    return f"{head}<style>{rules}</style>{ground}{drawing[start:]}\n"


def converter() -> list[str] | None:
    """The program that makes PNG of SVG, with what it is always told; None where there is none."""
    if found := shutil.which("rsvg-convert"):
        return [found]
    return next(([found] for name in BROWSERS if (found := shutil.which(name))), None)


def _converted(program: Sequence[str], drawing: str, to: Path) -> Path | None:
    """The PNG of a drawing; None where the program does not make one."""
    size = re.search(r'width="([\d.]+)" height="([\d.]+)"', drawing)
    assert size is not None
    width, height = (round(float(one)) for one in size.groups())
    with tempfile.TemporaryDirectory(prefix="sparsify-figures-") as scratch:
        source, made = Path(scratch) / "figure.svg", Path(scratch) / "figure.png"
        source.write_text(standalone(drawing), encoding="utf-8")
        if Path(program[0]).name == "rsvg-convert":
            asked = ["--zoom", str(SCALE), "--output", str(made), str(source)]
        else:
            asked = [
                "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={scratch}/profile",
                f"--force-device-scale-factor={SCALE}", f"--window-size={width},{height}", f"--screenshot={made}", source.as_uri(),
            ]  # fmt: skip
        try:
            subprocess.run([*program, *asked], capture_output=True, check=True, timeout=120)
            atomic_write(to, made.read_bytes())
        except (OSError, subprocess.SubprocessError):
            return None
    return to
