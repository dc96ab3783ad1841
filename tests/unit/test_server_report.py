"""`ef-horovod report`: what a server's log says, and what is said of logs that say nothing."""

from __future__ import annotations

import json
import re

import pytest
from reports import hide_matplotlib, run

from ef_horovod.cli.server_report import read_log, summarize
from ef_horovod.server.monitor import ServerMonitor, Totals


def write(log, server=0, every=10.0, rounds=(40, 60), workers=3):
    """A log as a server writes it: worker 1 comes half a second late in each round."""
    now, totals = [0.0], [Totals(0, 0, 0, 0, 0)]
    watch = ServerMonitor(
        lambda: totals[0], 8000, lambda _: None, log, server, every, lambda: now[0]
    )
    for done in rounds:
        for worker in (0, 2, 1)[:workers]:
            now[0] += 0.5 * (worker == 1)
            watch.arrived(worker, 0, complete=worker == 1)
        now[0] += every - 0.5
        totals[0] = Totals(done, 100 * done, 200 * done, 3, 1)
        watch.look()
    watch.close()


def test_table_and_plot_of_a_server(tmp_path, capsys):
    log = tmp_path / "log.jsonl"
    write(log)
    status, out, _ = run(capsys, log)
    assert status == 0
    cells = " ".join(out.splitlines()[2].split())
    assert cells == "0 60 3.00 0.01 1/80.0 0.01 1/40.0 1 (1.0 s) 3 1"
    assert (tmp_path / "log.png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path / "log.png") in out


def test_several_servers_have_a_row_each_and_a_sum(tmp_path, capsys):
    log, image = tmp_path / "log.jsonl", tmp_path / "new" / "image.png"
    write(log, server=1, rounds=(40, 59))
    write(log, server=0)
    status, out, _ = run(capsys, log, "--out", image)
    assert status == 0
    rows = [line.split()[:2] for line in out.splitlines()[2:5]]
    assert rows == [["0", "60"], ["1", "59"], ["all", "59"]]
    assert "1 (2.0 s) 6 2" in " ".join(out.splitlines()[4].split())
    assert image.read_bytes().startswith(b"\x89PNG")


def test_sums_count_each_entrys_rounds(tmp_path):
    log = tmp_path / "log.jsonl"
    write(log, rounds=(10, 60))
    first, second = read_log(log).servers[0]
    second.update(bytes_up=1000.0, ratio_up=1 / 8)
    done = summarize([first, second])
    assert (done.bytes_up, done.bytes_down, done.dense) == (10 * 100 + 50 * 1000, 12000, 60 * 8000)
    assert done.waited == {1: 1.0}


def test_the_last_job_of_a_log_is_shown(tmp_path, capsys):
    log = tmp_path / "log.jsonl"
    write(log, rounds=(40, 60, 80))
    write(log, rounds=(5, 7))
    status, out, _ = run(capsys, log)
    assert (status, out.splitlines()[2].split()[1]) == (0, "7")
    assert "2 jobs" in out


def test_with_a_quorum_nobody_is_waited_for(tmp_path, capsys):
    log = tmp_path / "log.jsonl"
    write(log, workers=2)
    status, out, _ = run(capsys, log)
    assert status == 0
    assert out.splitlines()[2].split()[-3:] == ["-", "3", "1"]


def test_a_last_line_that_was_cut_off_is_left_out(tmp_path, capsys):
    log = tmp_path / "log.jsonl"
    write(log)
    log.write_text(log.read_text()[:-20])
    status, out, _ = run(capsys, log)
    assert (status, out.splitlines()[2].split()[1]) == (0, "40")
    assert "Line 2, the last one, was cut off" in out


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "could not read"),
        ("", "has no entries"),
        ('{"server": 0, "sec', "has no entries"),
        ("round 1\n", "line 1 is no JSON"),
        ("[1]\n", "line 1 has '\\[1\\]', expected an entry"),
        ('{"server": 0}\n', "line 1 has nothing as 'seconds', expected int or float"),
        ('{"server": "a"}\n', "line 1 has 'a' as 'server', expected int"),
        ('{"server": true}\n', "line 1 has True as 'server', expected int"),
    ],
)
def test_logs_that_are_none_are_named_in_one_sentence(text, problem, tmp_path, capsys):
    log = tmp_path / "log.jsonl"
    if text is not None:
        log.write_text(text)
    status, out, err = run(capsys, log)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert str(log) in err
    assert re.search(problem, err)
    assert not (tmp_path / "log.png").exists()


def test_a_damaged_line_in_the_middle_is_an_error(tmp_path, capsys):
    log = tmp_path / "log.jsonl"
    write(log)
    log.write_text(log.read_text().replace("}\n", "\n", 1))
    status, _, err = run(capsys, log)
    assert status == 1
    assert "line 1 is no JSON" in err


def test_seconds_waited_have_to_be_numbers(tmp_path, capsys):
    log = tmp_path / "log.jsonl"
    write(log)
    entry = json.loads(log.read_text().splitlines()[0])
    log.write_text(json.dumps(entry | {"waited": {"one": 1}}) + "\n")
    status, _, err = run(capsys, log)
    assert status == 1
    assert "expected seconds by worker number" in err


def test_the_log_is_not_overwritten_by_its_image(tmp_path, capsys):
    log = tmp_path / "log.png"
    write(log)
    before = log.read_bytes()
    status, _, err = run(capsys, log)
    assert status == 1
    assert "expected two files" in err
    assert log.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("x.xyz", "got .*x.xyz as image, expected a name that ends in one of .*pdf, .*png"),
        ("x", "got .*x as image, expected a name that ends in one of"),
        ("log.jsonl/x.png", "could not write .*x.png .*, expected a place for the image; name"),
        ("folder.png", "could not write .*folder.png .*, expected a place for the image; name"),
    ],
)
def test_images_that_cannot_be_written_are_named_in_one_sentence(name, problem, tmp_path, capsys):
    log = tmp_path / "log.jsonl"
    write(log)
    (tmp_path / "folder.png").mkdir()
    status, out, err = run(capsys, log, "--out", tmp_path / name)
    assert (status, err.count("\n")) == (1, 1)
    assert re.search(problem, err)
    assert "The plot is in" not in out


def test_without_matplotlib_it_says_what_to_install(tmp_path, capsys, monkeypatch):
    log = tmp_path / "log.jsonl"
    write(log)
    hide_matplotlib(monkeypatch)
    status, out, err = run(capsys, log)
    assert status == 1
    assert "1/80.0" in out, "the table needs none"
    assert "pip install matplotlib" in err
