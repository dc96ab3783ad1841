"""The LIBSVM problems of the EF21 papers."""

from __future__ import annotations

from pathlib import Path

from ef_horovod import theory
from experiments.errors import DataNotFound, reading

SETS = ("phishing", "mushrooms", "a9a", "w8a")
WHERE = "https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets/binary.html"


def load_problem(data: Path, name: str, workers: int, **objective: object) -> theory.Problem:
    """Logistic regression over contiguous shards; by default with the nonconvex regulariser.

    Args:
        data: folder with libsvm/NAME.txt.gz, or NAME.txt.gz, or the plain text.
        name: one of SETS.
        workers: number of shards.
        objective: of `theory.Problem`.

    Raises:
        DataNotFound: no such file; says where to get it.
        Refused: the file cannot be read.
    """
    for folder in (data / "libsvm", data):
        for ending in (".txt.gz", ".txt", ""):
            path = folder / f"{name}{ending}"
            if path.is_file():
                with reading(path, WHERE):
                    features, labels = theory.load_libsvm(path)
                return theory.Problem(
                    theory.contiguous_shards(features, labels, workers), **objective
                )
    raise DataNotFound(
        f"found no {name}.txt.gz in {data} or {data / 'libsvm'}, expected the LIBSVM set; get it "
        f"from {WHERE} and pass its folder as --data"
    )
