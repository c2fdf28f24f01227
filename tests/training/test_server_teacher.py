"""A teacher on a server that answers late, with errors, or not at all."""

from dataclasses import replace

import pytest
import torch
from fake_teacher import FakeTeacher
from tiny_models import build_model, build_tokenizer
from tiny_runs import OftenDone, build_policy, check, fit, trained, write_model

from hybrid_lightning import losses
from hybrid_lightning.errors import ConfigError, RolloutError
from hybrid_lightning.training import ModelTeacher, ServerTeacher

MODEL, TOKENIZER = build_model("llama", seed=5, std=0.1), build_tokenizer()


def logprobs(ids):
    with torch.no_grad():
        rows = MODEL(torch.tensor([ids])).logits[0].log_softmax(-1)
    return rows[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr("hybrid_lightning.training.server_teacher._FIRST_PAUSE_S", 0.01)
    server = FakeTeacher(TOKENIZER, logprobs)
    yield server
    server.close()


@pytest.fixture
def teacher(server, tmp_path):
    return ServerTeacher(server.url + "/", cache_dir=str(tmp_path / "cache"))


class Waits(OftenDone):
    """Continues after the first completion once the teacher has been called for it."""

    def sample(self, engine, tokenizer, request):
        def told(row, tokens):
            request.on_tokens(row, tokens)
            Waits.asked_before_the_end.append(self.server.was_asked.wait(30))

        return super().sample(engine, tokenizer, replace(request, on_tokens=told if request.on_tokens else None))


def test_it_teaches_what_the_same_model_here_does_and_is_asked_while_others_are_sampled(
    model, sums, tmp_path, server, teacher, monkeypatch
):
    monkeypatch.setenv("VLLM_API_KEY", "secret-key")
    server.faults, Waits.server, Waits.asked_before_the_end = [500, 429], server, []
    local = ModelTeacher(str(write_model(tmp_path / "teacher", seed=5)))
    of_server = {"teacher": ServerTeacher(server.url, cache_dir=str(tmp_path / "cache")), "sampler": Waits(6)}
    found = [
        trained(fit(model, sums, tmp_path, policy=policy, max_steps=1))
        for policy in (of_server, {"teacher": local, "sampler": OftenDone(6)})
    ]
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)
    assert server.keys == {"Bearer secret-key"} and "secret-key" not in str(vars(of_server["teacher"]))
    assert Waits.asked_before_the_end[:1] == [True], "while others were still being sampled"
    assert 8 < len(server.asked) <= 16 + 2, "each once, and what failed again"


@pytest.mark.parametrize(("fault", "message"), [("garbage", "cannot be read"), (400, "too busy"), (503, "too busy")])
def test_what_cannot_succeed_or_stays_away_ends_the_run(model, sums, tmp_path, server, teacher, monkeypatch, fault, message):
    server.faults = [fault] * 1000
    # No time is left for a second attempt, however busy the machine is.
    monkeypatch.setattr("hybrid_lightning.training.server_teacher._FIRST_PAUSE_S", 1000)
    with pytest.raises(RolloutError, match=message):
        fit(model, sums, tmp_path, policy={"teacher": teacher}, max_steps=1)


def test_what_cannot_work_is_refused_before(model, tmp_path, server, teacher):
    with pytest.raises(ConfigError, match="url='node7' is not an address"):
        ServerTeacher("node7")
    for options, message in (
        ({"distillation": losses.ReverseKL()}, "gives log-probabilities of sampled tokens, but ReverseKL.*use ModelTeacher"),
        ({"sampler": OftenDone(6, temperature=0.7)}, "temperature=0.7; set it to 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            check(build_policy(model, teacher=teacher, **options), tmp_path)
    check(build_policy(model, teacher=teacher), tmp_path)
    server.tokenizer = lambda text, **_: {"input_ids": [len(text)]}
    with pytest.raises(ConfigError, match=r"has another tokenizer than the policy: it splits.*serve a model with the policy's"):
        check(build_policy(model, teacher=teacher), tmp_path)
    with pytest.raises(RolloutError, match="nothing answers there"):
        check(build_policy(model, teacher=ServerTeacher("http://127.0.0.1:1")), tmp_path)
