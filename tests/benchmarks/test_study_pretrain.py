from dataclasses import replace

import pytest

pytest.importorskip("scipy", reason="the study's intervals need scipy: pip install 'hybrid-lightning[study]'")

from benchmarks.study import pretrain
from benchmarks.study.policies import RECIPES, folder_of


def test_a_start_policy_for_each_seed_and_one_that_has_not_learned_is_drawn_anew(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    losses = iter([2.3, 0.7, 0.7, 0.7])
    monkeypatch.setattr(pretrain, "answer_loss", lambda *_: next(losses))
    monkeypatch.setitem(RECIPES, "tracker", replace(RECIPES["tracker"], steps=1, batch_size=4))
    for seed in (3, 4, 3):
        pretrain.make("tracker", seed, own_folder=True)
    assert {path.name for path in folder_of("tracker").parent.iterdir()} == {"tracker-3", "tracker-4"}
    said = capsys.readouterr().out
    assert "tracker-3 has not learned (2.30 nats a token); trying other weights" in said and "tracker-3 is there already" in said
