"""YAML 1.2 and JSON as they are read here: what a scalar is, what is refused, and that no bytes do anything else."""

import json
import time
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from service.core.errors import DocumentInvalid
from service.intake import documents, notation
from service.intake.notation import MAX_DEPTH, MAX_NODES, NotationError, read_json, read_yaml

pytestmark = pytest.mark.unit

MIB = 2**20


def _read(text: str | bytes) -> Any:
    return read_yaml(text.encode() if isinstance(text, str) else text, max_bytes=2 * MIB)


@pytest.mark.parametrize(
    ("scalar", "value"),
    [
        ("yes", "yes"), ("no", "no"), ("on", "on"), ("off", "off"), ("y", "y"), ("Yes", "Yes"),
        ("true", True), ("True", True), ("FALSE", False), ("tRUE", "tRUE"),
        ("null", None), ("~", None), ("Null", None), ("", None), ("nil", "nil"),
        ("0", 0), ("-12", -12), ("+12", 12), ("0o17", 15), ("0xfF", 255), ("-0xff", "-0xff"),
        ("1_000", "1_000"), ("0b11", "0b11"), ("1:30", "1:30"), ("12:30:45", "12:30:45"),
        ("1.5", 1.5), ("-.5", -0.5), ("1e3", 1000.0), ("1.", 1.0), ("1.2.3", "1.2.3"), ("1e", "1e"),
        ("2026-01-01", "2026-01-01"), ("2026-01-01T00:00:00Z", "2026-01-01T00:00:00Z"),
        ("20s", "20s"), ("256MiB", "256MiB"), ("<<", "<<"), ("=", "="), (".", "."), ("-", "-"), ("+", "+"),
        ("'1'", "1"), ('"true"', "true"), ("'~'", "~"), ('"\\u00e9"', "é"), ("'0644'", "0644"),
        ("|\n  a\n  b\n", "a\nb\n"), (">\n  a\n  b\n", "a b\n"),
    ],
)  # fmt: skip
def test_a_scalar_is_what_the_core_schema_of_yaml_1_2_says(scalar: str, value: Any) -> None:
    found = _read(f"- {scalar}" if scalar not in ("-",) else '["-"]')[0]
    assert found == value
    assert type(found) is type(value)


REFUSED = {
    "an alias": ("a: &x 1\nb: *x", "anchors"),
    "an alias to nothing": ("a: *x", "aliases"),
    "an anchor that nobody uses": ("a: &x 1", "anchors"),
    "a tag": ("a: !!str 1", "tags"),
    "a tag that runs code": ("a: !!python/object/apply:os.system [id]", "tags"),
    "a non-specific tag": ("a: ! 1", "tags"),
    "a tag directive": ("%TAG ! tag:x,2000:\n---\na: 1", "directives"),
    "another version of YAML": ("%YAML 1.1\n---\na: 1", "directives"),
    "two documents": ("a: 1\n---\nb: 1", "second one"),
    "a duplicate key": ("a: 1\nb: 2\na: 3", "twice"),
    "a duplicate key in JSON": ('{"a": 1, "a": 2}', "twice"),
    "a duplicate key deep in JSON": ('{"a": [{"b": 1, "b": 1}]}', "twice"),
    "a key that is a number": ("1: a", "key should be text"),
    "a key that is a list": ("? [a]\n: b", "key should be text"),
    "a key that is null": ("~: a", "key should be text"),
    "infinity": ("a: .inf", "finite"),
    "no number": ("a: -.Inf", "finite"),
    "not a number": ("a: .nan", "finite"),
    "NaN in JSON": ('{"a": NaN}', "finite"),
    "Infinity in JSON": ('{"a": -Infinity}', "finite"),
    "a float too large": ("a: 1e999", "finite"),
    "a float too large in JSON": ('{"a": 1e999}', "finite"),
    "a number of many digits": ("a: " + "9" * 65, "64 digits"),
    "a number of many digits in JSON": ('{"a": ' + "9" * 5000 + "}", "64 digits"),
    "a hexadecimal of many digits": ("a: 0x" + "f" * 5000, "64 digits"),
    "an octal of YAML 1.1": ("a: 0644", "0o"),
    "a lone surrogate in JSON": ('{"a": "\\ud800"}', "surrogates"),
    "a lone surrogate as a key": ('{"\\ud800": 1}', "surrogates"),
    "a control character": ("a: \x01", "character 3"),
    "a tab as indentation": ("a:\n\tb: 1", "line 2"),
    "what is not closed": ("{a: 1\n", "line 2"),
    "too deep": ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "levels deep"),
    "too deep for a stack": ("[" * 15000 + "]" * 15000, "levels deep"),
    "too deep in YAML": ("- " * (MAX_DEPTH + 1) + "a", "levels deep"),
    "too many values": ("[" + "1," * MAX_NODES + "1]", f"at most {MAX_NODES}"),
    "too many values in YAML": ("- 1\n" * (MAX_NODES + 1), f"at most {MAX_NODES}"),
    "too many bytes": ("#" * (2 * MIB + 1), "at most 2097152 bytes"),
}


