from pathlib import Path

import pytest

from sd_atoms.data.prompts import MOST_SEEDS, check_lengths, fill, load_templates, parse_seeds
from sd_atoms.errors import AtomsWarning, UserError

FEW_SHOT = Path(__file__).parents[2] / "prompts" / "few_shot.txt"


def test_the_few_shot_file_holds_the_20_prompts_of_the_experiments():
    templates = load_templates(FEW_SHOT)
    assert len(templates) == len(set(templates)) == 20
    assert templates[0] == "photo of a {}."
    assert templates[13] == "Georgia O'Keeffe style {} painting."
    assert fill(templates[-1], "<castle>") == "Top view of the <castle>."


def test_comments_blank_lines_byte_order_marks_and_windows_line_ends_are_no_part_of_a_template(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeff# {x} may stand here\r\n\r\n  photo of {}  \r\nein Schloß, {}\r\n".encode())
    assert load_templates(path) == ["photo of {}", "ein Schloß, {}"]


@pytest.mark.parametrize("line", ["photo of a castle", "{} and {}", "{x}", "{} by {artist}", "{} {", "} {}", "{{}}"])
def test_a_line_without_exactly_one_place_for_the_concept_is_named_by_its_number(tmp_path, line):
    path = tmp_path / "prompts.txt"
    path.write_text(f"# comment\nphoto of {{}}\n\n{line}\n")
    with pytest.raises(UserError) as error:
        load_templates(path)
    assert str(error.value).startswith(f"{path}, line 4: {line!r}: ")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "no prompts"),
        (b"\n# only a comment\n", "no prompts"),
        ("photo of {}".encode("utf-16"), "not UTF-8"),
        (None, "No such file"),
    ],
)
def test_a_file_without_prompts_is_one_line_that_names_it(tmp_path, content, problem):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_templates(path)
    assert str(error.value).startswith(f"{path}: ")
    assert problem in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_in_place_of_a_file_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        load_templates(tmp_path)


@pytest.mark.parametrize("concept", ["<castle>", "{0}", "{", "a {x} castle", r"\1"])
def test_any_concept_can_be_filled_in(concept):
    assert fill("photo of {}.", concept) == f"photo of {concept}."


@pytest.mark.parametrize(
    ("text", "seeds"),
    [
        ("0-3,7", [0, 1, 2, 3, 7]),
        ("5", [5]),
        (" 9 , 2 - 4 ", [9, 2, 3, 4]),
        ("4-4", [4]),
        (str(2**63 - 1), [2**63 - 1]),
    ],
)
def test_seeds_come_in_the_order_they_are_given(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "neither"),
        ("1,", "neither"),
        ("1,,2", "neither"),
        ("-1", "neither"),
        ("1-", "neither"),
        ("1-2-3", "neither"),
        ("1.5", "neither"),
        ("a", "neither"),
        ("٣", "neither"),
        ("1 2", "neither"),
        ("9" * 5000, "neither"),
        (str(2**63), "too large"),
        ("3-1", "expected 1-3"),
        ("1,1", "1 is given twice"),
        ("0-3,2", "2 is given twice"),
        (f"0-{MOST_SEEDS}", "more than"),
        ("0-999999999999999999", "more than"),
    ],
)
def test_seeds_that_make_no_sense_are_refused(text, problem):
    with pytest.raises(UserError) as error:
        parse_seeds(text)
    assert problem in str(error.value)
    assert str(error.value).startswith("seeds ")


def test_a_cut_prompt_is_a_warning_and_a_cut_placeholder_an_error(pipe):
    pipe.tokenizer.add_tokens(["<castle>"])
    with pytest.warns(AtomsWarning, match="of 77 that are read: lost from 'by a lake' on"):
        check_lengths(pipe.tokenizer, ["<castle> " + "a " * 74 + "by a lake", "a <castle>"])
    with pytest.raises(UserError, match="prompt 'a a .* lost from '<castle>' on, and <castle> with it"):
        check_lengths(pipe.tokenizer, ["a " * 75 + "<castle>"])
