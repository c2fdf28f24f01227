"""The command doctor: what it shows, its findings with remedies, and its exit code; nothing is written."""

import re
from pathlib import Path

import pytest
from cli_runs import assert_refused, run

GSPO = Path(__file__).parents[2] / "configs" / "gspo.yaml"


@pytest.fixture(scope="module", autouse=True)
def parts(folder):
    with (folder / "my_parts.py").open("a") as file:
        file.write("\n\ndef nothing(completion):\n    return 0.0\n")
        file.write("\n\nfrom tiny_runs import Talk\n")
        file.write("\n\ndef late(completion, seen=[]):\n    seen.append(1)\n    return float(len(seen) > 8 and len(seen) % 2)\n")


def doctor(folder, *arguments):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if "__pycache__" not in str(path)}
    result = run(folder, "doctor", "--config", "t.yaml", *arguments)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if "__pycache__" not in str(path)} == before
    return result


def values(text):
    return dict(re.findall(r"^(\w[\w ]*?)  +(\S.*)$", text, re.MULTILINE))


def sections(result):
    """Of the findings, each of which has a remedy."""
    lines = [re.match(r"(?:Warning|Error): .+; .+ \(docs/troubleshooting\.md#(.*)\)$", line) for line in result.out.splitlines()]
    return [line[1] for line in lines if line]


def test_it_shows_prompts_as_tokenised_with_what_the_reward_found_and_paid(folder):
    result = doctor(folder, "--model.lr_lora=1e-9", "--model.lr_full=1e-9")
    assert result.code == 0, result.err
    assert sections(result).count("completions-are-cut") == sections(result).count("a-step-is-too-small") == 1
    prompt = r"^Prompt (\d), 4 tokens, .*sums.jsonl row \d+, reference answer '\d+'\n  '(\d\+\d=)'\n"
    prompts = re.findall(prompt, result.out, re.MULTILINE)
    assert [number for number, _ in prompts] == ["1", "2", "3", "4"]
    assert all(f"tokens {' '.join(map(repr, text))}\n" in result.out for _, text in prompts)
    paid = re.findall(r"^     (\d) tokens(, CUT)?; found '.*'; paid ([01]) \(starts_with_digit \3\)$", result.out, re.MULTILINE)
    assert len(paid) == 8 and all((tokens == "6") or not cut for tokens, cut, _ in paid)
    said = values(result.out)
    assert said["reference"].startswith("24 of 24 reference answers are paid")
    assert float(said["agreement"].split()[5]) < 1e-5 and "KL" in said["trial step"] and "lora" in said["gradient"]
    assert re.fullmatch(r"about \S+ s a step, and \d+ s for 4 steps with validation and scoring", said["time"])
    assert "Fits: hybrid 10% takes up to" in said["memory"]


def test_a_reward_that_pays_nothing_ends_with_an_error_that_says_so(folder):
    result = doctor(folder, "--model.reward=FunctionReward", f"--model.reward.function={folder}/my_parts.py:nothing")
    assert_refused(result, "nothing can be learned: your reward gives the reference answer 0: it can pay for nothing")
    assert values(result.out)["trial step"] == "not possible without a gradient"
    assert "Error: all 16 completions of the rollout earn the same, 0" in result.out


def test_a_minibatch_in_which_all_groups_are_equal_by_chance_is_no_error(folder):
    result = doctor(folder, "--model.reward=FunctionReward", f"--model.reward.function={folder}/my_parts.py:late")
    assert result.code == 0 and values(result.out)["trial step"] == "not possible without a gradient", result.err
    assert values(result.out)["reward"].startswith("0.25 ") and "Error:" not in result.out


@pytest.mark.parametrize(
    ("arguments", "section"),
    [
        (["--config", GSPO, "--model.prompts_per_rollout=8", "--model.lr_lora=0.3"], "a-step-is-too-large"),
        (["--model.reward=ExactMatch", "--model.reward.pattern=#(x)"], "the-reward-finds-no-answer"),
    ],
)
def test_what_keeps_it_from_learning_is_a_finding_with_a_remedy(folder, arguments, section):
    assert sections(doctor(folder, *arguments)).count(section) == 1


def test_episodes_are_shown_by_their_messages(folder):
    acting = ["--model.environment=my_parts.Talk", "--model.turn_template={content}", "--model.reward=null"]
    result = doctor(folder, *acting, "--model.episodes.max_tokens=64")
    assert result.code == 0, result.err
    assert re.search(r"^  -> assistant: .*\n     user: n\d", result.out, re.MULTILINE)
    assert re.search(r"\d turns?; paid", result.out)
    assert values(result.out)["reference"].startswith("not applicable: what an episode earns")


def test_training_on_examples_is_refused_before_the_model_is_loaded(folder):
    (folder / "model" / "model.safetensors").rename(folder / "away")
    try:
        (folder / "sft.yaml").write_text(
            f"model: {{class_path: SupervisedModule, init_args: {{model: {folder}/model}}}}\n"
            f"data: {{source: {{class_path: FileSource, init_args: {{train: {folder}/sums.jsonl, answer_column: null}}}}, "
            "format: DemonstrationFormat}\ntrainer: {accelerator: cpu}\n"
        )
        result = run(folder, "doctor", "--config", "sft.yaml")
        assert_refused(result, "doctor examines rollouts .* model is a SupervisedModule; .*val/loss")
    finally:
        (folder / "away").rename(folder / "model" / "model.safetensors")
