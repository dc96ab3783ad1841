"""`ef-horovod report` of training logs: the table's numbers, the pages, and what is refused."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys

import pytest
from reports import hide_matplotlib, run

from ef_horovod.training.log_file import FORMAT, LogFile


def write(path, *, steps=40, sent=1000, loss=lambda step: 4 / step):
    """A log of two ranks, with a line every second step: 10 ms and 2 ms of compression a step."""
    file = LogFile(path)
    file.append(
        {
            "format": FORMAT, "version": 1, "start": 0, "method": "ErrorFeedback(TopK(0.01))",
            "exchanges": ["gather"], "rank": 0, "ranks": 2, "parameters": 2000,
            "versions": {"numpy": "2.0"},
        }
    )  # fmt: skip
    for step in range(2, steps + 1, 2):
        file.append(
            {
                "step": step, "loss": loss(step), "seconds": 0.010 * step, "skipped": 1,
                "bytes_out": sent * step, "bytes_in": 2 * sent * step,
                "dense_bytes_out": 8000 * step, "seconds_compress": 0.0015 * step,
                "seconds_wait": 0.003 * step, "seconds_decompress": 0.0005 * step,
                "error_norm": 6.0, "gradient_norm": 2.0,
                "layers": {"0.weight": [6.0, 1.5], "<out>": [1, 1], "1.bias": [0.0, 1.32]},
            }
        )  # fmt: skip
    return path


def cells(text, name):
    line = next(line for line in text.splitlines() if line.split()[:1] == [name])
    return line.split(maxsplit=14)


def test_the_table_has_the_numbers_of_the_logs(tmp_path, capsys):
    logs = [write(tmp_path / "topk.jsonl"), write(tmp_path / "bits.jsonl", steps=20, sent=250)]
    status, out, _ = run(capsys, *logs, "-o", tmp_path / "page.html")
    assert status == 0
    # The loss is the median of steps 22 to 40; (8000 - 1000) bytes in 2 ms are 28 Mbit/s.
    loss = f"{(4 / 30 + 4 / 32) / 2:.4g}"
    assert cells(out, "topk") == [
        "topk", "2", "40", "1", loss, "0.04", "0.08", "1/8.0", "0.4", "10.0", "0.06", "0.12",
        "0.02", "3", "28 Mbit/s",
    ]  # fmt: skip
    assert cells(out, "bits")[2:8] == ["20", "1", f"{(4 / 10 + 4 / 12) / 2:.4g}", "0.01", "0.01",
                                       "1/32.0"]  # fmt: skip


def test_the_page_has_plots_names_and_layers(tmp_path, capsys):
    logs = [write(tmp_path / "topk.jsonl"), write(tmp_path / "a&b.jsonl")]
    page = tmp_path / "new" / "page.html"
    assert run(capsys, *logs, "--out", page)[0] == 0
    text = page.read_text()
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    assert len(images) == 4
    assert all(base64.b64decode(image).startswith(b"\x89PNG") for image in images)
    assert len(set(images)) == 4
    about = "ErrorFeedback(TopK(0.01)), 2 ranks, exchanges: gather, 2,000 parameters"
    shown = ["<h2>topk</h2>", "<h2>a&amp;b</h2>", "0.weight", "&lt;out&gt;", "28 Mbit/s", about]
    for part in shown:
        assert part in text, part
    assert "<out>" not in text
    assert "1.bias" not in text, "it is not compressed"


def test_markdown_and_images_in_a_folder(tmp_path, capsys):
    log, folder = write(tmp_path / "topk.jsonl"), tmp_path / "report"
    status, out, _ = run(capsys, log, "--markdown", folder)
    assert status == 0
    assert "report.md" in out
    text = (folder / "report.md").read_text()
    for image in re.findall(r"!\[.*\]\((.*)\)", text):
        assert (folder / image).read_bytes().startswith(b"\x89PNG")
    assert len(list(folder.glob("*.png"))) == 4
    assert "| topk " in text
    assert "## topk" in text
    assert not (tmp_path / "topk.html").exists()


def test_the_page_is_beside_the_first_log_and_has_paths_of_equal_names(tmp_path, capsys):
    logs = [write(tmp_path / name / "log.jsonl") for name in ("a", "b")]
    status, out, _ = run(capsys, *logs)
    assert status == 0
    assert str(logs[0].with_suffix(".html")) in out
    page = logs[0].with_suffix(".html").read_text()
    assert f"<h2>{logs[0]}</h2>" in page
    assert f"<h2>{logs[1]}</h2>" in page


def test_a_training_without_losses_or_norms_is_shown(tmp_path, capsys):
    log = write(tmp_path / "log", loss=lambda _: None)
    text = log.read_text().replace('"error_norm": 6.0, "gradient_norm": 2.0', '"error_norm": null')
    log.write_text(re.sub(r', "layers": \{[^}]*\}', "", text))
    status, out, _ = run(capsys, log)
    assert status == 0
    assert cells(out, "log")[4] == cells(out, "log")[13] == "-"


def test_a_line_that_was_cut_off_is_told(tmp_path, capsys):
    log = write(tmp_path / "log")
    log.write_text(log.read_text()[:-10])
    status, out, _ = run(capsys, log)
    assert (status, cells(out, "log")[2]) == (0, "38")
    assert f"{log}: the last line was cut off" in out


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("log", "other"), "other, line 1 is no JSON .*, expected a line of a training log"),
        (("other", "log"), "other, line 1 is no JSON .*, expected a line of a training log"),
        (("log", "missing"), "could not read .*missing .*, expected a training log; name"),
        (("other", "other"), "other is no training log, expected LOGs of ef.TrainingLog; pass"),
        (("other", "--markdown", "x"), "other is no training log, expected"),
        (("log", "log"), "got .*log twice, expected each log once; leave one out"),
        (("log", "-o", "x.png"), "got .*x.png as page, expected a name that ends in .html"),
        (("log.html",), "got .*log.html as page, expected a name .* not that of a log; name"),
        (("log", "-o", "log/x.html"), "could not write .*x.html .*, expected a place"),
    ],
)
def test_wrong_files_are_refused_by_name(tmp_path, capsys, monkeypatch, words, problem):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "log")
    write(tmp_path / "log.html")
    before = (tmp_path / "log.html").read_bytes()
    (tmp_path / "other").write_text("round 1\n")
    status, _, err = run(capsys, *words)
    assert (status, err.count("\n")) == (1, 1)
    assert re.search(problem, err)
    assert (tmp_path / "log.html").read_bytes() == before


@pytest.mark.parametrize(
    ("number", "change", "problem"),
    [
        (1, {"versions": None}, "line 1 has None as 'versions', expected texts"),
        (1, {"exchanges": [1]}, r"line 1 has \[1\] as 'exchanges', expected texts"),
        (2, {"layers": [1]}, r"line 2 has \[1\] as 'layers', expected two norms for each"),
        (2, {"layers": {"a": None}}, "line 2 has None as 'layers', expected two norms"),
        (2, {"layers": {"a": ["x", "y"]}}, "as 'layers', expected two norms"),
        (2, {"layers": {"a": [1, 2, 3]}}, "as 'layers', expected two norms"),
        (2, {"step": 10**400}, "line 2 has 1000.* as 'step', expected a number"),
    ],
)
def test_damaged_lines_are_refused_by_name(tmp_path, capsys, number, change, problem):
    log = write(tmp_path / "log")
    lines = log.read_text().splitlines()
    lines[number - 1] = json.dumps(json.loads(lines[number - 1]) | change)
    log.write_text("\n".join(lines) + "\n")
    status, _, err = run(capsys, log)
    assert (status, err.count("\n")) == (1, 1)
    assert re.search(problem, err)


def test_losses_near_the_largest_number_are_left_out_of_plots(tmp_path, capsys):
    log = write(tmp_path / "log")
    lines = log.read_text().splitlines()
    lines[1] = json.dumps(json.loads(lines[1]) | {"loss": 1e308})
    lines[2] = json.dumps(json.loads(lines[2]) | {"loss": -1e308})
    log.write_text("\n".join(lines) + "\n")
    status, _, err = run(capsys, log)
    assert (status, err) == (0, "")


def test_without_matplotlib_the_table_is_printed(tmp_path, capsys, monkeypatch):
    log = write(tmp_path / "log")
    hide_matplotlib(monkeypatch)
    status, out, err = run(capsys, log)
    assert status == 1
    assert "28 Mbit/s" in out
    assert "pip install matplotlib" in err


def test_help_loads_nothing_heavy():
    code = (
        "import sys\nfrom ef_horovod.cli import main\n"
        "try: main.main(['report', '--help'])\nexcept SystemExit: pass\n"
        "print({'matplotlib', 'torch', 'tensorflow', 'tabulate'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
    assert "--markdown DIR" in done.stdout


def test_a_newer_log_is_refused(tmp_path, capsys):
    log = write(tmp_path / "log")
    header = json.loads(log.read_text().splitlines()[0])
    log.write_text(json.dumps(header | {"version": 9}) + "\n")
    status, _, err = run(capsys, log)
    assert status == 1
    assert "version 9 of a training log, expected 1" in err
