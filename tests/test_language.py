"""The search for patterns of bad prose (language.py) finds planted sentences and leaves good ones alone."""

import pytest

from tests.language import Exemption, find, read_exemptions, read_patterns


def found_in(tmp_path, text, name="README.md", exemptions=()):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
    return list(find(tmp_path, read_patterns(), exemptions))


@pytest.mark.parametrize(
    "sentence",
    [
        "That a file is no config is said at once.",
        "Two files, of which one is read.",
        "A value, for which there is a key.",
        "The log tells of it.",
        "The table says of each.",
        "What a file is is told by its content.",
        "The norm is to be set.",
        "The result is there sooner.",
        "The masks look alike.",
        "Whoever doubts it runs the command.",
        "The names are those of the paper.",
        "A loss that is not finite.",
        "The picture is read.",
        "One of the Pictures.",
    ],
)
def test_a_planted_sentence_is_found(tmp_path, sentence):
    (line,) = {line.split(": ")[0] for line in found_in(tmp_path, f"Good.\n{sentence}\n")}
    assert line == "README.md:2"


def test_a_sentence_is_found_across_lines_of_a_comment(tmp_path):
    assert found_in(tmp_path, "x = 1\n    # The value is\n    # to be set.\n", "sparseinst/a.py") == [
        "sparseinst/a.py:2: is # to be"
    ]


@pytest.mark.parametrize(
    "sentence",
    ["There is no CUDA device.", "It is no longer read.", "The log tells which file.", "Set to_be and num_pictures."],
)
def test_good_sentences_pass(tmp_path, sentence):
    assert not found_in(tmp_path, sentence)


def test_an_exemption_holds_for_its_file_and_line(tmp_path):
    exemption = [Exemption("README.md", "A picture book", "a name")]
    assert not found_in(tmp_path, "A picture book\n", exemptions=exemption)
    assert found_in(tmp_path, "A picture\n", exemptions=exemption)
    assert found_in(tmp_path, "A picture book\n", "CONTRIBUTING.md", exemptions=exemption)


def test_every_exemption_has_a_reason(tmp_path):
    read_exemptions()
    (tmp_path / "list.txt").write_text("README.md | picture |\n")
    with pytest.raises(ValueError, match="FILE"):
        read_exemptions(tmp_path / "list.txt")
