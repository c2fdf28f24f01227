"""Fake vLLM servers, and their samplers; all that a test makes end with it."""

import threading

import pytest
import torch
from vllm_fake_server import MODEL, FakeNccl, FakeServer

from hybrid_lightning.rollout import VLLMServerSampler
from hybrid_lightning.rollout.interface import ServedModel
from hybrid_lightning.rollout.vllm import dispatch, servers


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Servers that fail are tried again soon."""
    monkeypatch.setattr(dispatch, "_FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr(servers, "_FIRST_PAUSE_S", 0.05)


@pytest.fixture
def nccl(request, monkeypatch):
    """Whether weights go over a fake NCCL instead of gloo: a parameter of the test."""
    fake = FakeNccl(monkeypatch) if getattr(request, "param", False) else None
    yield fake
    for communicator in fake.communicators if fake else ():
        communicator.group = None
    for thread in threading.enumerate():  # those within gloo would end the interpreter by an abort
        if "vLLM" in thread.name or "process_request" in thread.name:
            thread.join(10)


@pytest.fixture
def served(tokenizer, nccl):
    return ServedModel(MODEL.config, tokenizer, None, torch.float32, torch.device("cuda:0" if nccl else "cpu"))


@pytest.fixture
def start(tokenizer, nccl):
    started = []

    def make(**attributes):
        server = FakeServer(tokenizer, MODEL.config)
        server.backend = "nccl" if nccl else server.backend
        for name, value in attributes.items():
            setattr(server, name, value)
        started.append(server)
        return server

    yield make
    for server in started:
        server.stop()


@pytest.fixture
def build(served):
    made = []

    def build_for(*servers, weights=None, **arguments):
        arguments = {"timeout": 10, "give_up_after": 5, "max_new_tokens": 8} | arguments
        sampler = VLLMServerSampler(urls=[server.url for server in servers], **arguments)
        made.append(sampler)
        if weights is not None:
            sampler.update(weights, served)
        return sampler

    yield build_for
    for sampler in made:
        sampler.shut_down()
