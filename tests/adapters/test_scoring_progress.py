"""Scoring that is stopped and goes on gives the very scores of one that was not stopped."""

import copy
import itertools
import signal

import pytest
import torch

from hybrid_lightning.adapters import ExactGradients, Scoring, SketchedGradients, find_candidates, scoring_progress
from hybrid_lightning.adapters.scorers import PreconditionedTail, Probe, SpectrumSNR
from hybrid_lightning.adapters.scoring_process import ScoringProcess
from hybrid_lightning.adapters.scoring_progress import ScoringProgress, is_scoring
from hybrid_lightning.errors import CheckpointError
from hybrid_lightning.stopping import RunStopped, StopSignals

RANK = 2


class StartLogprobs:
    """Losses that compare with the model as it was when each was seen first, as those of policies do."""

    def __init__(self, model, batches):
        self.model, self.batches, self.first = model, batches, []

    def __iter__(self):
        return self.since(0)

    def since(self, seen):
        for number, tokens in enumerate(self.batches[seen:], start=seen):
            loss = self.model(tokens, labels=tokens).loss
            if number == len(self.first):
                self.first.append(loss.detach())
            yield (loss - self.first[number]).exp()

    def state_dict(self):
        return {"first": self.first}

    def load_state_dict(self, state):
        self.first = list(state["first"])


def stops_at(scorer, module, signals):
    """The scorer, which one thread calls, and which a signal stops at the n-th module."""
    stopping, seen = copy.copy(scorer), itertools.count(1)

    def score(statistics, rank):
        if next(seen) == module:
            signals.requested = signal.SIGTERM
            signals.check()
        return scorer.score(statistics, rank)

    stopping.concurrent, stopping.score = False, score
    return stopping


def scored(model, batches, kept=None, on_loss=lambda seen: None, scorer=None, mode=None):
    scoring = Scoring(model, find_candidates(model), StartLogprobs(model, batches), scorer or PreconditionedTail(), RANK, mode)
    return scoring.run(ScoringProcess(kept, on_loss))


def stop_at(loss, kept):
    def on_loss(seen):
        if seen == loss:
            kept.signals.requested = signal.SIGTERM

    return on_loss


@pytest.mark.parametrize(
    ("scorer", "mode"),
    [(PreconditionedTail(), SketchedGradients(size=7)), (SpectrumSNR(), ExactGradients()), (Probe(), ExactGradients())],
    ids=lambda part: type(part).__name__,
)
def test_stopped_scoring_goes_on_to_the_same_scores(make_model, batches, tmp_path, scorer, mode):
    model = make_model("llama")
    whole = scored(model, batches, scorer=scorer, mode=mode)
    earlier = None
    # Stopped once, twice, and then three modules further each time.
    for number, at_loss in enumerate([2, 4, None, None]):
        kept = ScoringProgress(tmp_path / str(number), earlier, StopSignals())
        stopping = scorer if at_loss else stops_at(scorer, 4, kept.signals)
        with pytest.raises(RunStopped):
            scored(model, batches, kept, stop_at(at_loss, kept), stopping, mode)
        earlier = tmp_path / str(number)
        assert len(kept.scores) == (0 if at_loss else 3 * (number - 1)) and (earlier / "gradients.pt").is_file()
    before = {path.name: path.read_bytes() for path in earlier.iterdir()}
    kept = ScoringProgress(tmp_path / "last", earlier)
    assert scored(model, batches, kept, scorer=scorer, mode=mode) == whole
    assert not (tmp_path / "last" / "gradients.pt").exists(), "as large as the modules, and needed no more"
    assert before == {path.name: path.read_bytes() for path in earlier.iterdir()}, "what a stopped run kept stays as it was"


def test_losses_that_cannot_be_cut_are_computed_again_up_to_the_stop(make_model, losses, tmp_path):
    model = make_model("llama")

    def run(process=None):
        return Scoring(model, find_candidates(model), losses(model), PreconditionedTail(), RANK).run(process)

    kept, seen = ScoringProgress(tmp_path / "a"), []
    with pytest.raises(RunStopped):
        run(ScoringProcess(kept, stop_at(3, kept)))
    assert run(ScoringProcess(ScoringProgress(tmp_path / "b", tmp_path / "a"), seen.append)) == run()
    assert seen[0] == 4


def test_what_was_made_is_made_once_and_what_another_setting_or_format_found_is_refused(tmp_path):
    made = []

    def make(missing):
        made.extend(missing)
        return [{"tokens": torch.arange(3), "text": name} for name in missing]

    kept = ScoringProgress(tmp_path / "a")
    kept.recall(["one", "two"], make)
    kept.require({"adapter.rank": 8, "modules": ["q", "k"]})
    resumed = ScoringProgress(tmp_path / "b", tmp_path / "a")
    again = resumed.recall(["two", "three"], make)
    assert made == ["one", "two", "three"] and list(again) == ["two", "three"]
    assert again["two"]["tokens"].tolist() == [0, 1, 2] and again["two"]["text"] == "two"
    assert is_scoring(tmp_path / "b") and not is_scoring(tmp_path)
    resumed.require({"adapter.rank": 8})
    with pytest.raises(CheckpointError, match=r"was found with adapter\.rank=8, but it is 4 now; give the same, or start"):
        resumed.require({"adapter.rank": 4})
    (tmp_path / "a" / "settings.json").write_text('{"adapter.rank": 8}')
    with pytest.raises(CheckpointError, match="a has format None, and this version reads 1; go on with the version that"):
        ScoringProgress(tmp_path / "c", tmp_path / "a")
    assert not (tmp_path / "c").exists()
    for name in ("gradients.pt", "scores.json", "settings.json"):
        (tmp_path / "b" / name).write_text("{")
        with pytest.raises(CheckpointError, match=rf"(b|{name}).{name} cannot be read"):
            ScoringProgress(tmp_path / name, tmp_path / "b").sums()


def test_scoring_goes_on_where_nothing_can_be_kept(make_model, batches, tmp_path, monkeypatch):
    def full(content, path):
        path.write_bytes(b"some of it")
        raise OSError("No space left on device")

    model = make_model("llama")
    whole = scored(model, batches)
    kept = ScoringProgress(tmp_path / "a")
    monkeypatch.setattr(torch, "save", full)
    with pytest.warns(UserWarning, match=r"completions-0\.pt could not be written \(No space left on device\); scoring goes on"):
        kept.recall(["completions-0"], lambda missing: [{}])
    with pytest.warns(UserWarning, match=r"gradients\.pt could not be written"), pytest.raises(RunStopped):
        scored(model, batches, kept, stop_at(2, kept))
    assert not [path for path in (tmp_path / "a").iterdir() if path.suffix in (".pt", ".part")]
    assert scored(model, batches, ScoringProgress(tmp_path / "b", tmp_path / "a")) == whole


def test_sums_are_kept_now_and_then_too(make_model, batches, tmp_path, monkeypatch):
    """For whoever is killed, and not asked to stop."""
    monkeypatch.setattr(scoring_progress, "_EVERY_S", 0.0)
    monkeypatch.setattr(scoring_progress, "_SHARE", float("inf"))
    model, seen = make_model("llama"), []

    def killed(number):
        return number != 3 or 1 / 0

    with pytest.raises(ZeroDivisionError):
        scored(model, batches, ScoringProgress(tmp_path / "a"), killed)
    again = ScoringProgress(tmp_path / "b", tmp_path / "a")
    assert scored(model, batches, again, seen.append) == scored(model, batches) and seen[0] == 3
