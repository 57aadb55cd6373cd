"""Specs: what parses to what, and an error for all else that is a sentence with the value in it."""

import re

import pytest
import torch
from battery import EXAMPLES
from hypothesis import given
from hypothesis import strategies as st

import commpress
from commpress.comm.codecs import FAMILIES, WORDS, Codec, parse
from commpress.comm.codecs.cast import BFloat16, Float16, Identity
from commpress.comm.codecs.float8 import Float8
from commpress.comm.codecs.integer import Int4, Int8
from commpress.comm.codecs.powersgd import PowerSGD
from commpress.comm.codecs.random_k import RandomK
from commpress.comm.codecs.rotate import Rotate
from commpress.comm.codecs.sign import Sign
from commpress.comm.codecs.topk import TopK
from commpress.comm.codecs.two_bit import Int2


@pytest.mark.parametrize(
    ("spec", "codec"),
    [
        ("none", Identity()),
        ("bf16", BFloat16()),
        ("fp16", Float16()),
        ("fp8", Float8("e4m3")),
        ("fp8(e5m2)", Float8("e5m2")),
        ("int8", Int8()),
        ("int8(stochastic)", Int8(stochastic=True)),
        ("topk(0.1)|int4( stochastic )", TopK(0.1, Int4(stochastic=True))),
        ("int4", Int4()),
        ("int2", Int2()),
        ("sign", Sign()),
        ("topk(0.01)", TopK(0.01)),
        ("topk(1)", TopK(1.0)),
        ("topk(1e-3)", TopK(0.001)),
        ("topk(.5)", TopK(0.5)),
        ("topk(0.01)|int4", TopK(0.01, Int4())),
        ("topk(0.01)|none", TopK(0.01)),
        (" topk( 0.01 ) | int4 ", TopK(0.01, Int4())),
        ("randomk(0.01)", RandomK(0.01)),
        ("randomk(0.1)|int4", RandomK(0.1, Int4())),
        (" rotate | int4", Rotate(Int4())),
        (" powersgd( 4 ) ", PowerSGD(4)),
        ("topk(0.1)|rotate|sign", TopK(0.1, Rotate(Sign()))),
    ],
)
def test_a_spec_names_its_codec(spec: str, codec: Codec) -> None:
    assert parse(spec) == codec


@pytest.mark.parametrize(
    ("spec", "canonical"),
    [
        ("topk(0.010)", "topk(0.01)"),
        ("topk(1.0)", "topk(1)"),
        ("topk(1e-2)", "topk(0.01)"),
        ("topk(0.00001)", "topk(1e-05)"),
        ("topk(0.1)|none", "topk(0.1)"),
        ("  topk( 0.01 )|  sign", "topk(0.01)|sign"),
        ("topk(0.30000000000000004)", "topk(0.30000000000000004)"),
        ("topk(0.3333333)", "topk(0.3333333)"),
        ("randomk(1e-1)|none", "randomk(0.1)"),
        (" int4 ", "int4"),
        ("fp8( e4m3 )", "fp8"),
        ("topk(0.1)|fp8(e5m2)", "topk(0.1)|fp8(e5m2)"),
    ],
)
def test_the_canonical_form(spec: str, canonical: str) -> None:
    assert str(parse(spec)) == canonical
    assert parse(canonical) == parse(spec)


@EXAMPLES
@given(
    st.sampled_from((TopK, RandomK)),
    st.floats(0, 1, exclude_min=True),
    st.sampled_from(sorted(word for word, family in WORDS.items() if family.flat and not family.outer)),
)
def test_every_ratio_round_trips(family: type[TopK] | type[RandomK], ratio: float, word: str) -> None:
    codec = family(ratio, parse(word))
    assert parse(str(codec)) == codec
    assert str(parse(str(codec))) == str(codec)


def test_codecs_of_other_settings_differ() -> None:
    codecs = {parse(s) for s in ("int4", "int8", "topk(0.1)", "topk(0.01)", "topk(0.1)|int4", "topk(0.1)|int8")}
    assert len(codecs) == 6


def test_every_family_has_a_word_of_its_own() -> None:
    assert len(WORDS) == len(FAMILIES)
    assert all(WORDS[family.word] is family for family in FAMILIES)


def test_parse_is_public() -> None:
    assert commpress.parse is parse


@pytest.mark.parametrize("spec", ["itn4", "topp(0.1)", "int16", "onebit", "topk(0.1)|itn4"])
def test_an_unknown_word_is_told_the_known_ones(spec: str) -> None:
    word = re.split(r"[(|]", spec.removeprefix("topk(0.1)|"))[0]
    with pytest.raises(ValueError, match=f"unknown codec '{word}', known: {', '.join(WORDS)}"):
        parse(spec)


