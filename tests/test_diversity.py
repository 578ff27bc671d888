"""Leading verb and object against parses made by hand."""

from collections import Counter

import pytest

from refine_af.diversity import verb_object, verb_object_counts


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("Write a short story about a cat.", ("write", "story")),
        ("Please write a short story.", ("write", "story")),
        ("Could you please explain the rules of chess?", ("explain", "rule")),
        ("I'd like you to list three reasons to sleep.", ("list", "reason")),
        ("Let\N{RIGHT SINGLE QUOTATION MARK}s plan a trip to Rome.", ("plan", "trip")),
        ("Your task is to identify the main topic of this text.", ("identify", "topic")),
        ("Come up with a list of names.", ("come", "list")),
        ("Find cities that lie on a river.", ("find", "city")),
        ("Compose a paragraph describing a storm.", ("compose", "paragraph")),
        ("Rewrite the following sentence, keeping its meaning.", ("rewrite", "sentence")),
        ("Make a one-sentence summary of the news.", ("make", "summary")),
        ("Describe human's behavior.", ("describe", "behavior")),
        ("Improve the student's answer.", ("improve", "answer")),
        ('Use the word "joy" in a line.', ("use", "word")),
        ('Translate "good morning" into French.', ("translate", "morning")),
    ],
)
def test_commands(instruction: str, expected: tuple[str, str]) -> None:
    assert verb_object(instruction) == expected


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("Given a list of numbers, find the largest prime.", ("find", "prime")),
        ("You are given two sentences. Decide whether they agree.", ("decide", "agree")),
        ("In this task, you need to compare the two words.", ("compare", "word")),
        ("My sister has a new job. Write a card for her.", ("write", "card")),
        ("For each city, name the country.", ("name", "country")),
    ],
)
def test_clauses_that_set_the_scene_are_passed_over(
    instruction: str, expected: tuple[str, str]
) -> None:
    assert verb_object(instruction) == expected


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("What is the capital of France?", ("what", "capital")),
        ("How many apples are left?", ("how", "apple")),
        ("In which year did the war end?", ("which", "year")),
        ("If it rains, what should I wear?", ("what", "wear")),
        ("Is the review positive?", ("is", "positive")),
    ],
)
def test_question_word_stands_for_the_verb(instruction: str, expected: tuple[str, str]) -> None:
    assert verb_object(instruction) == expected


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("", ("", "")),
        ("42 + 1 = ?", ("", "")),
        ("Summarize.", ("summarize", "")),
        ("Explain how to do it.", ("explain", "")),
        ("I am sad.", ("", "")),  # a scene and nothing behind it
        ("The following sentence has an error", ("", "")),
        ("Just wait.", ("wait", "")),
        ("These words rhyme with 'cat'", ("", "")),
    ],
)
def test_parts_that_are_not_there(instruction: str, expected: tuple[str, str]) -> None:
    assert verb_object(instruction) == expected


@pytest.mark.parametrize(
    ("plural", "singular"),
    [
        ("stories", "story"),
        ("pies", "pie"),
        ("boxes", "box"),
        ("classes", "class"),
        ("sentences", "sentence"),
        ("movies", "movie"),
        ("analysis", "analysis"),
        ("class", "class"),
        ("bus", "bus"),
        ("series", "series"),
    ],
)
def test_objects_are_singular(plural: str, singular: str) -> None:
    assert verb_object(f"Describe the {plural}.") == ("describe", singular)


def test_counts_leave_out_instructions_without_a_verb() -> None:
    instructions = ["Write a story.", "Please write two stories about rain.", "Name a city.", "?"]
    instructions.append("A city that I like")
    assert verb_object_counts(instructions) == Counter({("write", "story"): 2, ("name", "city"): 1})