@pytest.mark.parametrize(("text", "says"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_says_why(text: str, says: str) -> None:
    with pytest.raises(NotationError) as refused:
        _read(text)
    assert says in refused.value.message


def test_what_is_not_utf8_is_refused() -> None:
    for data in (b"\xff\xfea\0:\0 \x001\0", b"a: \x80", "a: é".encode("latin-1"), b"a: \xed\xa0\x80"):
        with pytest.raises(NotationError, match="UTF-8"):
            _read(data)
    assert _read(b"\xef\xbb\xbfa: 1") == {"a": 1}


def test_the_place_of_what_is_refused_is_told() -> None:
    for text, place in {
        "a:\n  b:\n  - 1\n  - c: .inf": ("a", "b", 1, "c"),
        "a: [1, &x 2]": ("a", 1),
        "a: {b: 1}\nc: 0644": ("c",),
        "a:\n- b: [x]\n- *y": ("a", 1),
    }.items():
        with pytest.raises(NotationError) as refused:
            _read(text)
        assert refused.value.place == place, text


def test_the_bounds_are_the_most_that_is_accepted() -> None:
    assert _read("[" * MAX_DEPTH + "]" * MAX_DEPTH) is not None
    assert _read("- " * MAX_DEPTH + "a") is not None
    assert len(_read("- 1\n" * (MAX_NODES - 2))) == MAX_NODES - 2
    assert _read("a: " + "9" * 64) == {"a": int("9" * 64)}


def test_json_is_read_as_json_with_its_escapes() -> None:
    assert _read('\n {"a": "\\ud83d\\ude00\\/", "b":\t[1, 2.5, true, null]}') == {"a": "😀/", "b": [1, 2.5, True, None]}
    assert _read("{a: 1, b: [x, y]}") == {"a": 1, "b": ["x", "y"]}, "and YAML's own flow style as YAML"


def _values(text: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    numbers = st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False)
    return st.recursive(
        st.none() | st.booleans() | numbers | text,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
        max_leaves=20,
    )


@settings(deadline=None)
@given(value=_values(st.text()).filter(lambda v: isinstance(v, dict | list)))
def test_what_json_writes_is_read_back(value: Any) -> None:
    for ascii_only in (True, False):
        assert _read(json.dumps(value, ensure_ascii=ascii_only)) == value


@settings(deadline=None)
@given(value=_values(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x85\u2028\u2029"))))
def test_what_a_yaml_writer_writes_is_read_back_or_refused_for_being_yaml_1_1(value: Any) -> None:
    """Without the three characters that end a line in YAML 1.1 and not in 1.2."""
    said = ""
    try:
        found = _read(yaml.safe_dump(value, allow_unicode=True))
    except NotationError as refused:
        found, said = value, refused.message
    assert found == value
    assert not said or any(word in said for word in ("anchors", "tags", "key should be text")), said


BAD = st.one_of(
    st.binary(max_size=300),
    st.text(max_size=300).map(lambda t: t.encode("utf-8", "surrogatepass")),
    st.lists(
        st.sampled_from(
            [*"{}[]:,-?|>'\"#%@\n ~a1\\\t\x85", "&a", "*a", "!t", "steps", "name", ".inf", "---", "...", "<<", "0x"]
        ),
        max_size=60,
    ).map(lambda parts: "".join(parts).encode()),
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(data=BAD)
@example(data=b"\x00")
@example(data=b"{" * 100_000)
@example(data=b"[" * 100_000 + b"]" * 100_000)
@example(data=b'{"a":' * 100_000)
@example(data=b"? " * 100_000)
@example(data=b"- " * 100_000)
@example(data=b"a: " * 1000)
@example(data=b"\xef\xbb\xbf")
@example(data=b"{\xc2\x85")
def test_whatever_the_bytes_are_the_documents_raise_nothing_but_document_invalid(data: bytes) -> None:
    for parse in (documents.parse_scenario, documents.parse_controls, documents.parse_metadata):
        rows = [{"path": "", "message": "accepted"}]
        try:
            parse(data)
        except DocumentInvalid as refused:
            rows = refused.errors
        assert rows
        for row in rows:
            assert set(row) == {"path", "message"}
            assert row["message"].isprintable()
            assert row["path"].isprintable()
            assert len(row["message"]) <= 400


SLOW = {
    "brackets": b"[" * MIB,
    "braces": b"{a: " * (MIB // 4),
    "quotes": b"{" + b'"' * MIB,
    "escapes": b'{"a": "' + b'\\"' * (MIB // 2),
    "colons": b":" * MIB,
    "newlines": b"\n" * MIB,
    "one long text": b"name: " + b"x" * MIB,
    "folded lines": b"name: >\n" + b" x\n" * (MIB // 3),
    "anchors": b"- &a x\n" * (MIB // 7),
    "comments": b"# x\n" * (MIB // 4),
    "keys": b"".join(b"k%d: 1\n" % n for n in range(MIB // 12)),
}


@pytest.mark.parametrize("data", SLOW.values(), ids=SLOW)
def test_a_mebibyte_of_anything_is_judged_in_a_moment(data: bytes) -> None:
    started = time.thread_time()
    with pytest.raises(DocumentInvalid):
        documents.parse_scenario(data)
    assert time.thread_time() - started < 2.0


def test_metadata_is_json_and_nothing_else() -> None:
    assert read_json(b'{"a": "b"}', max_bytes=100) == {"a": "b"}
    with pytest.raises(NotationError, match="should be JSON"):
        read_json(b"a: b", max_bytes=100)


def test_the_readers_answers_do_not_depend_on_libyaml(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where PyYAML was built without it, its own scanner is used."""
    monkeypatch.setattr(notation, "_LOADER", yaml.SafeLoader)
    assert _read("a: [yes, 0o17, 1.5, ~]\nb: |\n  text\n") == {"a": ["yes", 15, 1.5, None], "b": "text\n"}
    for text, says in REFUSED.values():
        if len(text) < 1000 and "character" not in says and "line" not in says:
            with pytest.raises(NotationError) as refused:
                _read(text)
            assert says in refused.value.message
