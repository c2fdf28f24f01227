"""A run with a judge and a teacher on servers, stopped during a call to each of the two."""

import itertools
import json
import os
import re
import shlex
import signal
import zlib

import pytest
import torch
from cli_runs import done, run, write_folder
from fake_judge import FakeJudge, answer_of, graded
from fake_teacher import FakeTeacher
from stopped_runs import points, run_of
from tiny_models import build_tokenizer

from hybrid_lightning.training.loop import RLLoop

KEY = "sk-very-secret-1234567890"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    yield from write_folder(tmp_path_factory.mktemp("judged"))


@pytest.fixture
def servers(monkeypatch):
    """A judge and a teacher that never answer alike twice; the judge refuses every eighth completion: these are left out."""
    for name in ("JUDGE_API_KEY", "VLLM_API_KEY"):
        monkeypatch.setenv(name, KEY)
    calls = itertools.count()
    judge, teacher = FakeJudge(), FakeTeacher(build_tokenizer(), lambda ids: [-1.0 - next(calls) % 7 / 10] * (len(ids) - 1))
    judge.grade = lambda text: (400, "no") if is_refused(text) else graded(next(calls) % 11, reason=f"it is {text!r}")
    yield judge, teacher
    judge.close()
    teacher.close()


def weights(folder):
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=False)["state_dict"]
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def is_refused(text):
    return zlib.crc32(text.encode()) % 8 == 0


def test_resume_is_bit_exact(servers, folder, monkeypatch):
    judge, teacher = servers
    given = {"base_url": judge.url, "model": "j", "rubric": "Grade the sum.", "retries": 0, "max_failed_share": 0.5}
    given |= {"cache_dir": "graded", "concurrency": 2}
    options = ["--config=t.yaml", "--model.reward=JudgeReward", *(f"--model.reward.{name}={given[name]}" for name in given)]
    options += ["--model.teacher=ServerTeacher", f"--model.teacher.url={teacher.url}", "--model.teacher.cache_dir=taught"]
    options += ["--model.loss=GRPOLoss", "--trainer.max_steps=4", "--trainer.val_check_interval=4", "--adapter.scorer=Random"]
    begun, begin = [], RLLoop.begin
    monkeypatch.setattr(RLLoop, "begin", lambda *given: begun.append(judge.requests[:]) or begin(*given))

    def stop_in(server, what, rollout):
        """Send a signal in the fourth call of a rollout, which is not answered before the signal has ended the run."""
        answer, calls, begun[:] = getattr(server, what), itertools.count(), []
        server.ended.clear()

        def stopping(asked):
            if len(begun) == rollout and next(calls) == 3:
                setattr(server, what, answer)
                os.kill(os.getpid(), signal.SIGTERM)
                server.ended.wait(60)
            return answer(asked)

        setattr(server, what, stopping)

    def go_on(stopped):
        """The command that the run prints to continue it."""
        return shlex.split(re.findall(r"hybrid_lightning (fit --config .+)", stopped.out)[-1])

    runs = []
    # The teacher first: it answers faster than the judge, and whatever it has answered is not asked again.
    for server, what, rollout in ((teacher, "logprobs", 2), (judge, "grade", 1)):
        stop_in(server, what, rollout)
        runs.append(run(folder, *(go_on(runs[-1]) if runs else ("fit", *options, "--samples.write_rows=true"))))
        assert runs[-1].code == 143 and not server.ended.is_set(), runs[-1].err[-2000:]
        server.ended.set()
    runs.append(done(folder, *go_on(runs[-1])))
    graded_before, taught_before = len(judge.requests), len(teacher.asked)
    whole = done(folder, "fit", *options)
    assert all(is_refused(answer_of(request)) for request in judge.requests[graded_before:]), "all others are known"
    assert len(teacher.asked) == taught_before
    folders = [run_of(result, folder) for result in (*runs, whole)]
    assert all(torch.equal(value, weights(folders[-1])[name]) for name, value in weights(folders[-2]).items())
    curves = [{key: value for key, value in points(of).items() if not key[0].startswith("judge/")} for of in folders]
    together = {**curves[0], **curves[1], **curves[2]}
    assert together == curves[3] and ("teacher/kl", 3) in curves[3]
    counted = {name: value for (name, step), value in points(folders[0]).items() if name.startswith("judge/")}
    assert counted.keys() == {"judge/calls", "judge/failed", "judge/tokens", "judge/seconds"} and counted["judge/failed"] > 0
    rows = [json.loads(line) for of in (folders[0], folders[2]) for line in (of / "rollouts.jsonl").read_text().splitlines()]
    lost = [row for row in rows if not row["counted"]]
    assert {is_refused(row["completion"]) for row in lost} == {True} and {row["reward"] for row in lost} == {None}
    assert len(rows) == 32 and not any(is_refused(row["completion"]) and row["counted"] for row in rows)

    said = done(folder, "doctor", *options).out
    shown = re.findall(r"-> (.+)\n +\d+ tokens.*; (paid|left out).*(?:\n +judge_reward: (.*))?", said)
    assert len(shown) == 8 and all((paid == "paid") == ("it is" in reply) for _, paid, reply in shown), said
    written = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    assert len(written) > 50 and not any(KEY.encode() in content for content in written)
    assert not any(KEY in text for each in (*runs, whole) for text in (said, each.out, each.err))
