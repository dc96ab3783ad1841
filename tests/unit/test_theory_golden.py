"""The EF21 paper's smoothness constants and steps on its four data sets, to the printed digits.

The data are not part of the repository. They are looked for in the folder that EF_HOROVOD_DATA
names and, without it, in ../shared/data beside the repository: libsvm/phishing.txt.gz and so on.
Data sets that are not found are not collected, so there is nothing to skip, and a warning in
pytest's summary says so; an EF_HOROVOD_DATA without any of them is an error.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest

from ef_horovod import theory

# N, d, L, L_QM, L_AM, L_var, gamma_QM, gamma_AM, xi for 20 workers, Top-1 and lambda = 0.1,
# computed before from the same files by other code.
GOLDEN = {
    "phishing": "11055 68 0.362551 0.366085 0.366076 6.96e-06 2.016116e-02 2.016168e-02 134.4981",
    "mushrooms": "8124 112 2.786214 3.493226 3.471120 1.54e-01 1.282010e-03 1.290145e-03 222.4989",
    "a9a": "32561 123 1.771920 1.773067 1.773041 9.14e-05 2.297345e-03 2.297379e-03 244.4990",
    "w8a": "49749 300 0.861199 1.016118 0.988206 5.59e-02 1.642016e-03 1.688327e-03 598.4996",
}
NAMED = os.environ.get("EF_HOROVOD_DATA")
FOLDER = Path(NAMED or Path(__file__).parents[3] / "shared" / "data") / "libsvm"
FILES = {name: FOLDER / f"{name}.txt.gz" for name in GOLDEN}
FOUND = [name for name, file in FILES.items() if file.is_file()]
if NAMED and not FOUND:
    raise FileNotFoundError(
        f"EF_HOROVOD_DATA={NAMED} has none of libsvm/{{{','.join(GOLDEN)}}}.txt.gz, expected at "
        "least one; unset it to leave these tests out"
    )
if len(FOUND) < len(GOLDEN):
    warnings.warn(
        f"{FOLDER} lacks {sorted(set(GOLDEN) - set(FOUND))}, so the golden numbers of these data "
        "sets are not tested; set EF_HOROVOD_DATA",
        stacklevel=1,
    )


class TestGolden:
    __test__ = bool(FOUND)  # pytest would report a test without parameters as skipped

    @pytest.mark.parametrize("name", FOUND)
    def test_constants_and_steps(self, name):
        features, labels = theory.load_libsvm(FILES[name])
        problem = theory.Problem(theory.contiguous_shards(features, labels, 20))
        c, alpha = problem.smoothness(), 1 / features.shape[1]
        qm, am = theory.ef21_step(c, alpha), theory.ef21_am_step(c, alpha)
        row = f"{len(labels)} {features.shape[1]} {c.L:.6f} {c.L_QM:.6f} {c.L_AM:.6f} "
        row += f"{c.L_var:.2e} {qm:.6e} {am:.6e} {theory.xi(alpha):.4f}"
        assert row == GOLDEN[name]
        assert set(labels) == {-1.0, 1.0}
