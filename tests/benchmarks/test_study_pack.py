import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from study_records import keep, record

from benchmarks.study import pack, pool
from benchmarks.study.records import of_method
from benchmarks.study.store import PACK, RESULTS, Store, read, read_pack, same, write, write_pack

RUN = "run/sums/lora/lr=0.01-seed=0.json"
ODD = {
    "none": None,
    "floats": [0.1 + 0.2, 1e-320, -0.0, 1.0, 1, True, float("inf"), 2**60],
    "nested": {"b": [{}, [], {"x": None}], "a": "ü \u2028 \ud800"},
}


@pytest.fixture
def command(tmp_path, monkeypatch):
    """`pack` with these options, in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def run(*options, stage=pack):
        monkeypatch.setattr(sys, "argv", [stage.__name__, "--records", "loose", "--results", "kept", *options])
        stage.main()

    return run


def error(run, *options):
    with pytest.raises(SystemExit) as stopped:
        run(*options)
    assert isinstance(stopped.value.code, str), "which Python prints, and ends with 1"
    return stopped.value.code


def test_what_is_packed_comes_back_to_the_digit_as_the_same_bytes_in_whatever_order_it_came(command, tmp_path, capsys):
    """A packed record stays when its file is gone, and is not made again."""
    loose, table, written = tmp_path / "loose", tmp_path / "kept" / PACK, {}
    for seed in (9, 10):
        keep(loose, record(seed=seed))
        write({"bytes": 1, **ODD}, loose / "memory" / "sums" / f"{seed}.json")
        command()
        for path in loose.rglob("*.json"):
            written[path.relative_to(loose).as_posix()] = read(path)
            path.unlink()
    assert "4 records in kept/records.jsonl.xz: 2 added, 0 replaced, 0 taken out" in capsys.readouterr().out
    at_once, packed = table.read_bytes(), read_pack(table)
    assert list(packed) == sorted(written) and all(same(content, written[name]) for name, content in packed.items())
    write_pack(dict(reversed(packed.items())), tmp_path / "other")
    assert (tmp_path / "other").read_bytes() == at_once
    pool.make_runs([record(seed=9)[0]], Store(loose, table), workers=1)
    assert "1 wanted, 1 of them made already" in capsys.readouterr().out


def test_another_record_of_the_same_name_is_refused_until_one_is_given_up(command, tmp_path):
    keep(tmp_path / "loose", record(seed=0, accuracy=0.5), record(seed=1))
    command()
    before = (tmp_path / "kept" / PACK).read_bytes()
    path, store = tmp_path / "loose" / RUN, (tmp_path / "loose", tmp_path / "kept" / PACK)
    write({**read(path), "diverged": 0}, path)
    assert "differs from the packed record" in error(command), "in a type alone"
    keep(tmp_path / "loose", record(seed=0, accuracy=0.6), record(seed=2))
    said = error(command)
    assert f"error: loose/{RUN} differs from the packed record" in said and f"--drop {RUN}" in said
    assert "differs from the packed record" in error(lambda: of_method(Store(*store), "run", "sums", "lora"))
    assert store[1].read_bytes() == before
    command("--drop", RUN)
    assert [found.accuracy for found in of_method(Store(*store), "run", "sums", "lora")] == [0.6, 0.5, 0.5]


def test_whatever_is_not_a_record_is_named_with_the_remedy(command, tmp_path):
    right, loose, table = json.dumps(asdict(record()[1])), tmp_path / "loose", tmp_path / "kept" / PACK
    for name, text, words in (
        (RUN, "[]", "an object was expected, not list"),
        (RUN.replace("seed=0", "seed=1"), right, f"its run belongs to {RUN}"),
        ("memory/sums/lora.json", '{"job": {}}', "it has no 'bytes'"),
    ):
        (loose / name).parent.mkdir(parents=True, exist_ok=True)
        (loose / name).write_text(text)
        said = error(command)
        assert said.startswith(f"error: loose/{name} is not a record: ") and words in said
        assert said.endswith("its stage makes it again") and not table.exists()
        (loose / name).unlink()
    keep(loose, record())
    command()
    table.write_bytes(table.read_bytes()[:-20])
    said = error(command)
    assert said.startswith("error: kept/records.jsonl.xz is not a table of records (line 1, ") and "git checkout kept" in said


def test_the_projects_own_table_has_what_its_stages_write():
    path = Path(__file__).parents[2] / RESULTS / PACK
    records = read_pack(path)
    assert len(records) >= 7161 and list(records) == sorted(records)
    assert not {name: cause for name, content in records.items() if (cause := pack.fault(name, content))}
