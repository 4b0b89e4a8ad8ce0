"""Where the project is public: what buttons, links and the notebooks' setup cell point at.

Nobody types it twice. The first of these that says something counts:

1. the environment variable REGKIT_REPOSITORY: `https://github.com/NAME/REPOSITORY`, with the branch
   or tag behind an `@` if it is another than `ref` below;
2. GITHUB_REPOSITORY (`NAME/REPOSITORY`), GITHUB_SERVER_URL and the branch or tag in
   GITHUB_REF_NAME, which GitHub sets in its workflows, for the checkout of that workflow. A pull
   request has no branch that stays: there it is the one that it goes to, GITHUB_BASE_REF;
3. the remote `origin` of git, where it is on GitHub;
4. `repository` and `ref` of `[tool.regkit]` in pyproject.toml.
"""

import os
import re
import subprocess
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

COLAB_BRANCH = "colab"  # that the workflow which publishes the book fills with notebooks
EXPECTED = "expected such as https://github.com/NAME/REPOSITORY"


@dataclass(frozen=True)
class Address:
    """A public repository, and the branch or tag of it that readers get.

    Attributes:
        repository: such as "https://github.com/NAME/REPOSITORY".
        ref: such as "main".
    """

    repository: str
    ref: str

    @property
    def pip(self) -> str:
        """What pip installs: behind "regkit-course[notebook] @ "."""
        return f"git+{self.repository}@{self.ref}"

    @property
    def on_github(self) -> bool:
        """Whether Colab can open notebooks from there."""
        return urlsplit(self.repository).hostname == "github.com"


def found(root: Path, environment: Mapping[str, str] = os.environ) -> Address | None:
    """The address of the project in folder `root`; None where nothing says it.

    Args:
        root: the folder of pyproject.toml.
        environment: the variables to look into.

    Raises:
        ValueError: what is found is no address of a repository.
    """
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    settings = project.get("tool", {}).get("regkit", {})
    ref = settings.get("ref", "main")
    if named := environment.get("REGKIT_REPOSITORY"):
        repository, _, other = named.partition("@")
        return _checked("REGKIT_REPOSITORY", repository, other or ref)
    if (named := environment.get("GITHUB_REPOSITORY")) and _of_this_workflow(root, environment):
        server = environment.get("GITHUB_SERVER_URL") or "https://github.com"
        branch = environment.get("GITHUB_BASE_REF") or environment.get("GITHUB_REF_NAME") or ref
        return _checked("GITHUB_REPOSITORY", f"{server}/{named}", branch)
    if remote := _remote(root):
        return _checked("the git remote origin", remote, ref)
    if named := settings.get("repository"):
        return _checked("repository in pyproject.toml", named, ref)
    return None


def _checked(name: str, repository: str, ref: str) -> Address:
    """The address, if it is one: these words end in a command and in the code of a cell."""
    repository = repository.rstrip("/").removesuffix(".git")
    if not re.fullmatch(r"https://[\w.-]+(:\d+)?/[\w.-]+/[\w.-]+", repository):
        raise ValueError(f"{name} is {repository!r}, {EXPECTED}.")
    if not re.fullmatch(r"\w[\w./+-]*", ref):
        raise ValueError(f"{name} has the branch or tag {ref!r}, expected such as 'main'.")
    return Address(repository, ref)


def _of_this_workflow(root: Path, environment: Mapping[str, str]) -> bool:
    """Whether `root` is what a workflow has checked out, and not a package that it installs."""
    workspace = environment.get("GITHUB_WORKSPACE")
    return workspace is None or root.resolve().is_relative_to(Path(workspace).resolve())


def _remote(root: Path) -> str | None:
    """The remote `origin`, as an https address without a user's name or token, if on GitHub."""
    if not (root / ".git").exists():  # a folder above may be a repository of something else
        return None
    command = ["git", "-C", str(root), "remote", "get-url", "origin"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git here, or no such remote
        return None
    parts = urlsplit(re.sub(r"^([\w.-]+@)?([\w.-]+):(?!//)", r"ssh://\2/", text))
    return f"https://github.com{parts.path}" if parts.hostname == "github.com" else None
