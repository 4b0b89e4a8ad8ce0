"""What pyproject.toml cannot say: the package's links, which depend on where it is public."""

import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "book" / "tools"))
from address import found  # noqa: E402 (the source distribution holds it, the wheel does not)

links = {}
if address := found(ROOT):
    links = {
        "Source": address.repository,
        "Issues": f"{address.repository}/issues",
        "Changes": f"{address.repository}/blob/{address.ref}/CHANGELOG.md",
    }
setup(project_urls=links)
