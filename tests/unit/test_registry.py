"""A name and a number on the wire belong to one class, wherever classes come from."""

from __future__ import annotations

import importlib
import sys
import textwrap

import pytest

import ef_horovod as ef
from ef_horovod.compressors.registry import COMPRESSORS, compressor_of, register_compressor
from ef_horovod.methods.parsing import read_compressor
from ef_horovod.methods.registry import register_method

pytestmark = pytest.mark.usefixtures("own_classes")


def _made(name: str, base: type) -> type:
    return type(name, (base,), {"__module__": "elsewhere.module", "__qualname__": name})


@pytest.mark.parametrize("name", ["TopK", "topk", "EF21"])
def test_a_compressor_from_outside_takes_no_name_that_is_there(name):
    with pytest.raises(ValueError, match=rf"elsewhere.module.{name} .*ef_horovod.\w+.\w+.\w+ is"):
        register_compressor(200)(_made(name, ef.Compressor))
    assert ef.TopK.__module__ == "ef_horovod.compressors.topk"
    assert compressor_of(200) is None
    assert read_compressor("topk:0.1") == ef.TopK(0.1)


@pytest.mark.parametrize("name", ["EF21", "ef21", "TopK"])
def test_a_method_from_outside_takes_no_name_that_is_there(name):
    with pytest.raises(ValueError, match=rf"elsewhere.module.{name} .*ef_horovod.\w+.\w+.\w+ is"):
        register_method(_made(name, ef.Method))
    assert ef.EF21.__module__ == "ef_horovod.methods.ef21"


def test_a_number_on_the_wire_is_not_taken_twice():
    with pytest.raises(ValueError, match="elsewhere.module.Mine .* wire_id 3, which ef_horovod"):
        register_compressor(3)(_made("Mine", ef.Compressor))
    assert "Mine" not in COMPRESSORS
    assert compressor_of(3) is ef.TopK


@pytest.mark.parametrize("bad", [-1, 256, 2.0, True, "7", None])
def test_numbers_that_no_header_holds_are_refused(bad):
    with pytest.raises(ValueError, match="Mine got wire_id=.*, expected a whole number from 0"):
        register_compressor(bad)(_made("Mine", ef.Compressor))


def test_a_module_can_be_edited_and_imported_again(tmp_path, monkeypatch):
    source = """
        import ef_horovod as ef
        from ef_horovod.compressors.registry import register_compressor
        from ef_horovod.methods.registry import register_method

        @register_compressor(NUMBER)
        class MyOwn(ef.Compressor): ...

        @register_method
        class MyMethod(ef.Method): ...
    """
    path = tmp_path / "my_own_module.py"
    path.write_text(textwrap.dedent(source).replace("NUMBER", "210"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    module = importlib.import_module("my_own_module")
    first = module.MyOwn
    path.write_text(textwrap.dedent(source).replace("NUMBER", "211"))
    importlib.invalidate_caches()
    importlib.reload(module)
    assert ef.MyOwn is module.MyOwn is not first
    assert ef.MyMethod is module.MyMethod
    assert compressor_of(211) is module.MyOwn
    assert compressor_of(210) is None
    importlib.reload(module)
    assert compressor_of(211) is module.MyOwn


def test_a_cell_of_a_notebook_can_be_run_again():
    cell = "class Mine(ef.Compressor): ..."
    spaces = [{"__name__": "__main__", "ef": ef} for _ in range(2)]
    for space in spaces:
        exec(cell, space)
        register_compressor(220)(space["Mine"])
    assert compressor_of(220) is ef.Mine is spaces[1]["Mine"]
