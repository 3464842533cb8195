"""`make studies`: all scripts under examples/studies, in their quick form, on one page."""

import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from packages import require
from studies import FOLDER

LIMIT = 400  # seconds; it takes 30


class Page(HTMLParser):
    """Pictures and titles, and that each element ends in its turn."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.pictures: list[str] = []
        self.sections: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.pictures.append(str(dict(attrs)["src"]))
        elif tag != "meta":
            self.open.append(tag)
        if tag == "section":
            self.sections.append(str(dict(attrs)["id"]))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def scripts() -> set[str]:
    return {path.stem for path in FOLDER.glob("*.py")} - {"study", "page"}


def test_page(tmp_path: Path) -> None:
    require("matplotlib", "sklearn")
    command = [sys.executable, str(FOLDER / "page.py"), "--quick", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False, env=environment)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-4000:]}"
    page = Page()
    page.feed((tmp_path / "index.html").read_text())
    assert page.open == []
    assert set(page.sections) == scripts()
    assert page.pictures == [f"{name}.png" for name in page.sections]
    for picture in page.pictures:
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", sorted(scripts()))
def test_kept_copy(name: str) -> None:
    """docs/studies, which `make studies ARGS="--out docs/studies"` makes."""
    kept = FOLDER.parent.parent / "docs" / "studies"
    text = (kept / "index.html").read_text()
    assert f'<section id="{name}">' in text and "--quick" not in text
    assert (kept / f"{name}.png").exists()
