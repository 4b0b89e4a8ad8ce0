"""The search of the built book finds what people look for, over file:// with the network off."""

from urllib.parse import quote

import pytest

# what is typed -> a page that has to be among the results
WANTED = {
    "Colab": "book/how_to_use.html",
    "run in Colab": "book/what_people_type.html",
    "demons": "notebooks/11_classical_deformable.html",
    "Demons": "book/glossary.html",
    "SyN": "notebooks/11_classical_deformable.html",
    "syn": "book/what_you_get.html",
    "NIfTI": "book/data.html",
    "nifti": "book/what_people_type.html",
    "ANTs": "book/what_people_type.html",
    "CUDA out of memory": "book/what_people_type.html",
    "inverse": "book/glossary.html",
    "U-Net": "notebooks/03_voxelmorph.html",
    "注意力": "book/glossary.html",
    "equation": "book/equations.html",
}


@pytest.mark.parametrize("words", WANTED)
def test_the_search_finds(browser, book, words):
    context = browser.new_context(offline=True)
    errors = []
    try:
        page = context.new_page()
        page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"{(book / 'search.html').as_uri()}?q={quote(words)}")
        summary = "document.querySelector('#search-results .search-summary')"
        page.wait_for_function(f"{summary}?.textContent.length > 0", timeout=20_000)  # it has ended
        links = page.evaluate(
            "[...document.querySelectorAll('#search-results li a')].map(a => a.href)"
        )
    finally:
        context.close()
    found = {link.split("#")[0].split("?")[0].rsplit("/html/", 1)[-1] for link in links}
    assert WANTED[words] in found
    assert errors == []
