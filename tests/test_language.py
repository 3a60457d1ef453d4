"""The search for patterns of bad prose (language.py) finds planted sentences and leaves good ones alone."""

import pytest

from tests.language import Exemption, find, python_prose, read_exemptions, read_patterns


def found_in(tmp_path, text, name="README.md", exemptions=()):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(text)
    return list(find(tmp_path, read_patterns(), exemptions))


@pytest.mark.parametrize(
    "sentence",
    [
        "That a file is no config is said at once.",
        "There is no CUDA device.",
        "There were no images in it.",
        "A name that there is not.",
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
        "What is done is not done again.",
        "Read it. What the file holds is checked.",
        "It has no gradient.",
        "The offsets follow. That is the order.",
        "Those of empty masks are empty.",
        "One that was interrupted starts again.",
        "The published code and ours.",
        "Install the package and what it needs.",
        "The file and what else is missing.",
        "Only what is missing is added.",
        "A non-finite loss.",
        "The header claims a size.",
        "An error in the claimed size.",
        "There are two ways to train.",
        "The only way to read it.",
        "The norm is compared with a plain one.",
        "As in a plain loop.",
        "Without kept memory.",
        "The result is kept for the next call.",
        "The request keeps its place.",
        "The places of the objects.",
        "The file is written whole.",
        "The last whole line.",
        "The file beside it.",
        "Nothing beside the weights.",
        "The host waits at each copy.",
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
    [
        "The device is no longer read.",
        "The log tells which file.",
        "Set to_be and num_pictures.",
        "## What each key does",
        "| key | what it does |",
        "The paper claims a speed.",
        "The pages work in the same way.",
        "A plain text file in plain text.",
        "A tensor is changed in place, the name in place of the path.",
        "The whole image and a whole batch.",
        "The times beside 2 processes, and beside other programs.",
        "A prediction above the threshold is kept.",
        "One of the options.",
        "A number that is finite.",
    ],
)
def test_good_sentences_pass(tmp_path, sentence):
    assert not found_in(tmp_path, sentence)


@pytest.mark.parametrize(
    "name",
    [
        *("train_net.py", "demo/demo.py", "examples/a.py", "examples/cpp/a.cpp", "examples/cpp/CMakeLists.txt"),
        *("examples/README.md", "configs/lazy/a.py", "configs/quick/a.yaml", "sparseinst/tools/a.py", "Makefile"),
        *(f"sparseinst/serving/page/a.{ending}" for ending in ("html", "js", "css")),
    ],
)
def test_every_kind_of_file_is_searched(tmp_path, name):
    assert found_in(tmp_path, "# The result is there sooner.\n", name) == [f"{name}:1: sooner"]


@pytest.mark.parametrize("sign", ["//", " *"])
def test_a_sentence_is_found_across_lines_of_other_comments(tmp_path, sign):
    assert found_in(tmp_path, f"{sign} The value is\n{sign} to be set.\n", "examples/a.cpp")


@pytest.mark.parametrize(
    "code",
    [
        'raise ValueError("the value is " "to be set")',
        'raise ValueError(\n    f"the {value} is "\n    f"to be set"\n)',
        'def f():\n    """Return what\n    it is."""',
        "x = 1  # sooner",
        "x = r'sooner'",
    ],
)
def test_comments_and_strings_of_python_are_searched(tmp_path, code):
    assert len(found_in(tmp_path, f"{code}\n", "sparseinst/a.py")) == 1


def test_names_in_python_code_are_not_searched(tmp_path):
    code = 'pictures = what.they.are\nprint(f"the {sooner + 1} of {pictures[0]}", sooner, "a", alike)  # good\n'
    assert not found_in(tmp_path, code, "sparseinst/a.py")


def test_the_prose_of_python_code_stays_where_it_was():
    source = 'x = f(1, """a\nb""")  # c\ny = "d" \'e\'\n'
    assert python_prose(source).replace("\0", "~") == "~ ~ ~~~~    a\nb   ~  # c\n~ ~  d   e \n"


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
