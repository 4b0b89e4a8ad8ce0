"""Quizzes and questions to guess on the pages of the book: with a script, without one, on paper."""

import pytest

from regkit.book import quiz

PAGE = "notebooks/01_images_grids_warps.html"
ITEMS = quiz("01").items


@pytest.fixture
def opened(browser, book):
    """Opens the page of chapter 01 without a network, in a window with these settings."""
    contexts = []

    def open_page(**settings):
        contexts.append(browser.new_context(offline=True, **settings))
        page = contexts[-1].new_page()
        page.goto((book / PAGE).as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()


def answer(page, item, place, chosen):
    """Choose options and check them, by keyboard alone."""
    inputs = place.get_by_role("checkbox" if item.several else "radio")
    assert inputs.count() == len(item.options)
    assert place.get_by_role("button", name="Check").is_disabled()
    for k in chosen:
        inputs.nth(k).focus()
        page.keyboard.press("Space")
    for _ in range(len(item.options)):  # on to the button
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.tagName") == "BUTTON":
            break
    page.keyboard.press("Enter")


def test_a_quiz_is_answered_by_keyboard_and_counted(opened):
    page = opened()
    places = page.locator(".regkit-item")
    assert places.count() == len(ITEMS) and page.locator(".regkit-score").inner_text() == ""
    for number, item in enumerate(ITEMS):
        right = [k for k, option in enumerate(item.options) if option.right]
        wrong = next(k for k, option in enumerate(item.options) if not option.right)
        place = places.nth(number)
        assert not place.locator("details").is_visible()
        answer(page, item, place, [wrong] if number == 0 else right)
        result = place.locator(".regkit-result")
        assert result.get_attribute("role") == "status"
        if number:
            assert result.inner_text() == "Right."
        else:
            assert result.inner_text() == f"Not right: the answer is {'ABCDE'[right[0]]}."
            assert place.locator(".regkit-no").count() == 1
        for option in item.options:
            assert option.why.replace("`", "")[:30] in place.locator("details").inner_text()
    assert page.locator(".regkit-score").inner_text() == f"{len(ITEMS) - 1} of {len(ITEMS)} right."
    page.get_by_role("button", name="Start again").click()
    assert page.locator(".regkit-score").inner_text() == ""
    assert page.get_by_role("radio").first.is_enabled()


def test_every_choice_has_a_label_and_every_question_a_name(opened):
    page = opened()
    names = page.locator(".regkit-quiz input").evaluate_all(
        "inputs => inputs.map(input => input.labels[0].innerText)"
    )
    assert len(names) == sum(len(item.options) for item in ITEMS)
    assert all(name.startswith(tuple("ABCDE")) for name in names)
    for number, item in enumerate(ITEMS, 1):
        asked = page.get_by_role("group" if item.several else "radiogroup", name=f"{number}. ")
        assert asked.count() >= 1


def test_without_a_script_the_answers_are_folded(opened):
    page = opened(java_script_enabled=False)
    assert page.locator(".regkit-quiz input, .regkit-quiz button").count() == 0
    details = page.locator(".regkit-quiz details")
    assert details.count() == len(ITEMS)
    first = details.first
    assert page.locator(".regkit-options li").first.is_visible()
    assert not first.locator("li").first.is_visible()
    first.locator("summary").click()
    assert first.locator("li").first.inner_text().startswith("A Wrong. ")
    guesses = page.locator(".regkit-predict ul").first
    assert guesses.locator("li").count() >= 2 and guesses.is_visible()


def test_a_guess_is_repeated_and_the_answer_stays_folded(opened):
    page = opened()
    place = page.locator(".regkit-predict:has(details):has(button)").first
    buttons = place.get_by_role("button")
    buttons.nth(0).click()
    buttons.nth(1).click()
    said = place.get_by_role("status").inner_text()
    assert said == f"You guessed: {buttons.nth(1).inner_text()}"
    assert buttons.evaluate_all("all => all.map(b => b.ariaPressed)")[:2] == ["false", "true"]
    assert not place.locator("details p").first.is_visible()
    place.locator("summary").click()
    assert place.locator("details p").first.is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_the_colour_of_the_page(opened, scheme):
    page = opened(color_scheme=scheme)
    colours = page.evaluate(
        """() => ["article section > p", ".regkit-item > p", ".regkit-item label",
                  ".regkit-item summary", ".regkit-predict button"]
            .map(place => getComputedStyle(document.querySelector(place)).color)"""
    )
    assert len(set(colours)) == 1, colours


def test_it_fits_a_phone_and_can_be_touched(opened):
    page = opened(viewport={"width": 390, "height": 844})
    for number in range(len(ITEMS)):
        place = page.locator(".regkit-item").nth(number)
        place.locator("input").first.check()
        place.get_by_role("button", name="Check").click()
    far = "all => Math.max(...all.map(e => e.getBoundingClientRect().right))"
    for kind in (".regkit-quiz, .regkit-quiz *", ".regkit-predict, .regkit-predict > *"):
        assert page.locator(kind).evaluate_all(far) <= 390
    low = "all => Math.min(...all.map(e => e.getBoundingClientRect().height))"
    assert page.locator(".regkit-item label, .regkit-predict button").evaluate_all(low) >= 30


def test_on_paper_answers_of_a_quiz_are_folded_and_those_to_a_guess_open(opened):
    page = opened()
    answers = page.locator(".regkit-predict details")
    seen = "all => all.map(e => e.querySelector('p').checkVisibility())"
    assert set(answers.evaluate_all(seen)) == {False}
    page.emulate_media(media="print")
    assert set(answers.evaluate_all(seen)) == {True}
    assert page.locator(".regkit-item > p").first.is_visible()
    for kind in ("button", "details li"):
        shown = page.locator(f".regkit-quiz {kind}").evaluate_all(
            "all => all.filter(e => e.offsetParent !== null).length"
        )
        assert shown == 0, kind
