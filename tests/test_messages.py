"""Sentences about names."""

from regkit.messages import install, unknown


def test_a_name_that_is_not_known_gets_the_nearest_one():
    error = unknown("method", "vxm_dif", ["vxm", "vxm_diff"])
    assert str(error) == (
        "method is 'vxm_dif', expected one of vxm, vxm_diff; did you mean 'vxm_diff'."
    )


def test_where_there_is_nothing_to_choose_from_the_sentence_says_so():
    error = unknown("contrast", "T9", [])
    assert str(error) == "contrast is 'T9', expected none: there is nothing to choose from."


def test_an_extra_is_installed_from_a_clone():
    assert install("baselines") == 'in a clone of the repository, pip install -e ".[baselines]"'
