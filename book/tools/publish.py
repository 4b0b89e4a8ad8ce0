"""Writes what the branch for Colab holds: each notebook with the address of this build, a README.

    python book/tools/publish.py FOLDER

The workflow that publishes the book pushes the folder to the branch `colab`. So whoever forks the
project and pushes has notebooks that open in Colab and install the library of that fork.
"""

from pathlib import Path

import nbformat
import typer
from address import COLAB_BRANCH, Address, found

import notebooks

README = """\
# Notebooks for Google Colab

Written by the workflow that publishes the book, from [{ref}]({repository}/tree/{ref}).
Whatever is changed here is lost with the next one.

{chapters}
"""
CHAPTER = (
    "- {title}: [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
    "(https://colab.research.google.com/github/{name}/blob/{branch}/notebooks/{file})"
)


def publish(folder: Path, address: Address) -> list[Path]:
    """Write all notebooks for this address, and a README that opens each of them.

    Args:
        folder: becomes what the branch holds.
        address: where the library is installed from, and whose branch it is.

    Returns:
        The notebooks that were written.
    """
    chapters, written = [], []
    (folder / "notebooks").mkdir(parents=True, exist_ok=True)
    for md in notebooks.select(None):
        notebook = notebooks.reader_version(md, address, COLAB_BRANCH)
        path = folder / "notebooks" / f"{md.stem}.ipynb"
        nbformat.write(notebook, path)
        written.append(path)
        chapters.append(
            CHAPTER.format(
                title=md.read_text(encoding="utf-8").partition("\n# ")[2].partition("\n")[0],
                name=address.repository.removeprefix("https://github.com/"),
                branch=COLAB_BRANCH,
                file=path.name,
            )
        )
    text = README.format(
        repository=address.repository, ref=address.ref, chapters="\n".join(chapters)
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
    return written


def main(folder: Path) -> None:
    """Write the notebooks for Colab into FOLDER, if this build knows an address on GitHub."""
    address = found(notebooks.ROOT)
    if address is None or not address.on_github:
        raise typer.BadParameter("the project has no address on GitHub, so no branch for Colab.")
    for path in publish(folder, address):
        print(path)


if __name__ == "__main__":
    typer.run(main)
