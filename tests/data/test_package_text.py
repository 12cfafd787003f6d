"""Articles out of the dump that a package carries, plain and in the form of corpora."""

import bz2
import runpy
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "package_text.py"
WIKI = """'''Autism''' is a [[disorder]] of the twenty-one. {{cite|x}}<ref>a note</ref> It was found in 1,200 people. %s

{| class="wikitable"
| a cell. with a sentence that is as long as a paragraph of an article has to be so that it is kept
|}

== Signs ==
The signs develop over time, and the child's first ones are seen by parents. They are many and they are known. %s

== See also ==
* [[A list of links that is as long as a paragraph has to be]]. And more of it, so that only its heading tells. %s
"""


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


def test_the_form_of_corpora(script: dict[str, Any]) -> None:
    texts = ["The cat, the cat; the well-known cat.\n\nthe 1,200", "the cat ran"]
    assert script["corpus_form"](texts) == [
        "<unk> cat , the cat ; the <unk> @-@ <unk> cat . \n the <unk> @,@ <unk>",
        "the cat <unk>",
    ]


def test_articles_of_a_dump(script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mwparserfromhell", reason="mwparserfromhell is not installed; pip install mwparserfromhell")
    long = "A sentence of the article. " * 80
    pages = [
        ("Autism", WIKI % (long, long, long)),
        ("Short", "Nothing much. It ends."),
        ("Albedo", WIKI % (long, long, long)),
    ]
    text = "".join(
        f"<page><title>{t}</title><revision><text>{w.replace('<', '&lt;')}</text></revision></page>" for t, w in pages
    )
    dump = bz2.compress(f'<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.8/">{text}</mediawiki>'.encode())
    with zipfile.ZipFile(tmp_path / "gensim.whl", "w") as wheel:
        wheel.writestr(script["DUMP"], dump)
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path / "gensim.whl"), "--output", str(tmp_path / "wiki")])
    script["main"]()
    plain, corpus = ((tmp_path / f"wiki-{form}.txt").read_text() for form in ("plain", "corpus"))
    assert plain.startswith(
        "= Autism =\n\nAutism is a disorder of the twenty-one. It was found in 1,200 people. A sentence"
    )
    assert "= Signs =" in plain and "child's first ones" in plain
    assert not any(
        word in plain + corpus for word in ("a note", "cite", "a cell", "list of links", "Nothing much", "[[")
    )
    assert corpus.startswith("= <unk> =") and "of the <unk> @-@ <unk> ." in corpus  # seen once
    assert corpus.count("A sentence of the article .") == 2 * 80
