"""The reference in the built book: entries, links to them from the chapters, and the search."""

from page_checks import TIMEOUT_MS

CHAPTER = "notebooks/01_images_grids_warps.html"
WARP = "book/reference/spatial.html#regkit.spatial.warp"
LINKS = """links => links.map(a => a.getAttribute("href").replace("../", ""))"""


def test_an_entry_says_what_its_docstring_says(browser, book):
    page = browser.new_page()
    page.goto((book / "book/reference/spatial.html").as_uri())
    entry = page.locator("dl:has(> dt[id='regkit.spatial.warp'])").first.inner_text()
    for text in ("warp(", "image: Tensor", "mode: str = 'linear'", "(B, C, *M)", "voxels"):
        assert text in entry
    assert "Arguments" in entry and "Returns" in entry and "ValueError" in entry
    assert "`" not in entry and "object at 0x" not in entry
    page.close()


def test_a_chapter_links_the_first_mention_of_a_name_and_no_other(browser, book):
    page = browser.new_page()
    page.goto((book / CHAPTER).as_uri())
    links = page.locator("article a:has(> code)").evaluate_all(LINKS)
    assert links.count(WARP) == 1
    assert "book/reference/metrics.html#regkit.metrics.folding_percent" in links
    page.locator(f"article a[href$='{WARP}']").click()
    page.wait_for_url("**/" + WARP)
    assert page.locator("dt:target").inner_text().startswith("warp(")
    page.close()


def test_names_that_a_chapter_defines_itself_are_not_linked(browser, book):
    page = browser.new_page()
    page.goto((book / "notebooks/05_cascades.html").as_uri())
    texts = page.locator("article a > code").all_inner_texts()
    assert {"losses.diffusion", "compose(first, then)"} <= set(texts)
    assert not {"look_again", "join(disp, step)", "moving", "path_of"} & set(texts)
    page.close()


def test_the_search_finds_a_name_and_a_command(browser, book):
    for query, target in [
        ("regkit.losses.lncc", "book/reference/losses.html#regkit.losses.lncc"),
        ("folding_percent", "book/reference/metrics.html#regkit.metrics.folding_percent"),
        ("regkit register", "book/reference/command_line.html#regkit-register"),
    ]:
        page = browser.new_page()
        page.goto(f"{(book / 'search.html').as_uri()}?q={query.replace(' ', '+')}")
        found = page.locator(f"#search-results a[href*='{target}']")
        found.first.wait_for(timeout=TIMEOUT_MS)
        page.close()


def test_the_page_of_commands_lists_every_option(browser, book):
    from typer.main import get_command

    from regkit.cli import app

    page = browser.new_page()
    page.goto((book / "book/reference/command_line.html").as_uri())
    text = page.locator("article").inner_text()
    for name, command in get_command(app).commands.items():
        section = text[text.index(f"\nregkit {name}\n") :]
        for parameter in command.params:
            assert all(option in section for option in parameter.opts), (name, parameter.name)
    page.close()
