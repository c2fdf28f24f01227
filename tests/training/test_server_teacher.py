"""A teacher behind a server that answers late, with errors, or not at all."""

import json
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from tiny_models import build_model, build_tokenizer
from tiny_runs import OftenDone, build_policy, check, fit, trained, write_model

from hybrid_lightning import losses
from hybrid_lightning.errors import ConfigError, RolloutError
from hybrid_lightning.policy import ModelTeacher, ServerTeacher

MODEL, TOKENIZER = build_model("llama", seed=5, std=0.1), build_tokenizer()


class Teacher(BaseHTTPRequestHandler):
    """What vLLM answers to /v1/models, /tokenize and /v1/completions with prompt_logprobs."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
        self.keys.add(self.headers.get("Authorization"))
        status, answer = 200, {}
        if self.path == "/tokenize":
            answer = {"tokens": TOKENIZER(body["prompt"], add_special_tokens=False)["input_ids"]}
        elif self.path == "/v1/completions":
            self.asked.append((time.monotonic(), tuple(body["prompt"])))
            fault = self.faults.pop(0) if self.faults else None
            with torch.no_grad():
                logprobs = MODEL(torch.tensor([body["prompt"]])).logits[0].log_softmax(-1).tolist()
            entries = [{str(t): {"logprob": row[t]}} for t, row in zip(body["prompt"][1:], logprobs, strict=False)]
            answer = {"choices": [{"prompt_logprobs": [None, *entries]}]}
            if fault == "garbage":
                answer = {"choices": [{}]}
            elif fault is not None:
                status, answer = fault, {"error": {"message": "too busy"}}
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.do_POST()

    def log_message(self, *args):
        pass


class Http(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 128


@pytest.fixture
def url(monkeypatch):
    monkeypatch.setattr("hybrid_lightning.training.server_teacher._FIRST_PAUSE_S", 0.01)
    Teacher.faults, Teacher.keys, Teacher.asked = [], set(), []
    http = Http(("127.0.0.1", 0), Teacher)
    threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_address[1]}"
    http.shutdown()
    http.server_close()


class Slow(OftenDone):
    """Takes a while for each token."""

    def sample(self, engine, tokenizer, request):
        rollouts = super().sample(engine, tokenizer, replace(request, on_token=lambda *_: time.sleep(0.1)))
        Slow.ended = time.monotonic()
        return rollouts


def test_it_teaches_what_the_same_model_here_does_and_is_asked_while_others_are_sampled(model, sums, tmp_path, url, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret-key")
    Teacher.faults = [500, 429]
    found = []
    for teacher in (ServerTeacher(url + "/"), ModelTeacher(str(write_model(tmp_path / "teacher", seed=5)))):
        policy = {"teacher": teacher, "sampler": Slow(6)}
        found.append(trained(fit(model, sums, tmp_path, policy=policy, max_steps=1)))
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)
    assert Teacher.keys == {"Bearer secret-key"} and "secret-key" not in str(vars(teacher))
    times = [when for when, _ in Teacher.asked]
    assert min(times) < Slow.ended - 0.1, "while others were still being sampled"
    rows = [ids for _, ids in Teacher.asked]
    assert len(rows) <= 16 + 2, "each once, and what failed again"


@pytest.mark.parametrize(("fault", "message"), [("garbage", "cannot be read"), (400, "too busy"), (503, "too busy")])
def test_what_cannot_succeed_or_stays_away_ends_the_run(model, sums, tmp_path, url, monkeypatch, fault, message):
    Teacher.faults = [fault] * 1000
    # No time is left for a second attempt, however busy the machine is.
    monkeypatch.setattr("hybrid_lightning.training.server_teacher._FIRST_PAUSE_S", 1000)
    with pytest.raises(RolloutError, match=message):
        fit(model, sums, tmp_path, policy={"teacher": ServerTeacher(url)}, max_steps=1)


def test_what_cannot_work_is_refused_before(model, tmp_path, url, monkeypatch):
    with pytest.raises(ConfigError, match="url='node7' is not an address"):
        ServerTeacher("node7")
    for options, message in (
        ({"distillation": losses.ReverseKL()}, "gives log-probabilities of sampled tokens, and ReverseKL.*take ModelTeacher"),
        ({"sampler": OftenDone(6, temperature=0.7)}, "temperature=0.7; set it to 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            check(build_policy(model, teacher=ServerTeacher(url), **options), tmp_path)
    check(build_policy(model, teacher=ServerTeacher(url)), tmp_path)
    monkeypatch.setattr("test_server_teacher.TOKENIZER", lambda text, **_: {"input_ids": [len(text)]})
    with pytest.raises(ConfigError, match=r"has another tokenizer than the policy: it splits.*serve a model with the policy's"):
        check(build_policy(model, teacher=ServerTeacher(url)), tmp_path)
    with pytest.raises(RolloutError, match="nothing answers there"):
        check(build_policy(model, teacher=ServerTeacher("http://127.0.0.1:1")), tmp_path)
