"""Print the chapters as PDF, one file each, by a browser and the rules of the pages for paper.

    python book/tools/handouts.py SITE OUT [NUMBER ...]

`make handouts` calls it for the built book, and with SITE=_build/student/html for the one without
solutions. What is folded in a page is folded on paper.
"""

from pathlib import Path
from typing import Annotated

import browser
import typer
from playwright.sync_api import Browser

FOOT = (
    '<div style="font-size: 8px; width: 100%; text-align: center">'
    '<span class="title"></span>, page <span class="pageNumber"></span> of '
    '<span class="totalPages"></span></div>'
)


def handouts(
    chromium: Browser, site: Path, out: Path, numbers: list[str] | None = None
) -> list[Path]:
    """Write NN.pdf for each chapter, on A4.

    Args:
        chromium: a browser, which stays open. site: a built book, the folder with index.html.
        out: the folder to write to.
        numbers: of the chapters, such as "07"; None: all.

    Returns:
        The files.

    Raises:
        FileNotFoundError: no built book, or no such chapter in it.
    """
    pages = {
        page.name[:2]: page for page in sorted((site.resolve() / "notebooks").glob("[0-9]*.html"))
    }
    if not pages:
        raise FileNotFoundError(f"{site} holds no chapter, expected a book built by 'make book'.")
    if unknown := set(numbers or ()) - set(pages):
        raise FileNotFoundError(
            f"numbers holds {sorted(unknown)[0]}, expected some of {', '.join(pages)}."
        )
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for number in numbers or pages:
        page = chromium.new_page()
        page.goto(pages[number].as_uri())
        page.evaluate(browser.COMPLETE)
        written.append(out / f"{number}.pdf")
        page.pdf(
            path=written[-1],
            format="A4",
            margin={"top": "15mm", "bottom": "15mm", "left": "15mm", "right": "15mm"},
            display_header_footer=True,
            header_template="<span></span>",
            footer_template=FOOT,
        )
        page.close()
    return written


def main(
    site: Path,
    out: Path,
    numbers: Annotated[list[str] | None, typer.Argument(help="Such as 07; all by default.")] = None,
) -> None:
    """Print the chapters as PDF."""
    with browser.opened() as chromium:
        for path in handouts(chromium, site, out, numbers):
            print(path)


if __name__ == "__main__":
    typer.run(main)
