"""Each run folder tells its run in one page, which needs no network and runs nothing that a run has said."""

import itertools
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from cli_runs import done
from cli_runs import run as run_command
from lightning.pytorch.callbacks import LambdaCallback
from tiny_runs import StartsWithDigit

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.reports.page import ReportedRun, report_page, thinned

BAD = '"\'></pre><script>alert(1)</script><img src="https://x.org/a" onerror=alert(1)>&'


class Tags(HTMLParser):
    """Reads the elements of a page and its text."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def test_a_page_has_what_the_run_was(finished):
    page, found = (finished.folder / "report.html").read_text(), ReportedRun.read(finished.folder)
    assert found.report["state"] == "finished" and found.report["step"] == 6
    text = " ".join(Tags(page).text.split())
    for said in (found.summary["verdict"], "Samples, before and after", "Adapter plan: ", "model.lr_lora", "CPU", "peak memory"):
        assert said in text, said
    before, after = (100 * found.summary[f"accuracy_{when}"] for when in ("before", "after"))
    assert f"{before:.1f}% [" in text and f"{after:.1f}% [" in text
    assert re.search(rf"{re.escape(f'{after - before:+.1f}')} points .*?, paired over 10 problems", text)
    first, last = (found.report[when]["samples"] for when in ("first", "last"))
    assert [sample["prompt"] for sample in first] == [sample["prompt"] for sample in last] and len(first) == 6
    assert [sample["completion"] for sample in first] != [sample["completion"] for sample in last]
    assert found.report["changed"]["model.lr_lora"] == [0.1, 1e-4] and "model.samples_per_prompt" in found.report["changed"]
    left = {"model.credit", "adapter.dropout"}
    assert not left & found.report["changed"].keys() and left < found.report["settings"].keys()
    assert not any(name.startswith("rewards/") for name in found.curves), "a single part is the reward"
    assert found.curves["reward"][0] == [1, 2, 3, 4, 5, 6] and found.curves["val/avg@4"][0] == [0, 4, 6]


def test_nothing_that_a_run_says_runs_or_is_loaded(finished):
    def spoiled(value):
        if isinstance(value, dict):
            return {(k + BAD if k.startswith("model.") else k): spoiled(v) for k, v in value.items()}
        return [spoiled(item) for item in value] if isinstance(value, list) else value + BAD if isinstance(value, str) else value

    found = ReportedRun.read(finished.folder)
    clean = Tags(report_page(found)).elements
    report = {name: spoiled(value) if name != "curves" else value for name, value in found.report.items()}
    report["curves"] = {name + BAD * (name == "reward"): curve for name, curve in found.report["curves"].items()}
    summary = {**found.summary, "verdict": BAD, "try": [BAD]}
    page = report_page(ReportedRun(found.folder, report, summary))
    spoiled_page = Tags(page)
    kinds = {tag for tag, _ in spoiled_page.elements}
    assert kinds == {tag for tag, _ in clean} and "script" not in kinds and BAD in spoiled_page.text
    for tag, attributes in spoiled_page.elements:
        assert not any(name.startswith("on") or name in ("href", "xlink:href") for name in attributes), (tag, attributes)
        assert attributes.get("src", "data:").startswith("data:")
    assert "url(" not in page and "@import" not in page


def test_a_resumed_run_shows_the_curves_and_first_samples_of_the_whole(finished, resumed):
    first, second = ReportedRun.read(finished.folder).report, ReportedRun.read(resumed.folder).report
    for report in (first, second):
        report["curves"].pop("time/step_s")
    assert first["curves"] == second["curves"] and first["first"] == second["first"] and first["last"] == second["last"]


def test_a_run_that_fails_says_how_far_it_came_and_why(measured, tmp_path, monkeypatch):
    calls, working = itertools.count(1), StartsWithDigit.__call__

    def failing(self, completions, prompts):
        if next(calls) == 9:  # after validation, what it pays for references and for wrong answers, and rollouts
            raise RuntimeError(BAD)
        return working(self, completions, prompts)

    monkeypatch.setattr(StartsWithDigit, "__call__", failing)
    with pytest.raises(Exception, match="alert"):
        measured(tmp_path, enable_checkpointing=True)
    found = ReportedRun.read(tmp_path / "version_0")
    assert found.report["state"].startswith("stopped: ") and BAD in found.report["state"] and found.report["step"] == 2
    assert "stopped.ckpt" in found.report["commands"][0]
    assert len(found.curves["reward"][0]) == found.report["step"] and "<script" not in (found.folder / "report.html").read_text()


def test_a_page_that_cannot_be_written_is_said_and_fails_no_run(measured, tmp_path):
    folder = tmp_path / "version_0" / "report.html" / "x"  # a folder has the name of the page
    blocking = LambdaCallback(on_train_start=lambda *_: folder.mkdir(parents=True))
    run = measured(tmp_path, blocking, max_steps=2, num_sanity_val_steps=0)
    said = r"Warning: \S+report\.html could not be written: IsADirectoryError: "
    assert re.search(said, run.output) and "Report:" not in run.output and run.summary["steps"] == 2


def test_a_long_curve_is_drawn_by_means_and_without_what_is_not_finite():
    steps = list(range(1, 1001))
    points = thinned((steps, [float("nan") if step == 1000 else 2.0 * step for step in steps]), most=100)
    assert len(points) <= 100 and points[0] == (5.5, 11.0) and points[-1] == (995.0, 1990.0)


def test_compare_offers_the_latest_run_with_a_report_and_none_that_only_scored(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scored, *fitted = folders = [Path("runs") / place for place in ("gspo/version_0", "gspo/version_1", "other/version_0")]
    for folder in folders:
        folder.mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"version_0 has no report\.json, which fit writes .*; give the folder of a run$"):
        ReportedRun.read(scored)
    for seconds, folder in zip((2e9, 1e9), reversed(fitted), strict=True):
        (folder / "report.json").write_text("{}")
        os.utime(folder / "report.json", (seconds, seconds))
        for other in (scored, Path("runs/gspo"), Path("none")):
            with pytest.raises(
                ConfigError, match=f"; give a run folder such as {fitted[1] if other == Path('none') else folder}$"
            ):
                ReportedRun.read(other)


def test_compare_tells_runs_apart_by_their_problems(folder):
    short = ["--trainer.max_steps=2", "--trainer.logger.init_args.name=compared"]
    for rank in (2, 1):
        fitted = done(folder, "fit", "--config", "t.yaml", *short, f"--adapter.rank={rank}")
        assert "\nReport:     runs/compared/version_" in fitted.out
    runs = [f"runs/compared/version_{number}" for number in range(2)]
    same = done(folder, "compare", *runs, "--html=c.html")
    assert re.search(r"accuracy \(avg@2\), difference to A │ +│ \S+ points.*, paired over 8 problems", same.out)
    options = same.out.partition("Options that differ")[2].partition("val/avg@2")[0]
    assert [line.split("│")[1:4] for line in options.splitlines() if line.startswith("│")] == [[" adapter.rank ", " 2 ", " 1 "]]
    assert re.search(r"val/avg@2\n  A  [▁-█]{40}  \S+ -> \S+\n  B  [▁-█]{40}  \S+ -> ", same.out)
    page = (folder / "c.html").read_text()
    assert "adapter.rank" in page and len(re.findall(r'class="s1 path"', page)) > 5 and "paired over 8 problems" in page
    report = json.loads((folder / runs[1] / "report.json").read_text())
    report["settings"]["validation prompts"] = "of others"
    (folder / runs[1] / "report.json").write_text(json.dumps({**report, "state": "not finished"}))
    other = run_command(folder, "compare", *runs).out
    assert re.search(r"difference to A │ +│ \S+ points.*, unpaired ", other) and "Validation problems differ" in other
    assert "not finished (step 2 of 2)" in other
    for arguments, message in {
        (runs[0],): "compare needs at least two run folders",
        (runs[0], "runs/none"): "runs/none is not a folder; give a run folder",
        (runs[0], "model"): r"model has no report\.json, which fit writes",
        (*runs, "--html=c.html"): r"--html=c\.html: it exists; give a new file",
    }.items():
        refused = run_command(folder, "compare", *arguments)
        assert refused.code == 1 and re.search(f"error: {message}", refused.err) and len(refused.err.splitlines()) == 1
