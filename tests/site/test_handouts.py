"""The chapters on paper: every page of the file is there, and what is folded stays folded."""

import os
import re
from pathlib import Path

import handouts
import pytest


@pytest.fixture(scope="module")
def printed(browser, book, tmp_path_factory) -> bytes:
    """Of a folder that is named from here, as `make handouts` does."""
    site = Path(os.path.relpath(book))
    (path,) = handouts.handouts(browser, site, tmp_path_factory.mktemp("paper"), ["00"])
    assert path.name == "00.pdf"
    return path.read_bytes()


def test_a_chapter_on_paper_has_pages_of_a4_and_its_pictures(printed):
    assert printed.startswith(b"%PDF") and len(printed) < 5_000_000
    pages = re.findall(rb"/Type /Page\b", printed)
    boxes = {
        tuple(map(float, box.split())) for box in re.findall(rb"/MediaBox \[([\d. ]+)\]", printed)
    }
    assert len(pages) >= 5
    (box,) = boxes
    assert box == pytest.approx((0, 0, 210 / 25.4 * 72, 297 / 25.4 * 72), abs=1)  # points
    assert len(re.findall(rb"/Subtype /Image", printed)) >= 3
    assert "Before you start".encode("utf-16-be").hex().upper().encode() in printed  # its title


def test_what_is_not_there_is_named(browser, book, tmp_path):
    with pytest.raises(FileNotFoundError, match="numbers holds 99, expected some of 00, 01"):
        handouts.handouts(browser, book, tmp_path, ["99"])
    with pytest.raises(FileNotFoundError, match="holds no chapter, expected a book built by"):
        handouts.handouts(browser, tmp_path, tmp_path)
