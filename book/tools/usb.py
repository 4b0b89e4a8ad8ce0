"""Packs what a class needs without a network into one zip: pages, slides, notebooks and wheels.

    python book/tools/usb.py ARCHIVE WHEEL [--site FOLDER] [--notebooks FOLDER] [--wheels FOLDER]

`make usb` calls it. Open samples are not packed: they are other people's data. START.html asks no
other host, and INSTALL.txt has three commands.
"""

import zipfile
from pathlib import Path
from typing import Annotated

import typer
from jinja2 import Environment, StrictUndefined

ROOT = Path(__file__).resolve().parents[2]
TOP = "regkit-course"  # the folder that the archive unpacks to

START = """\
<!doctype html>
<html lang="en-GB">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Learned registration of medical images</title>
<link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark; }
body { max-width: 44rem; margin: 3rem auto; padding: 0 1rem; line-height: 1.6;
       font-family: system-ui, "Segoe UI", Roboto, "DejaVu Sans", Arial, sans-serif; }
</style>
</head>
<body>
<h1>Learned registration of medical images</h1>
<p>Everything here opens from this folder. No network is needed.</p>
<ul>
<li><a href="site/index.html">The book</a></li>
<li>Slides:{% for deck in decks %}
<a href="site/slides/{{ deck }}/index.html">{{ deck }}</a>{% endfor %}</li>
<li>The notebooks: the folder <code>notebooks</code></li>
<li>How to run them: <a href="INSTALL.txt">INSTALL.txt</a>, three commands</li>
</ul>
<p>For research and teaching. Not a medical device.</p>
</body>
</html>
"""

INSTALL = """\
How to run the notebooks
========================

You need Python {python}. Open a terminal in this folder.

    python3 -m venv course
    {install}
    course/bin/jupyter lab notebooks

In Windows the first word is `python`, and `course/bin/` is `course\\Scripts\\`.
{note}
The book needs none of this: open START.html.
"""
WITH = "course/bin/pip install --no-index --find-links wheels '{name}[notebook]' jupyterlab"
WITHOUT = "course/bin/pip install 'wheels/{wheel}[notebook]' jupyterlab"
NEEDS = "The second command fetches the libraries from the network: they are not in this archive.\n"
HAS = "The second command needs no network: the wheels are here, for one system and one Python.\n"


def pages(site: Path, wheel: Path, has_wheels: bool) -> dict[str, str]:
    """START.html and INSTALL.txt, by their names in the archive."""
    decks = sorted(path.parent.name for path in site.glob("slides/*/index.html"))
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(START)
    install = (WITH if has_wheels else WITHOUT).format(
        name=wheel.name.split("-")[0].replace("_", "-"), wheel=wheel.name
    )
    note = HAS if has_wheels else NEEDS
    return {
        "START.html": template.render(decks=decks) + "\n",
        "INSTALL.txt": INSTALL.format(python="3.11, 3.12 or 3.13", install=install, note=note),
    }


def pack(
    archive: Path, wheel: Path, site: Path, notebooks: Path, wheels: Path | None = None
) -> list[str]:
    """Write the archive; the names in it.

    Args:
        archive: the file to write.
        wheel: of regkit.
        site: the folder of the built book, with its slides.
        notebooks: the folder with the notebooks that readers get.
        wheels: a folder with the wheels of the libraries; None leaves them out.

    Raises:
        FileNotFoundError: if the book, its slides, a notebook or a wheel is not there.
    """
    needed = {
        "the built book (make book)": site / "index.html",
        "the slides (make slides)": site / "slides" / "01" / "index.html",
        "the wheel of regkit (make wheel)": wheel,
    }
    for what, path in needed.items():
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there, expected {what}.")
    chapters = sorted(notebooks.glob("*.ipynb"))
    if not chapters:
        raise FileNotFoundError(f"{notebooks} holds no notebook, expected the chapters.")
    others = sorted(wheels.glob("*.whl")) if wheels else []
    if wheels and not others:
        raise FileNotFoundError(f"{wheels} holds no wheel, expected those of the libraries.")
    files = {f"site/{p.relative_to(site).as_posix()}": p for p in site.rglob("*") if p.is_file()}
    files |= {f"notebooks/{path.name}": path for path in chapters}
    files |= {f"wheels/{path.name}": path for path in (*others, wheel)}
    files |= {name: ROOT / name for name in ("LICENSE", "NOTICE")}
    archive.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, text in pages(site, wheel, bool(others)).items():
            packed.writestr(f"{TOP}/{name}", text)
        for name, path in sorted(files.items()):
            stored = zipfile.ZIP_STORED if path.suffix in (".whl", ".png") else None
            packed.write(path, f"{TOP}/{name}", stored)
        return packed.namelist()


def main(
    archive: Path,
    wheel: Path,
    site: Annotated[Path, typer.Option(help="The built book.")] = ROOT / "_build" / "html",
    notebooks: Annotated[Path, typer.Option(help="What readers get.")] = ROOT / "notebooks",
    wheels: Annotated[Path | None, typer.Option(help="Of the libraries; else left out.")] = None,
) -> None:
    """Pack pages, slides, notebooks and wheels into one zip."""
    try:
        names = pack(archive, wheel, site, notebooks, wheels)
    except FileNotFoundError as error:
        print(error)
        raise typer.Exit(1) from None
    print(f"{archive}: {len(names)} files, {archive.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    typer.run(main)
