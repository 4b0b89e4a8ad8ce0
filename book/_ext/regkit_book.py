"""The book's own Sphinx extension.

It does two things:

* it keeps the built pages free of requests to other hosts, so that the book opens from a disk with
  the network off;
* it reads where the project is public, `repository` and `ref` of `[tool.regkit]` in
  pyproject.toml, and shows the repository and Colab buttons only where that is set.
"""

import re
import tomllib
from pathlib import Path

# matplotlib's to_jshtml() writes this link into the stored output; the theme ships the same icons.
FONT_AWESOME_CDN = re.compile(r"<link[^>]+maxcdn\.bootstrapcdn\.com[^>]*>\s*")


def without_remote_styles(html: str) -> str:
    """The page body without links to style sheets on other hosts."""
    return FONT_AWESOME_CDN.sub("", html)


def project_settings(root: Path) -> dict[str, str]:
    """The table `[tool.regkit]` of pyproject.toml in folder `root`; empty where there is none."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    return project.get("tool", {}).get("regkit", {})


def theme_options(repository: str = "", ref: str = "main", **_) -> dict:
    """Theme options that show the repository at branch or tag `ref`; "" hides it."""
    if not repository:
        return {"repository_url": "", "use_repository_button": False, "launch_buttons": {}}
    return {
        "repository_url": repository.rstrip("/"),
        "repository_branch": ref,
        "path_to_docs": "",
        "use_repository_button": True,
        "use_issues_button": True,
        "launch_buttons": {"colab_url": "https://colab.research.google.com"},
    }


def _configure(app, config):
    settings = project_settings(Path(app.srcdir))
    config.html_theme_options.update(theme_options(**settings))
    if settings.get("repository"):
        app.tags.add("public")  # {only} public: text that needs the public repository
    # Jupyter Book always loads sphinx-thebe, which names a CDN in a script of every page.
    for listeners in app.events.listeners.values():
        for listener in list(listeners):
            if listener.handler.__module__.startswith("sphinx_thebe"):
                app.disconnect(listener.id)
    app.registry.css_files = [f for f in app.registry.css_files if f[0] != "sphinx-thebe.css"]


def _clean_page(app, pagename, templatename, context, doctree):
    if "body" in context:
        context["body"] = without_remote_styles(context["body"])


def setup(app):
    app.connect("config-inited", _configure)
    app.connect("html-page-context", _clean_page, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
