"""What pyproject.toml cannot say: the package's links, which depend on `[tool.regkit]` there."""

import tomllib
from pathlib import Path

from setuptools import setup

project = tomllib.loads((Path(__file__).parent / "pyproject.toml").read_text(encoding="utf-8"))
repository = project["tool"]["regkit"]["repository"].rstrip("/").removesuffix(".git")

links = {
    "Source": repository,
    "Issues": f"{repository}/issues",
    "Changes": f"{repository}/blob/{project['tool']['regkit']['ref']}/CHANGELOG.md",
}
setup(project_urls=links if repository else {})
