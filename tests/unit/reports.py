"""What the tests of both kinds of `ef-horovod report` share."""

from __future__ import annotations

import builtins

from ef_horovod.cli import main as cli


def run(capsys, *words):
    """Status, standard output and standard error of `ef-horovod report`."""
    status = cli.main(["report", *map(str, words)])
    said = capsys.readouterr()
    return status, said.out, said.err


def hide_matplotlib(monkeypatch):
    """As if it were not installed."""
    plain = builtins.__import__

    def without(name, *rest):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return plain(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
