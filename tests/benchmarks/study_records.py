"""Records of the study for tests."""

from dataclasses import asdict

import pytest

pytest.importorskip("scipy", reason="the study's intervals need scipy: pip install 'hybrid-lightning[study]'")

from benchmarks.study.records import Job, Record
from benchmarks.study.store import write


def record(method="lora", rate=1e-2, seed=0, purpose="run", accuracy=0.5, validation=None, trainable=100, rank=None):
    job = Job("tasks/sums.yaml", method, rate, seed, purpose, rank)
    points = [{"step": 0, "seconds": 0.0, "avg": 0.1, "greedy": 0.1}]
    points.append({"step": 60, "seconds": 5.0, "avg": accuracy if validation is None else validation, "greedy": accuracy})
    return job, Record(
        job=vars(job),
        options={"adapter.rank": rank or 2},
        config_digest="0",
        model_digest="0",
        commit="abc",
        versions={},
        curve=points,
        test={"avg": accuracy, "greedy": accuracy},
        trainable_parameters=trainable,
    )


def keep(results, *records):
    for job, made in records:
        write(asdict(made), results / job.file)


def results_with_a_gap(folder, seeds=8):
    means = {"fft": 0.8, "lora": 0.5, "dora": 0.51, "rslora": 0.49, "adalora": 0.4, "hybrid": 0.78, "random": 0.6}
    for place, (name, value) in enumerate(means.items()):
        keep(folder, *(record(name, seed=s, accuracy=value + 0.002 * ((s * 5 + place) % seeds)) for s in range(seeds)))
