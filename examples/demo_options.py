"""The demos' options; it needs the standard library only, so that `launch/demo --help` is quick."""

from __future__ import annotations

import argparse
from pathlib import Path

METHODS = (
    "dense",
    "fp16",
    "updates",
    "updates-signs",
    "onebit",
    "topk",
    "topk-momentum",
    "topk-ef",
    "topk-stock",
    "topk-ef-stock",
)  # the keys of demo_methods.ROWS
DEFAULT_METHODS = ("dense", "fp16", "updates", "updates-signs", "onebit", "topk-ef")
_PASSED_ON = ("data", "methods", "seeds", "epochs", "lr", "out")

DATA_HELP = """\
a folder with cifar10_train.npz and cifar10_test.npz (default: the 1797 images of handwritten
digits that come with scikit-learn). Get CIFAR-10 from https://www.cs.toronto.edu/~kriz/cifar.html
or as images from any mirror, and save each part by
numpy.savez(file, jpeg=..., offset=..., label=...): `jpeg` uint8, all images as JPEG or PNG files
one after the other; `offset` int64[n + 1], where each starts; `label` uint8[n]"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of all demos."""
    add = parser.add_argument
    add("--data", type=Path, metavar="DIR", help=DATA_HELP)
    add(
        "--methods", nargs="+", choices=METHODS, default=DEFAULT_METHODS, metavar="METHOD",
        help=f"of {', '.join(METHODS)} ({' '.join(DEFAULT_METHODS)})",
    )  # fmt: skip
    add("--seeds", type=_count, default=3, help="runs of each method (%(default)s)")
    add("--epochs", type=_count, default=40, help="(%(default)s)")
    add("--lr", type=float, default=0.03, help="highest learning rate (%(default)s)")
    add("--out", type=Path, default=Path("demo-results"), metavar="DIR", help="(%(default)s)")
    add("--quick", action="store_true", help="1 seed, 2 epochs: does it run?")


def as_words(arguments: argparse.Namespace) -> list[str]:
    """The options as a command line again."""
    words = ["--quick"] if arguments.quick else []
    for name in _PASSED_ON:
        value = getattr(arguments, name)
        if value is not None:
            values = value if isinstance(value, (list, tuple)) else [value]
            words += [f"--{name}", *map(str, values)]
    return words


def _count(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected an integer of 1 or more")
    return number
