"""A run reports each obstacle to its learning once, and ends with a verdict; the command doctor reports them without a run."""

import gc
import json
import re
from pathlib import Path

import pytest
import torch
from cli_runs import assert_refused, done, run
from tiny_runs import Constant, build_adapter, build_data, build_policy, build_trainer, fit

from hybrid_lightning.callbacks import Diagnosis
from hybrid_lightning.training import CosineSchedule

GSPO = Path(__file__).parents[2] / "configs" / "gspo.yaml"
NO_GRADIENT = "nothing was learned: no step had a gradient, since every completion earned 0"


@pytest.fixture(scope="module", autouse=True)
def parts(folder):
    with (folder / "my_parts.py").open("a") as file:
        file.write("\n\ndef nothing(completion):\n    return 0.0\n")
        file.write("\n\ndef anything(completion):\n    return 1.0\n")
        file.write("\n\nfrom tiny_runs import Talk\n")
        file.write("\n\nclass Broken(Talk):\n    async def start(self, prompt, seed):\n        raise ValueError('no board')\n")
        file.write("\n\ndef coin(completion):\n    import random\n\n    return float(random.random() < 0.5)\n")
        file.write("\n\ndef style(completion):\n    return sum(not letter.isdigit() for letter in completion) / 100\n")
        file.write("\n\ndef minus_length(completion):\n    return -float(len(completion))\n")
        file.write("\n\ndef late(completion, seen=[]):\n    seen.append(1)\n    return float(len(seen) > 8 and len(seen) % 2)\n")


def sections(text):
    """The sections of the page that the findings name; each finding has a remedy."""
    lines = [line for line in text.splitlines() if line.startswith(("Warning: ", "Error: "))]
    return [re.fullmatch(r".+; .+ \(hybrid-lightning explain (\S+)\)", line)[1] for line in lines]


def test_a_reward_that_pays_nothing_is_said_before_the_first_step_and_at_the_end(folder):
    name = "--trainer.logger.init_args.name=nothing"
    steps = ["--trainer.max_steps=14", "--trainer.val_check_interval=14", "--trainer.enable_progress_bar=null"]
    reward = ["--model.reward=FunctionReward", f"--model.reward.function={folder}/my_parts.py:nothing"]
    result = done(folder, "fit", "--config", "t.yaml", name, *steps, *reward)
    first = ["completions-are-cut", "all-rewards-of-a-group-are-equal", "the-reference-answer-earns-nothing"]
    assert sections(result.out) == [*first, "no-gradient"], "each once"
    assert sections(result.out[: result.out.index("Step 1/14")]) == first
    assert "nothing is learned from the last 6 rollouts" in result.out.rpartition("\nWarning: ")[2].splitlines()[0]
    *_, summary = (folder / "runs" / "nothing").rglob("summary.json")
    summary = json.loads(summary.read_text())
    assert summary["verdict"] == NO_GRADIENT and len(summary["try"]) == 4
    verdict, *tries = result.out.rstrip().splitlines()[-5:]
    assert verdict == f"Verdict:    {summary['verdict']}" and tries == [f"Try:        {advice}" for advice in summary["try"]]
    lines = re.findall(r"^Step (\d+)/14: reward .* loss .* entropy [\d.]+ .*time/step_s [\d.]+$", result.out, re.MULTILINE)
    assert [int(line) for line in lines] == list(range(1, 15))
    phases = ["Calibration rollouts", "Scoring modules", "Validation before training", "Step 1", "Validation"]
    assert re.findall(r"^(.+) \.\.\.$", result.out, re.MULTILINE) == phases, "each has a line when it begins"


def test_a_rate_that_is_far_too_high_is_noticed(folder):
    small = ["--model.prompts_per_rollout=8", "--adapter.budget.share=0", "--trainer.max_steps=4", "--data.validation_prompts=16"]
    small += ["--trainer.val_check_interval=4", "--trainer.enable_progress_bar=false"]
    high = done(folder, "fit", "--config", GSPO, *small, "--model.lr_lora=0.3")
    assert "the-policy-gets-worse" in sections(high.out)
    assert re.search(
        r"\nVerdict:    worse than at the start: accuracy -.* points \[-.*, -.*\] on 16 problems, .*\nTry: ", high.out
    )


