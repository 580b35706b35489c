"""Reading YAML: what is not a plain, small, unambiguous mapping is refused with its place."""

from pathlib import Path

import pytest

from muai_config import ConfigError
from muai_config.document import MAX_BYTES, MAX_VALUES, parse_document, read_document


def refusal(content: bytes) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_document(content, "a.yaml")
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1, 2\nb: 3", "a.yaml:2:2: this is not valid YAML: "),
        (b"a:\n\t- b", "a.yaml:2:1: this is not valid YAML: "),
        (b"a: 1\n---\nb: 2", "a.yaml:2:1: this is not valid YAML: "),
        (b"a: b\x01", "a.yaml:1:5: this is not valid YAML: a character is not allowed"),
        (b"\xff", "a.yaml: is not UTF-8 text (byte 0 is not)"),
        (b"- 1", "a.yaml: the file must hold sections"),
        (b"5", "a.yaml: the file must hold sections"),
        (b"? [a]\n: 1", "a.yaml:1:3: a key must be a single word or text"),
        (b"~: 1", "a.yaml:1:1: a key must be a single word or text"),
        (b"a: &a {b: *a}", "a.yaml:1:4: an alias stands inside what it names"),
        (
            b"a: !!python/object/apply:os.system [ls]",
            "a.yaml:1:4: the tag python/object/apply:os.system is not allowed",
        ),
        (b"a: !mine b", "a.yaml:1:4: the tag !mine is not allowed"),
        (b"a: !!int b", "a.yaml:1:4: 'b' is not a value of its type"),
        (b"a: " + b"9" * 9000, "a.yaml:1:4: '999"),
        (b"<<: 5", "a.yaml:1:5: << takes a section"),
        (b"[" * 100_000, "a.yaml:1:33: is nested too deeply (allowed: 32 levels)"),
        (b"x" * (MAX_BYTES + 1), "a.yaml: is too large (allowed: at most 1,048,576 bytes)"),
    ],
)
def test_Given_a_file_that_is_not_ours_to_read_Then_place_and_reason_are_named(content: bytes, message: str) -> None:
    said = refusal(content)
    assert said.startswith(message)
    assert len(said.splitlines()) == 1


def test_Given_aliases_to_aliases_When_they_would_fill_the_memory_Then_they_are_refused() -> None:
    rows = [b"a: &a [1,1,1,1,1,1,1,1,1,1]"]
    rows += [b"%c: &%c [%s]" % (98 + i, 98 + i, b",".join([b"*%c" % (97 + i)] * 10)) for i in range(12)]
    assert "too many values" in refusal(b"\n".join(rows))


def test_Given_masses_of_values_Then_they_are_refused() -> None:
    assert "too many values" in refusal(b"a: [" + b"1," * (2 * MAX_VALUES + 1) + b"]")


def test_Given_keys_that_stand_twice_Then_each_is_a_problem_with_both_lines() -> None:
    problems = parse_document(b"a: 1\nb: {c: 1, c: 2}\na: 3", "f.yaml").problems
    assert [str(problem) for problem in problems] == [
        "b.c: stands twice (allowed: once; the first is in line 2) [from f.yaml:2]",
        "a: stands twice (allowed: once; the first is in line 1) [from f.yaml:3]",
    ]


def test_Given_scalars_with_traps_in_older_YAML_Then_they_are_what_they_look_like() -> None:
    content = b"{a: 1e-3, b: 010, c: 12:30, d: on, e: 2024-01-01, f: +5, g: '5', h: 1_000, i: 0x10, j: , k: ~, l: No}"
    assert parse_document(content, "a.yaml").values == {
        "a": 0.001,
        "b": "010",
        "c": "12:30",
        "d": True,
        "e": "2024-01-01",
        "f": 5,
        "g": "5",
        "h": "1_000",
        "i": "0x10",
        "j": None,
        "k": None,
        "l": False,
    }


def test_Given_anchors_and_merges_Then_they_work_and_the_own_key_wins() -> None:
    content = b"a: &a {x: 1, y: 1}\nb: &b {y: 2, z: 2}\nc: {<<: [*a, *b], z: 3}\nd: *a"
    values = parse_document(content, "a.yaml").values
    assert values["c"] == {"x": 1, "y": 1, "z": 3}
    assert values["d"] == {"x": 1, "y": 1}


@pytest.mark.parametrize("content", [b"", b"# nothing", b"---\n", b"null", b"\xef\xbb\xbf{}"])
def test_Given_a_file_without_keys_Then_it_holds_nothing(content: bytes) -> None:
    assert parse_document(content, "a.yaml").values == {}


def test_Given_keys_that_look_like_values_Then_they_stay_names() -> None:
    assert parse_document(b"on: 1\n8000: 2", "a.yaml").values == {"on": 1, "8000": 2}


def test_Given_a_path_that_cannot_be_read_Then_the_reason_is_named(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "no.yaml", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(ConfigError, match=reason):
            read_document(path)
