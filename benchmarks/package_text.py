"""Real text out of packages, for calibration and training where no text of one's own is at hand.

    pip install mwparserfromhell
    pip download gensim --no-deps
    python benchmarks/package_text.py gensim-*.whl --output wikipedia

gensim's wheel carries the first articles of the English Wikipedia as data of its tests (CC BY-SA). Every second article is
written to wikipedia-plain.txt as it is read, the others to wikipedia-corpus.txt in the form of published corpora: words and
marks apart, `@-@` between the parts of a word, `<unk>` for words seen fewer than three times. A recipe takes both:

    calibration:
      sources: [{source: self, weight: 2}, {source: "file:wikipedia-plain.txt"}, {source: "file:wikipedia-corpus.txt"}]
"""

from __future__ import annotations

import argparse
import bz2
import re
import zipfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

from sparsify.data.self_generated.ptb_style import apart

DUMP = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
SHORTEST = 2000  # characters of an article: below are redirects, stubs and lists of links
RARE = 3  # a word seen fewer times than this is <unk>, as in WikiText (arXiv 1609.07843, section 4)
LAST_SECTIONS = {
    "see also",
    "notes",
    "references",
    "further reading",
    "external links",
    "bibliography",
    "sources",
    "footnotes",
}


def articles(wheel: Path) -> list[tuple[str, str]]:
    """Title and wiki markup of every page in the dump that gensim's wheel carries."""
    with zipfile.ZipFile(wheel) as packed:
        root = ElementTree.fromstring(bz2.decompress(packed.read(DUMP)))
    pages = root.iterfind("{*}page")
    return [(page.findtext("{*}title", ""), page.findtext("{*}revision/{*}text", "")) for page in pages]


def paragraphs(markup: str) -> list[str]:
    """The headings (`= like this =`) and paragraphs of an article without tables, templates, notes and lists of links."""
    import mwparserfromhell

    code = mwparserfromhell.parse(markup)
    for tag in code.filter_tags(
        recursive=True, matches=lambda node: str(node.tag) in ("ref", "table", "gallery", "math")
    ):
        try:
            code.remove(tag)
        except ValueError:  # inside one that is gone already
            continue
    found: list[str] = []
    for section in code.get_sections(flat=True, include_lead=True):
        headings = section.filter_headings()
        title = headings[0].title.strip_code().strip() if headings else ""
        if title.lower() in LAST_SECTIONS:
            break
        for heading in headings:
            section.remove(heading)
        lines = section.strip_code().splitlines()
        # a paragraph has a sentence in it; captions, categories and what is left of tables have none
        body = [line.strip() for line in lines if len(line) > 80 and ". " in line + " " and "|" not in line]
        if body:
            found += [f"= {title} ="] if title else []
            found += [re.sub(r"\s+", " ", line) for line in body]
    return found


def corpus_form(texts: list[str]) -> list[str]:
    """Articles with words and marks apart, and `<unk>` for every word that is seen fewer than RARE times in all of them."""
    forms = [apart(text) for text in texts]
    seen = Counter(word for form in forms for word in form.split(" "))
    return [
        " ".join(w if seen[w] >= RARE or not w[:1].isalnum() else "<unk>" for w in form.split(" ")) for form in forms
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, help="gensim's wheel")
    parser.add_argument("--output", required=True, help="first part of the names of both files")
    args = parser.parse_args()
    read = [(title, paragraphs(markup)) for title, markup in articles(args.wheel)]
    read = [(title, found) for title, found in read if sum(map(len, found)) >= SHORTEST]
    whole = ["\n\n".join([f"= {title} =", *found]) for title, found in read]
    for form, of_articles in (("plain", whole[0::2]), ("corpus", corpus_form(whole[1::2]))):
        path = Path(f"{args.output}-{form}.txt")
        path.write_text("\n\n".join(of_articles) + "\n", encoding="utf-8")
        print(f"{path}: {len(of_articles)} articles, {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
