"""YAML 1.2, and refusals of untrusted files."""

import random
from itertools import pairwise

import pytest
import yaml

from curvlab import yaml_file
from curvlab.errors import CurvlabError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("017", 17),
        ("0o17", 15),
        ("0x1F", 31),
        ("+1", 1),
        ("-9223372036854775808", -(2**63)),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("0b1", "0b1"),
        ("1e-3", 0.001),
        ("1.5E+2", 150.0),
        ("-.5", -0.5),
        ("5.", 5.0),
        (".inf", float("inf")),
        ("-.Inf", float("-inf")),
        ("e5", "e5"),
        (".", "."),
        ("no", "no"),
        ("On", "On"),
        ("y", "y"),
        ("TRUE", True),
        ("false", False),
        ("~", None),
        ("Null", None),
        ("", None),
        ("=", "="),
        ("2020-13-45", "2020-13-45"),
        ("'1'", "1"),
        ("! 1", "1"),
        ("!!str 1", "1"),
        ("!!int '5'", 5),
        ("!!float 1", 1.0),
        ("!!map {}", {}),
        ('"\\ud83d\\ude00"', "😀"),  # as in JSON
        ("\ufeff1", 1),
        ("%YAML 1.2\n--- no", "no"),
        ("[" * 99 + "]" * 99, None),
        ("[&a {x: 1}, *a, {<<: *a, y: 2}, {y: 1, <<: [*a, {x: 3, z: 4}]}, {x: 5, <<: *a}]", None),
    ],
)
def test_supported_yaml(text, value):
    if text.startswith("[&a"):
        value = [{"x": 1}, {"x": 1}, {"x": 1, "y": 2}, {"x": 1, "z": 4, "y": 1}, {"x": 5}]
    elif text.startswith("[["):
        value = []
        for _ in range(98):
            value = [value]
    found = yaml_file.loads(text)
    assert (found, type(found)) == (value, type(value))


ANCHORS = "abcdefghijklmnopqrstu"
# a is in each of the nine items of b, b in those of c, and so on: 9^20 values.
BOMB = "a: &a [1, 1]\n" + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in pairwise(ANCHORS))
MERGING_BOMB = BOMB.replace("[1, 1]", "{x: 1}").replace("[", "{<<: [").replace("]", "]}")


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("[" * 100_000, "more than 100 levels, line 1"),
        ("{a: " * 1000, "more than 100 levels, line 1"),
        ("- " * 1000, "more than 100 levels, line 1"),
        ("? " * 1000, "more than 100 levels, line 1"),
        (BOMB, "it has more than 1,000,000 values, repetitions by aliases included, line 7"),
        (
            BOMB.replace("[", "{<<: [").replace("]", "]}").replace("{<<: [1, 1]}", "{x: 1}"),
            "more than 1,000,000 values",
        ),
        ("&a [*a]", "the anchor 'a' contains itself, line 1"),
        ("x: &a\n  b: *a", "the anchor 'a' contains itself, line 2"),
        ("*a", "no anchor 'a' before this alias, line 1"),
        ("!!bool abc", "'abc' is not a valid 'bool' of YAML 1.2, line 1"),
        ("!!int 1.5", "'1.5' is not a valid 'int'"),
        ("!!null x", "'x' is not a valid 'null'"),
        ("!!timestamp 2020-01-01", "is not a valid 'timestamp'"),
        ("!!python/object/apply:os.system [ls]", "the tag 'python/object/apply:os.system' is not supported"),
        ("!!set {a}", "the tag 'set' is not supported"),
        ("9" * 400, "is an integer of more than 64 bits, line 1"),
        ("0x" + "f" * 16, "is an integer of more than 64 bits"),
        ("9" * 9000, "is an integer of more than 64 bits"),
        ("1e999", "'1e999' is too large for a number of 64 bits"),
        ("9" * 400 + ".5", "too large for a number"),
        ('a: "\\ud800"', "a lone surrogate"),
        ('"\\udc00\\ud800": 1', "a lone surrogate"),
        ('"\\UFFFFFFFF"', "an escape sequence or a directive is invalid"),
        ('"\\U00110000"', "an escape sequence or a directive is invalid"),
        ("%YAML 1." + "9" * 5000 + "\n--- 1", "a directive is invalid"),
        ("%YAML 1.1\n--- no", "it is declared as YAML 1.1, and only 1.2 is supported"),
        ("--- 1\n--- 2", "a second document; give one, line 2"),
        ("a: 1\nb: 2\na: 3", "the key 'a' occurs twice, line 3"),
        ('{a: 1, "a": 1}', "the key 'a' occurs twice"),
        ("[{1: 2}]", "the key 1 is not a string; write it in quotes"),
        ("? [a]\n: 1", "is not a string"),
        ("<<: 1", "<< needs a mapping"),
        ("a: \x00", "special characters are not allowed"),
        ("{a: b", "expected ',' or '}'"),
    ],
)
def test_refused_yaml(text, fragment):
    with pytest.raises(CurvlabError) as refusal:
        yaml_file.loads(text)
    assert fragment in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_files(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_bytes(b"\xff")
    with pytest.raises(CurvlabError, match=r"x.yaml is not YAML: .*utf-8"):
        yaml_file.read(file)
    file.write_bytes(b" " * (4 << 20) + b"1")
    with pytest.raises(CurvlabError, match=r"x.yaml is larger than 4 MB"):
        yaml_file.read(file)
    for name, reason in (("no", "No such file"), (".", "Is a directory"), ("\0", "null"), ("x" * 999, "too long")):
        with pytest.raises(CurvlabError, match=f"cannot read .*{reason}"):
            yaml_file.read(tmp_path / name)


def test_written_yaml_is_the_same_value_in_both_versions():
    words = [
        "no",
        "1e3",
        "017",
        "0o17",
        "1:30",
        "",
        "null",
        "2020-01-01",
        "a\nb",
        "½",
        "x: y",
        "1_000",
        "=",
        "<<",
        "😀",
    ]
    value = {word: word for word in words} | {
        "numbers": [1e-5, 1e300, 0.1, 5, True, None, float("inf")],
        "x": [words, words],
    }
    text = yaml_file.dumps(value)
    assert yaml_file.loads(text) == value
    assert yaml.safe_load(text) == value


def test_random_changes_are_read_or_refused():
    texts = (
        'f: m:f\nb: &b {a: 1, b: "x\\u00e9"}\np: [{<<: *b, a: 2}, {<<: *b}]\n',
        'g:\n  a: [1e-3, ~]\n  "b": |\n    t\n  ? k\n  : >-\n    folded\n',
        '{"a": [1, 2, {"b": null}], "c": "\\ud83d\\ude00"}',
        "%YAML 1.2\n--- !!map\na: !!str 1\n...\n",
    )
    letters = "[]{}:,&*!|>%@`\"'#?-~<=\n\t \\ud8x01e.\x00\x85\ufeff\U0001f600"
    rng, read = random.Random(0), 0
    for _ in range(600):
        text = list(rng.choice(texts))
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(text) + 1)
            text[place : place + rng.randint(0, 2)] = rng.choice(letters)
        try:
            yaml_file.loads("".join(text))
            read += 1  # any other error fails the test
        except CurvlabError:
            continue
    assert 20 < read < 580
