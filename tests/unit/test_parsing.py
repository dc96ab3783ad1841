"""Methods and compressors from text, and nothing else from it."""

from __future__ import annotations

import pytest

import ef_horovod as ef
from ef_horovod.methods.parsing import read_compressor, read_method
from ef_horovod.testing.pairs import every_compressor, every_method


@pytest.mark.parametrize("method", every_method(), ids=repr)
def test_what_repr_shows_is_read_back(method):
    assert read_method(repr(method)) == method


@pytest.mark.parametrize("compressor", every_compressor(), ids=repr)
def test_so_it_is_for_compressors(compressor):
    assert read_compressor(repr(compressor)) == compressor


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("DoubleSqueeze(TopK(.01), TopK(.02))", ef.DoubleSqueeze(ef.TopK(0.01), ef.TopK(0.02))),
        ("ef21(topk(k=3), momentum=0.1)", ef.EF21(ef.TopK(k=3), momentum=0.1)),
        ("NoFeedback(Identity)", ef.NoFeedback(ef.Identity())),
        (" EF21( OneBit ) ", ef.EF21(ef.OneBit())),
        (
            "ErrorCompensatedX(OneBit(), alpha=Decay(power=1))",
            ef.ErrorCompensatedX(ef.OneBit(), alpha=ef.Decay(power=1)),
        ),
    ],
)
def test_methods(text, expected):
    assert read_method(text) == expected


def test_short_forms():
    assert read_compressor("topk:0.01") == ef.TopK(0.01)
    assert read_compressor("topk:k=5") == ef.TopK(k=5)
    assert read_compressor("onebit") == ef.OneBit()
    assert read_compressor("onebit:'l2'") == ef.OneBit("l2")
    up, down = ef.TopK(0.01), ef.OneBit()
    assert read_method("doublesqueeze", up, down) == ef.DoubleSqueeze(up, down)
    assert read_method("ef21", up) == ef.EF21(up)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "open('x')",
        "TopK.__class__",
        "(lambda: 1)()",
        "EF21(TopK(0.01) if 1 else OneBit())",
        "EF21(*[1])",
        "EF21(**{'compressor': 1})",
        "EF21(TopK(0.01)",
        "EF21(TopK(0.01), unknown=1)",
        "EF21",
        "TopK(0.01)",
        "",
        "[]",
        "1",
        "(" * 500,
        "\x00",
    ],
)
def test_all_else_is_refused(text):
    with pytest.raises(ValueError, match="expected"):
        read_method(text)


def test_a_method_is_no_compressor():
    with pytest.raises(ValueError, match="expected a compressor"):
        read_compressor("EF21(OneBit())")
    with pytest.raises(ef.UnsupportedError, match="expected a compressor"):
        read_method("EF21(3)")
