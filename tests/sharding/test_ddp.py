import pytest
import torch
from ranks_of_tests import run
from runs_of_tests import train
from tiny_runs import write_model, write_sums


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharding")
    write_model(folder / "model")
    write_sums(folder / "sums.jsonl", 24)
    return folder


def test_ddp(folder, tmp_path):
    single = train(folder, tmp_path / "one")
    for ranks in (2, 3):
        results = run(ranks, tmp_path / str(ranks), train, folder=folder, root=tmp_path / "many", strategy="ddp", devices=ranks)
        for result in results:
            print(result["steps"][0])
            print(single["steps"][0])
            print(result["validation"], single["validation"])
            for one, other in zip(result["steps"], single["steps"], strict=True):
                assert one == pytest.approx(other, abs=1e-5)
            torch.testing.assert_close(result["weights"], single["weights"], atol=1e-5, rtol=0)
            assert result["validation"] == pytest.approx(single["validation"], abs=1e-6)
            assert result["plan"] == single["plan"]
