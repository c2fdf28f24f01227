"""What a run prints, as a whole: each line says something, and errors are one line."""

import io
import logging
import re

import pytest
from cli_runs import done, run

# All lines that `fit` may print; tables stand in frames of their own.
FIT = re.compile(
    r"Adapter plan: |[┏┃┡│└]|Plan(, with \d+ more modules?,)? written to |Validation \((start|step \d+)\): |What happened"
    r"|[┌├]|Run folder: |Curves: |Report: |Next: |Verdict: |Try: |Warning: .* \(docs/troubleshooting.md#"
    r"|Step \d/4: loss .* reward .* entropy |  .* -> .* \(reward \S+\)"
)
ENGINE = re.compile(r"engine: ")
EVALUATION = re.compile(r"Test|[┌│└├]|Shares in percent|Measured by |Written to ")


@pytest.fixture
def said():
    """What Lightning's loggers write."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    for logger in loggers:
        logger.addHandler(handler)
    yield text
    for logger in loggers:
        logger.removeHandler(handler)


def only(pattern, text):
    others = [line for line in text.splitlines() if not pattern.match(line)]
    assert not others, others


def test_each_line_of_a_run_informs(folder, said):
    fitted = done(
        folder, "fit", "--config", "t.yaml", "--trainer.logger.init_args.name=fit", "--trainer.enable_progress_bar=null"
    )
    assert not fitted.err
    only(ENGINE, said.getvalue())  # one line, of which passes are fast
    only(FIT, fitted.out)
    shown = re.findall(r"Validation \(.*\n(  .* -> .*\n)(  .* -> .*\n)", fitted.out)
    assert len(shown) == 3 and all(len(line) <= 81 for lines in shown for line in lines), (
        "the same prompts, no wider than a screen"
    )
    assert fitted.out.count("Validation (") == 3 and fitted.out.count("\nStep ") == 4, "a file has no progress bar"
    assert re.search(r"\nNext: .*\nVerdict: .*(\nTry: .*)*\n\Z", fitted.out)
    place = "runs/fit/version_0"
    tested = done(folder, "test", "--config", f"{place}/config.yaml", "--ckpt_path", f"{place}/checkpoints/last.ckpt")
    assert not tested.err
    only(EVALUATION, tested.out)
    (loaded,) = [line for line in said.getvalue().splitlines() if not ENGINE.match(line)]
    assert re.fullmatch(r"Loaded model weights from the checkpoint at \S+", loaded)


def test_a_plan_in_which_all_are_alike_has_no_table(folder, said):
    name = "--trainer.logger.init_args.name=lora"
    scored = run(folder, "score", "--config", "t.yaml", "--adapter.budget.share=0", name)
    first, second = scored.out.splitlines()
    assert re.match(r"Adapter plan: 0 fully trained, \d+ with LoRA of rank 2; [\d,]+ trainable parameters", first)
    only(ENGINE, said.getvalue())
    assert second == "Plan written to runs/lora/version_0/plan.json" and not scored.err
