"""Questions to the reader: quizzes that count, and guesses before an answer.

    :::{quiz} 07
    :::

shows the quiz of a chapter, from regkit/book/quizzes/07.toml.

    :::{predict} Which way will the brain move?
    :guess: to the left | to the right

    It moves to the left.
    :::

asks a question in bold. `guess` lists what a reader may click, without a score. The body, if there
is one, is the answer, folded. Both work without a script; regkit/book/static/quiz.js adds the rest.
"""

import sys
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # the regkit of this folder, whatever is installed

from regkit.book.quiz import inline_html, invitation, quiz  # noqa: E402

FOLDER = ROOT / "regkit" / "book"


def raw(html: str) -> nodes.raw:
    return nodes.raw("", html, format="html")


class QuizOfChapter(SphinxDirective):
    """The quiz of the chapter that the argument names."""

    required_arguments = 1

    def run(self):
        (chapter,) = self.arguments
        try:
            questions = quiz(chapter)
        except ValueError as error:
            raise self.error(str(error)) from error
        self.env.note_dependency(str(FOLDER / "quizzes" / f"{chapter}.toml"))
        return [raw(f"<p>{inline_html(invitation(chapter))}</p>\n{questions.html()}")]


class Predict(SphinxDirective):
    """A question in bold, guesses to click, and the folded answer."""

    required_arguments = 1
    final_argument_whitespace = True
    has_content = True
    option_spec = {"guess": directives.unchanged_required}

    def run(self):
        question = nodes.paragraph("", "", nodes.strong("", "", *self.inline(self.arguments[0])))
        found = [raw('<div class="regkit-predict">'), question]
        if "guess" in self.options:
            guesses = [self.inline(text.strip()) for text in self.options["guess"].split("|")]
            items = (nodes.list_item("", nodes.paragraph("", "", *text)) for text in guesses)
            found.append(nodes.bullet_list("", *items))
        if self.content:
            answer = nodes.Element()
            self.state.nested_parse(self.content, self.content_offset, answer)
            found += [raw("<details><summary>Look</summary>"), *answer, raw("</details>")]
        return [*found, raw("</div>")]

    def inline(self, text: str) -> list[nodes.Node]:
        found, messages = self.state.inline_text(text, self.lineno)
        return [*found, *messages]


def _add_files(app, config):
    config.html_static_path.append(str(FOLDER / "static"))


def setup(app):
    app.add_directive("quiz", QuizOfChapter)
    app.add_directive("predict", Predict)
    app.connect("config-inited", _add_files)
    app.add_css_file("quiz.css")
    app.add_js_file("quiz.js", defer="defer")
    return {"parallel_read_safe": True, "parallel_write_safe": True}
