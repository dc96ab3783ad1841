"""`ef-horovod list`: tables of what the registry knows, and the page that is made of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

import ef_horovod as ef
from ef_horovod.cli import listing
from ef_horovod.cli import main as cli
from ef_horovod.compressors.identity import Identity
from ef_horovod.compressors.registry import COMPRESSORS, register_compressor
from ef_horovod.exchange.gather import Gather
from ef_horovod.exchange.registry import EXCHANGES, register_exchange
from ef_horovod.methods.error_feedback import ErrorFeedback
from ef_horovod.methods.registry import METHODS, register_method

PAGE = Path(__file__).parents[2] / "docs" / "compressors.md"
RENEW = "renew it: python -m ef_horovod list --markdown > docs/compressors.md"


def listed(words, capsys):
    assert cli.main(["list", *words]) == 0
    return capsys.readouterr().out


def row(text, start):
    """The cells of the table row that begins so."""
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in line.strip("|").split(" |")]


def test_the_page_is_up_to_date(capsys):
    assert PAGE.read_text() == listed(["--markdown"], capsys), RENEW


def test_every_class_and_example_has_a_row(capsys):
    text = listed(["--markdown"], capsys)
    for kind in (*COMPRESSORS.values(), *METHODS.values()):
        assert len(row(text, f"{kind.__name__} ")) in (3, 4)
    for kind in COMPRESSORS.values():
        for example in kind.examples():
            assert row(text, f"{example!r} ")
    assert all(f"\n| {name} " in text for name in EXCHANGES)


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        ("TopK(ratio=0.01)", ["50,723", "1/78.9", "0.01", "-", "no", "no", "gather"]),
        ("Identity()", ["4,000,016", "1/1.0", "1", "0", "yes", "yes", "dense"]),
        ("HardThreshold(threshold=1.0)", ["at least 20", "-", "-", "-", "no", "no", "gather"]),
        ("Cast(dtype='float16')", ["2,000,020", "1/2.0", "1 - 5e-07", "-", "no", "no", "gather"]),
        ("EF21Plus(", ["50,723", "4,000,000", "1 + 1", "n + 1", "gather"]),
        ("EF21(TopK(ratio=0.01), mom", ["50,723", "4,000,000", "2 + 1", "1 + 1", "gather"]),
        (
            "EF21(TopK(ratio=0.01), part",
            ["50,723 or less", "4,000,000", "1 + 0", "1 + 1", "gather"],
        ),
        (
            "EF21(TopK(ratio=0.01), server_compressor",
            ["50,723", "50,723", "2 + 0", "2 + 1", "gather"],
        ),
    ],
)
def test_rows_by_hand(start, expected, capsys):
    assert row(listed(["--markdown"], capsys), start)[1:] == expected


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        ("gather", ["all", "all", "no", "no", "152,169", "3,195,549"]),  # 3 and 63 of 50,723
        (
            "reduce",
            [
                "Identity, RandomBlock, RandomK, RandomSparsify",
                *("all but EF21Plus", "yes", "no", "60,000", "78,750"),
            ],
        ),
        ("dense", ["Identity", "NoFeedback", "yes", "no", "6,000,000", "7,875,000"]),
        ("server", ["all", "all", "no", "yes", "50,723", "50,723"]),
    ],
)
def test_exchanges_by_hand(start, expected, capsys):
    table = listed(["exchanges", "--markdown"], capsys).split("## ")[1]
    found = row(table, f"{start} ")
    assert [*found[1:5], *found[6:]] == expected


def test_an_exchange_of_others_is_listed(own_classes, capsys):
    @register_exchange
    class OneBitOnly(Gather):
        """Signs alone."""

        name = "signs"

        def require_fit(self, method):
            if not isinstance(method.compressor, ef.OneBit):
                raise ef.UnsupportedError("no")

    @register_exchange
    class Nothing(OneBitOnly):
        name = "nothing"

        def require_fit(self, method):
            raise ef.UnsupportedError("no")

    numbers, words = listed(["exchanges", "--markdown"], capsys).split("## ")[1:]
    sent = ef.OneBit().nbytes(10**6)
    assert row(numbers, "signs ")[1] == "OneBit, OneBitBlocks"
    assert row(numbers, "signs ")[6:] == [f"{3 * sent:,}", f"{63 * sent:,}"]
    assert row(numbers, "nothing ")[1:] == ["-", "-", "no", "no", "-", "-", "-"]
    assert row(words, "signs ")[1:] == ["Signs alone."]
    assert row(words, "nothing ")[1:] == ["-"]


def test_steps_of_another_size_are_shown():
    method = ef.PerturbedCompressedSGD(ef.TopK(k=3), noise=0.1, reset_every=7)
    assert listing._method_row(method, 1000)[1] == f"{ef.TopK(k=3).nbytes(1000)} or 4,016"
    assert listing._method_row(ef.ErrorFeedback(ef.HardThreshold(1.0)), 1000)[1] == "at least 20"


def test_one_kind_and_another_length(capsys):
    text = listed(["compressors", "--elements", "800"], capsys)
    assert "for 800 elements" in text
    assert "Methods" not in text
    assert "Exchanges" not in text
    onebit = next(line for line in text.splitlines() if line.startswith("OneBit() "))
    assert onebit.split()[1] == str(16 + 4 + 100)
    text += listed(["exchanges"], capsys)
    assert max(map(len, text.splitlines())) <= 170


def test_classes_of_others_are_listed_with_nothing_but_what_they_say(own_classes, capsys):
    @register_compressor(203)
    @dataclass(frozen=True)
    class Bare(Identity):
        pass

    @register_method
    @dataclass(frozen=True)
    class Choosy(ErrorFeedback):
        """Takes
        half | of it.

        References:
            Nobody: Nowhere
            (2026).
        """

        @classmethod
        def examples(cls, compressor):
            return (cls(compressor),) if isinstance(compressor, Bare) else ()

    text = listed(["--markdown"], capsys)
    assert row(text, "Bare() ")[1] == "4,000,016"
    assert row(text, "Bare ")[1:] == ["-", "-", "-"]
    assert row(text, "Choosy(Bare()) ")[1] == "4,000,016"
    assert row(text, "Choosy ")[1:] == ["Takes half \\| of it.", "Nobody: Nowhere (2026)."]


def test_a_module_that_is_not_there_is_one_line(capsys):
    assert cli.main(["list", "--import", "no_such_package"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("ef-horovod: error: got no module 'no_such_package'")
    assert error.count("\n") == 1
