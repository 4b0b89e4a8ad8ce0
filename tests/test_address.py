"""The project's public address: which place says it first, and what is none."""

import subprocess

import pytest
from address import Address, found

SETTINGS = "[tool.regkit]\nrepository = '{}'\nref = 'main'\n"
OURS = {"REGKIT_REPOSITORY": "https://github.com/ada/mine"}
WORKFLOW = {"GITHUB_REPOSITORY": "bob/fork", "GITHUB_REF_NAME": "v1.2"}
REMOTE = "https://github.com/cy/clone.git"
TYPED = "https://example.org/dee/typed"


def project(folder, repository="", remote=None):
    (folder / "pyproject.toml").write_text(SETTINGS.format(repository), encoding="utf-8")
    if remote is not None:
        subprocess.run(["git", "init", "-q", folder], check=True)
        subprocess.run(["git", "-C", folder, "remote", "add", "origin", remote], check=True)
    return folder


@pytest.mark.parametrize(
    ("environment", "remote", "repository", "expected"),
    [
        (OURS | WORKFLOW, REMOTE, TYPED, ("https://github.com/ada/mine", "main")),
        (WORKFLOW, REMOTE, TYPED, ("https://github.com/bob/fork", "v1.2")),
        ({}, REMOTE, TYPED, ("https://github.com/cy/clone", "main")),
        ({}, "https://git.example.org/cy/clone", TYPED, (TYPED, "main")),
        ({}, None, TYPED, (TYPED, "main")),
        ({}, None, "", None),
        ({"REGKIT_REPOSITORY": "", "GITHUB_REPOSITORY": ""}, None, "", None),
    ],
)
def test_the_first_place_that_says_something_counts(
    environment, remote, repository, expected, tmp_path
):
    address = found(project(tmp_path, repository, remote), environment)
    assert address == (expected and Address(*expected))


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"REGKIT_REPOSITORY": "https://github.com/a/b@v2"}, ("https://github.com/a/b", "v2")),
        ({"REGKIT_REPOSITORY": "https://github.com/a/b.git/"}, ("https://github.com/a/b", "main")),
        ({"GITHUB_REPOSITORY": "a/b"}, ("https://github.com/a/b", "main")),
        (
            {"GITHUB_REPOSITORY": "a/b", "GITHUB_SERVER_URL": "https://git.example.org:8443"},
            ("https://git.example.org:8443/a/b", "main"),
        ),
        # a pull request: GITHUB_REF_NAME is no branch that anybody could install from
        (
            {"GITHUB_REPOSITORY": "a/b", "GITHUB_REF_NAME": "12/merge", "GITHUB_BASE_REF": "dev"},
            ("https://github.com/a/b", "dev"),
        ),
    ],
)
def test_what_the_variables_say(environment, expected, tmp_path):
    assert found(project(tmp_path), environment) == Address(*expected)


@pytest.mark.parametrize(
    "remote",
    [
        "https://github.com/a/b",
        "https://github.com/a/b.git",
        "https://someone:secret@github.com/a/b.git",
        "git@github.com:a/b.git",
        "github.com:a/b.git",
        "ssh://git@github.com/a/b.git",
        "ssh://git@github.com:22/a/b",
        "git://github.com/a/b.git",
    ],
)
def test_a_remote_on_github_in_any_form_is_one_address_without_a_secret(remote, tmp_path):
    assert found(project(tmp_path, remote=remote), {}) == Address("https://github.com/a/b", "main")


@pytest.mark.parametrize(
    "remote", ["../elsewhere", "/srv/git/regkit.git", "git@gitlab.com:github.com/a/b.git"]
)
def test_a_remote_elsewhere_is_none(remote, tmp_path):
    assert found(project(tmp_path, remote=remote), {}) is None


def test_a_repository_above_the_folder_is_not_asked(tmp_path):
    project(tmp_path, remote=REMOTE)
    (tmp_path / "unpacked").mkdir()
    assert found(project(tmp_path / "unpacked"), {}) is None


def test_a_workflow_that_installs_the_package_is_not_its_home(tmp_path):
    checkout, package = tmp_path / "checkout", tmp_path / "package"
    checkout.mkdir(), package.mkdir()
    workflow = WORKFLOW | {"GITHUB_WORKSPACE": str(checkout)}
    assert found(project(checkout), workflow) == Address("https://github.com/bob/fork", "v1.2")
    assert found(project(package), workflow) is None


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"REGKIT_REPOSITORY": "a/b"}, "REGKIT_REPOSITORY is 'a/b', expected such as https://"),
        ({"REGKIT_REPOSITORY": "https://github.com/a"}, "REGKIT_REPOSITORY is"),
        ({"REGKIT_REPOSITORY": "https://github.com/a/b/tree/main"}, "REGKIT_REPOSITORY is"),
        ({"REGKIT_REPOSITORY": "git@github.com:a/b.git"}, "REGKIT_REPOSITORY is"),
        ({"REGKIT_REPOSITORY": 'https://github.com/a/b"'}, "REGKIT_REPOSITORY is"),
        ({"REGKIT_REPOSITORY": "https://github.com/a/b@--x y"}, "the branch or tag '--x y'"),
        ({"GITHUB_REPOSITORY": "b"}, "GITHUB_REPOSITORY is 'https://github.com/b'"),
    ],
)
def test_what_is_no_address_is_one_sentence(environment, sentence, tmp_path):
    with pytest.raises(ValueError) as caught:
        found(project(tmp_path), environment)
    assert sentence in str(caught.value)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_a_typed_address_that_is_none_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="repository in pyproject.toml is 'regkit', expected"):
        found(project(tmp_path, "regkit"), {})


def test_pip_and_colab_can_use_it():
    assert Address("https://github.com/a/b", "v1").pip == "git+https://github.com/a/b@v1"
    assert Address("https://github.com/a/b", "v1").on_github
    assert not Address("https://git.example.org/a/b", "v1").on_github