@pytest.mark.parametrize("family", [TopK, RandomK])
@pytest.mark.parametrize("ratio", ["1.5", "0", "-1", "nan", "inf", "-inf", "1.0000001", "1e-400"])
def test_a_share_outside_0_to_1_is_refused_with_its_value(ratio: str, family: type[TopK] | type[RandomK]) -> None:
    value = re.escape(str(float(ratio)))
    with pytest.raises(ValueError, match=rf"{family.word}\({value}\): the kept share must be in \(0, 1\], got {value}"):
        parse(f"{family.word}({ratio})")
    with pytest.raises(ValueError, match=rf"the kept share must be in \(0, 1\], got {value}"):
        family(float(ratio))


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("topk", "spec 'topk': topk takes the kept share, as in topk(0.01), got ()"),
        ("topk()", "spec 'topk()': topk takes the kept share, as in topk(0.01), got ()"),
        ("topk(x)", "spec 'topk(x)': topk takes the kept share, as in topk(0.01), got (x)"),
        ("topk(0.1, 2)", "spec 'topk(0.1, 2)': topk takes the kept share, as in topk(0.01), got (0.1, 2)"),
        ("powersgd", "spec 'powersgd': powersgd takes a rank, as in powersgd(4), got ()"),
        ("powersgd(-1)", "spec 'powersgd(-1)': powersgd takes a rank, as in powersgd(4), got (-1)"),
        (
            "topk(0.1)|powersgd(4)",
            "powersgd(4) codes matrices, and the values of topk are not matrices; expected int4 or sign",
        ),
        (
            "rotate|powersgd(4)",
            "powersgd(4) codes matrices, and the values of rotate are not matrices; expected int4 or sign",
        ),
        ("randomk", "spec 'randomk': randomk takes the kept share, as in randomk(0.01), got ()"),
        ("randomk(x)", "spec 'randomk(x)': randomk takes the kept share, as in randomk(0.01), got (x)"),
        ("randomk(0.1)|topk(0.1)", "randomk(0.1)|topk(0.1): the values of randomk(...) cannot be sparsified again"),
        ("topk(0.1)|randomk(0.1)", "topk(0.1)|randomk(0.1): the values of topk(...) cannot be sparsified again"),
        (
            "rotate",
            "spec 'rotate': rotate needs the codec of the rotated values after it, as in rotate|int4, got nothing",
        ),
        ("rotate(2)|int4", "rotate needs the codec of the rotated values after it, as in rotate|int4, got (2)"),
        ("rotate|bf16", "rotate|bf16: expected a codec with scales, such as int4 or sign, got bf16"),
        ("rotate|topk(0.1)", "rotate|topk(0.1): expected a codec with scales, such as int4 or sign, got topk(0.1)"),
        ("rotate|rotate|int4", "expected a codec with scales, such as int4 or sign, got rotate|int4"),
        ("int4(3)", "spec 'int4(3)': int4 takes (stochastic) or no argument, got (3)"),
        ("fp8(e3m4)", "spec 'fp8(e3m4)': the format must be one of e4m3, e5m2, got 'e3m4'"),
        ("int2(3)", "spec 'int2(3)': int2 takes no argument, got (3)"),
        ("sign()", "spec 'sign()': sign takes no argument, got ()"),
        (
            "int4|int8",
            "spec 'int4|int8': only the values of one of topk(...), randomk(...), rotate can be coded in turn",
        ),
        ("topk(0.1)|topk(0.1)", "topk(0.1)|topk(0.1): the values of topk(...) cannot be sparsified again"),
        ("", "spec '': cannot read ''"),
        ("  ", "spec '  ': cannot read '  '"),
        ("INT4", "spec 'INT4': cannot read 'INT4', expected a word such as int4 or topk(0.01)"),
        ("topk(0.1", "cannot read 'topk(0.1'"),
        ("topk 0.1", "cannot read 'topk 0.1'"),
        ("4bit", "cannot read '4bit'"),
        ("|int4", "spec '|int4': cannot read ''"),
        ("topk(0.1)|", "cannot read ''"),
        ("topk(0.1)|int4(3)", "int4 takes (stochastic) or no argument, got (3)"),
        ("topk(0.1)|int4|int8", "one of topk(...), randomk(...), rotate can be coded in turn, not those of int4"),
        ("int4\nint8", "cannot read"),
    ],
)
def test_what_cannot_be_read_is_refused_with_a_sentence(spec: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        parse(spec)


@pytest.mark.parametrize("thing", [5, None, 0.1, b"int4", ["int4"], torch.zeros(1), Int4])
def test_what_is_no_string_is_refused_with_its_type(thing: object) -> None:
    with pytest.raises(TypeError, match=f"a spec is a string such as .*, got {type(thing).__name__}: "):
        parse(thing)  # type: ignore[arg-type]