def test_findings_continue_after_a_stop(model, sums, tmp_path, capsys):
    policy, diagnosis = {"reward": Constant()}, Diagnosis()
    stopped = fit(model, sums, tmp_path, Diagnosis(), policy=policy, max_steps=4)
    stopped.trainer.save_checkpoint(tmp_path / "stopped.ckpt")
    assert "no-gradient" not in sections(capsys.readouterr().out)
    fit(model, sums, tmp_path, diagnosis, policy=policy, max_steps=7, ckpt=tmp_path / "stopped.ckpt")
    assert sections(capsys.readouterr().out) == ["no-gradient"]
    assert diagnosis.verdict(None, None, None)[0] == NO_GRADIENT


# ---- doctor


def doctor(folder, *arguments):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if "__pycache__" not in str(path)}
    result = run(folder, "doctor", "--config", "t.yaml", *arguments)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if "__pycache__" not in str(path)} == before
    return result


def values(text):
    return dict(re.findall(r"^(\w[\w ]*?)  +(\S.*)$", text, re.MULTILINE))


def test_it_shows_prompts_as_tokenised_with_what_the_reward_found_and_paid(folder):
    result = doctor(folder, "--model.lr_lora=1e-9", "--model.lr_full=1e-9")
    assert result.code == 0, result.err
    assert re.match(r"One step: \d+ prompts x \d+ completions \.\.\.\n", result.out), "at once"
    assert sections(result.out).count("completions-are-cut") == sections(result.out).count("a-step-is-too-small") == 1
    prompt = r"^Prompt (\d), 4 tokens, .*sums.jsonl row \d+, reference answer '\d+'\n  '(\d\+\d=)'\n"
    prompts = re.findall(prompt, result.out, re.MULTILINE)
    assert [number for number, _ in prompts] == ["1", "2", "3", "4"]
    assert all(f"tokens {' '.join(map(repr, text))}\n" in result.out for _, text in prompts)
    paid = re.findall(r"^     (\d) tokens(, CUT)?; found '.*'; paid ([01]) \(starts_with_digit \3\)$", result.out, re.MULTILINE)
    assert len(paid) == 8 and all((tokens == "6") or not cut for tokens, cut, _ in paid)
    said = values(result.out)
    assert said["reference"].startswith("24 of 24 reference answers are paid")
    assert float(said["agreement"].split()[5]) < 1e-5 and "KL" in said["trial step"] and "lora" in said["gradient"]
    assert re.fullmatch(r"about \S+ s a step, \d+ s for 4 steps with validation and scoring", said["time"])
    assert "Fits: hybrid 10% takes up to about " in said["memory"]
    assert said["answers"].endswith("the most frequent one")
    assert (
        result.out.splitlines()[-1].startswith("The run may fail: ")
        and "(hybrid-lightning explain " in result.out.splitlines()[-1]
    )


def test_a_reward_that_pays_nothing_ends_with_an_error_that_says_so(folder):
    result = doctor(folder, "--model.reward=ExactMatch", "--model.reward.pattern=#(x)")
    assert_refused(result, "nothing can be learned: your reward gives the reference answer 0")
    assert "Error: all 16 completions of the rollout earn the same, 0" in result.out
    assert "Warning: your reward gives the reference answer 0 in all known forms" in result.out
    assert values(result.out)["trial step"] == "not possible without a gradient"
    assert sections(result.out).count("the-reward-finds-no-answer") == 1


def test_what_pays_for_anything_is_the_cause_and_a_rate_that_is_too_high_has_the_last_word(folder):
    result = doctor(folder, "--model.reward=FunctionReward", f"--model.reward.function={folder}/my_parts.py:anything")
    assert_refused(result, "nothing can be learned: your reward pays as much for another row's answer")
    assert "easier" not in result.out
    result = doctor(folder, "--model.lr_lora=30", "--model.lr_full=3", "--model.mask_truncated_completions=true")
    assert result.code == 0 and re.match("The run may fail: .*one step changes", result.out.splitlines()[-1]), result.out[-600:]


def function(folder, name):
    return ["--model.reward=FunctionReward", f"--model.reward.function={folder}/my_parts.py:{name}"]


def test_a_reward_with_chance_in_it_is_named_with_how_far_it_differs(folder):
    result = doctor(folder, *function(folder, "coin"))
    repeated = values(result.out)["repeated"]
    assert re.match(r"different for \d+ of 16 completions that are scored twice, by [\d.]+ on average, up to 1", repeated)
    assert result.code == 0 and f"the reward coin is {repeated}; " in result.out
    assert "the-reward-is-not-repeatable)" in result.out


def test_what_pays_for_style_or_against_length_is_no_error(folder):
    result = doctor(folder, *function(folder, "style"), "--model.reward.measures_correctness=false")
    assert result.code == 0 and "Error:" not in result.out and "Warning: your reward" not in result.out
    assert re.fullmatch(r"0\.\d+ on average of 16 completions", values(result.out)["reward"]), "no accuracy"
    assert values(result.out)["reference"].startswith("0 of 24 reference answers are paid")
    assert "Note: your reward gives the reference answer 0 in" in result.out
    result = doctor(folder, *function(folder, "style"))
    assert result.code == 0 and "Error:" not in result.out, "a graded reward has paid"
    result = doctor(folder, *function(folder, "minus_length"))
    assert result.code == 0 and "correct these rows" not in result.out and "it does not check the answer" in result.out


def test_a_best_checkpoint_by_accuracy_is_one_by_reward_where_nothing_measures_it(folder):
    reward = [*function(folder, "style"), "--model.reward.measures_correctness=false"]
    steps = ["--trainer.max_steps=2", "--trainer.logger.init_args.name=style"]
    for monitor in ("val/avg@2", "val/greedy_accuracy"):
        result = done(folder, "fit", "--config", "t.yaml", f"--checkpoint.monitor={monitor}", *steps, *reward)
        assert f"chosen by val/reward, since no part of the reward measures correctness, and there is no {monitor}" in result.out
    assert_refused(run(folder, "fit", "--config", "t.yaml", "--checkpoint.monitor=val/accuracy", *steps, *reward), "val/reward")


def test_a_minibatch_in_which_all_groups_are_equal_by_chance_is_not_an_error(folder):
    result = doctor(folder, "--model.reward=FunctionReward", f"--model.reward.function={folder}/my_parts.py:late")
    assert result.code == 0 and values(result.out)["trial step"] == "not possible without a gradient", result.err
    assert values(result.out)["reward"].startswith("0.25 ") and "Error:" not in result.out


def test_episodes_are_shown_by_their_messages(folder):
    acting = ["--model.environment=my_parts.Talk", "--model.turn_template={content}", "--model.reward=null"]
    result = doctor(folder, *acting, "--model.episodes.max_tokens=64")
    assert result.code == 0, result.err
    assert re.search(r"^  -> assistant: .*\n     user: n\d", result.out, re.MULTILINE)
    assert re.search(r"\d turns?; paid", result.out)
    assert values(result.out)["reference"].startswith("not applicable: the reward of an episode")


def test_an_environment_that_fails_ends_with_its_error_alone(folder, recwarn):
    acting = ["--model.environment=my_parts.Broken", "--model.turn_template={content}", "--model.reward=null"]
    result = doctor(folder, *acting, "--model.episodes.max_tokens=64")
    assert_refused(result, r"the environment failed in .*: Broken\.start raised ValueError: no board \(my_parts\.py line")
    assert "Stopped" not in result.out + result.err and "fast_dev_run" not in result.out + result.err
    gc.collect()
    assert not [warning for warning in recwarn if "never awaited" in str(warning.message)]


def test_training_on_examples_is_refused_before_the_model_is_loaded(folder):
    result = run(folder, "doctor", "--config", "sft.yaml", "--model.model=nowhere")
    assert_refused(result, "doctor examines rollouts .* not of a SupervisedModule on a PromptDataModule; .*val/loss")


def test_the_doctor_changes_neither_the_trainer_nor_its_callbacks(model, sums, tmp_path, capsys):
    """Other objects make the trial step, so the same Trainer then trains a new policy as if nothing had been examined."""
    adapter, steps = build_adapter(), []
    trainer = build_trainer(tmp_path, adapter, max_steps=3)
    for schedule in (CosineSchedule(warmup_steps=3), None):
        torch.manual_seed(1)
        policy = build_policy(model, schedule=schedule)
        before = [*trainer.callbacks], adapter.planning, policy.optimization
        trainer.doctor(policy, build_data(sums))
        assert ([*trainer.callbacks], adapter.planning, policy.optimization) == before and adapter.plan is None
        steps.append(values(capsys.readouterr().out)["trial step"])
    assert steps[0] == steps[1], "at the full rates, whatever the schedule"
    trainer.fit(build_policy(model), datamodule=build_data(sums))
    assert trainer.global_step == 3 and "TailEnergy" in adapter.plan.scorer["class_path"]
