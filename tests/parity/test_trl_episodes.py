"""Whole steps on episodes with tools against TRL's trainer: the policy's turns are one script, all else is each trainer's own."""

import json
import re
from functools import cache

import pytest
import torch
from chat_templates import tokenizer_with
from long_cases import long_but
from rounding import LOGITS, additions_of, assert_same_sums, spread
from tiny_models import build_model
from tiny_runs import Log, build_policy, build_trainer
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from hybrid_lightning import losses
from hybrid_lightning.adapters import ModuleBudget
from hybrid_lightning.advantages import GroupAdvantage, GroupMeanAdvantage
from hybrid_lightning.callbacks import HybridAdapterSetup
from hybrid_lightning.data import ChatFormat, FileSource, PromptDataModule
from hybrid_lightning.environments import EpisodeLimits, ToolEnvironment, TRLEnvironment
from hybrid_lightning.rewards import RewardFunction
from hybrid_lightning.rollout import Sampler, sampler

pytest.importorskip("trl", reason="parity needs trl: pip install 'hybrid-lightning[test]'")
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

SAMPLES, TOKENS, TURNS = 4, 210, 3
STARTS = (5, 60)  # of two prompts
RATE = 0.05


class Account:
    """An environment of TRL's."""

    def reset(self, start, **row):
        self.sum = self.start = start

    def pay(self, amount: int) -> int:
        """Pay in.

        Args:
            amount: How much.
        """
        self.sum += amount
        return self.sum

    async def wait(self, hours: int) -> str:
        """Wait.

        Args:
            hours: How long.
        """
        return "z" * hours

    def get_reward(self):
        return (self.sum - self.start) / 10


def pay(amount: int) -> str:
    return f"paid {amount}"


async def wait(hours: int) -> str:
    return "z" * hours


TOOLS = [pay, wait]
pay.__doc__, wait.__doc__ = Account.pay.__doc__, Account.wait.__doc__


def turns_of(completions, **_):
    """TRL's reward where tools are functions."""
    return [float(sum(message["role"] == "assistant" for message in messages)) for messages in completions]


class Turns(RewardFunction):
    """The same here."""

    def __call__(self, completions, prompts):
        return [float(completion.episode.turns) for completion in completions]


def script(template, tokenizer):
    """Token ids of the policy's text in each turn of each episode, [B][turns]."""
    key, end = ("parameters", "<|eot_id|>") if template == "llama3_1" else ("arguments", "<|im_end|>")

    def call(name, **arguments):
        text = json.dumps({"name": name, key: arguments})
        return text if template == "llama3_1" else f"<tool_call>\n{text}\n</tool_call>"

    thought = "" if template == "llama3_1" else "<think>\n2\n</think>\n\n" + call("pay", amount=1) + "\n"  # and another call
    texts = [
        ["None." + end],
        [call("pay", amount=3) + end, "Now 3 more, \u00e9 <b>." + end],
        [thought + call("pay", amount=4) + end, call("wait", hours=2) + end, "Done." + end],
        # Calls in its last turn, too. There TRL calls nothing, and we do: `wait`, since it earns nothing.
        [call("pay", amount=2) + end, call("pay", amount=5) + end, call("wait", hours=1) + end],
        ["x" + call("wait", hours=1) + "x" * TOKENS],  # cut after a call, which TRL makes, though no answer fits
        [call("pay", amount=7) + end, "y" * TOKENS],  # cut in its second turn
        [call("wait", hours=TOKENS) + end],  # the tool's answer does not fit
        ["Nothing." + end],
    ]
    return [[tokenizer(text, add_special_tokens=False)["input_ids"] for text in turns] for turns in texts]


def run_trl(folder, root, said, starts, functions, options):
    """The inputs and results of two steps of TRL's trainer on one rollout."""
    found = {"losses": [], "gradients": []}

    class Noted(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            found["rollout"] = super()._generate_and_score_completions(inputs)
            return found["rollout"]

        def _compute_loss(self, model, inputs):
            loss = super()._compute_loss(model, inputs)
            found["losses"].append(loss.item())
            return loss

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **_):
            found["gradients"].append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("proj" in name)  # as with us
    sizes = {"max_steps": 2, "num_iterations": 2, "steps_per_generation": 1, "per_device_train_batch_size": len(said)}
    sizes |= {"num_generations": SAMPLES, "max_completion_length": TOKENS, "max_tool_calling_iterations": TURNS - 1}
    plain = {"learning_rate": RATE, "lr_scheduler_type": "constant", "optim": "sgd", "max_grad_norm": 0.0, "bf16": False}
    plain |= {"use_cpu": True, "shuffle_dataset": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    trainer = Noted(
        model,
        args=GRPOConfig(str(root), **sizes, **plain, **options),
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": f"Have {s}."}], "start": s} for s in starts]),
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=[Gradients()],
        **({"tools": TOOLS, "reward_funcs": turns_of} if functions else {"environment_factory": Account}),
    )
    turns = [0] * len(said)

    def generate(input_ids, attention_mask, generation_config, **_):
        contexts = [str(ids[real.bool()].tolist())[1:-1] for ids, real in zip(input_ids, attention_mask, strict=True)]
        rows = [row for row, own in enumerate(said) if turns[0] == 0 or any(str(own[0])[1:-1] in text for text in contexts)]
        made = torch.full((len(contexts), generation_config.max_new_tokens), trainer._tokenizer.pad_token_id)
        for place, row in zip(made, rows, strict=True):
            message = torch.tensor(said[row][turns[row]])[: len(place)]
            place[: len(message)] = message
            turns[row] += 1
        return torch.cat([input_ids, made], dim=1)

    model.generate = generate
    trainer.train()
    return found


class Played(sampler._ContinuedSession):
    """Returns the texts of a script; its decoding and its log-probabilities are ours."""

    def sample(self, asked):
        messages = {each.episode: self._engine.said[each.episode][each.number] for each in asked}
        order = range(len(self._engine.said)) if not asked[0].number else list(messages)  # the first batch has all episodes

        def choose(decoder, logits, rows, step):
            texts = [messages.get(order[row], [0]) for row in rows]
            token = torch.tensor([text[min(step, len(text) - 1)] for text in texts])
            return token, logits.log_softmax(-1).gather(1, token[:, None]).squeeze(1)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sampler._Decoder, "_choose", choose)
            return super().sample(asked)


class Scripted(Sampler):
    def session(self, *arguments):
        return Played(self, *arguments)


def run_ours(folder, root, said, environment, **options):
    """A policy after two steps on one rollout, and what was noted."""
    speaker, log = Scripted(TOKENS), Log()
    speaker.said = said
    episodes = EpisodeLimits(max_turns=TURNS, max_tokens=TOKENS, too_long="end")
    sizes = {"prompts_per_rollout": len(STARTS), "samples_per_prompt": SAMPLES, "epochs_per_rollout": 2}
    options |= {"sampler": speaker, "environment": environment, "episodes": episodes, **sizes}
    policy = build_policy(folder, lr_full=RATE, optimizer=torch.optim.SGD, **options)
    data = PromptDataModule(FileSource(str(folder / "rows.jsonl"), answer_column=None), ChatFormat())
    build_trainer(root, HybridAdapterSetup(ModuleBudget(1.0)), log).fit(policy, datamodule=data)
    return policy, log


# Chat template, loss, and TRL's settings of it.
DAPO = {"loss_type": "dapo", "epsilon_high": 0.28, "beta": 0.1, "use_bias_correction_kl": False}
GSPO = {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4}
WEIGHTED = {"kl_coef": 0.1, "kl_importance_weight": True}  # as TRL weighs a KL
CASES = [
    ("qwen3", losses.GRPOLoss(), {"loss_type": "grpo"}),
    ("qwen2_5", losses.DAPOLoss(kl_coef=0.1), DAPO),
    ("qwen3", losses.DrGRPOLoss(**WEIGHTED), {"loss_type": "dr_grpo", "scale_rewards": "none", "beta": 0.1}),
    ("llama3_1", losses.GSPOLoss(), GSPO),
]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """A tiny model with a chat template, and two prompts."""

    @cache
    def build(template):
        folder = tmp_path_factory.mktemp(template)
        tokenizer = tokenizer_with(template, "<|eot_id|>" if template == "llama3_1" else "<|im_end|>")
        tokenizer.pad_token = "<|endoftext|>"
        tokenizer.add_tokens(sorted(set(re.findall(r" {4}| ?[a-z_]{4,}", tokenizer.chat_template))))  # else prompts are long
        tokenizer.save_pretrained(folder)
        ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 2048}
        build_model("qwen3", std=0.1, **sizes, **ends).save_pretrained(folder)
        rows = [{"question": f"Have {start}.", "start": start} for start in STARTS]
        (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return folder

    return build


@pytest.mark.parametrize(("template", "loss", "options"), long_but(CASES, 3))
def test_rollout_loss_and_gradient_equal_trl(template, loss, options, folder_of, tmp_path):
    folder = folder_of(template)
    said = script(template, AutoTokenizer.from_pretrained(folder))
    functions = template == "llama3_1"
    environment = ToolEnvironment(TOOLS) if functions else TRLEnvironment(f"{__file__}:Account")
    advantage = GroupMeanAdvantage() if isinstance(loss, losses.DrGRPOLoss) else GroupAdvantage()
    parts = {"loss": loss, "advantage": advantage, "reward": Turns() if functions else None}
    # TRL replaces Qwen3's template, which drops thoughts, by one of its own.
    parts["chat_template"] = "keep_history" if template == "qwen3" else None
    policy, log = run_ours(folder, tmp_path, said, environment, **parts)
    rollouts = log.batches[-1].rollout
    starts = [prompt.columns["start"] for prompt in rollouts.prompts]
    theirs = run_trl(folder, tmp_path, said, starts, functions, options)

    rollout, sequences = theirs["rollout"], rollouts.sequences
    for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask"):
        assert torch.equal(getattr(sequences, name).long(), rollout[name]), name
    assert torch.equal(sequences.sampled_mask.long(), rollout["completion_mask"] * rollout["tool_mask"])
    ends = [completion.episode.end for completion in rollouts.completions]
    assert ends == ["answered"] * 3 + ["turns"] + ["tokens"] * 3 + ["answered"]
    assert_same_sums(rollouts.advantages.flatten(), rollout["advantages"], SAMPLES)

    tokens = int(sequences.completion_mask.sum() + sequences.prompt_mask.sum())
    of_logits = LOGITS * spread(additions_of(policy.model, sequences.prompt_ids.shape[1] + TOKENS))
    own = sequences.sampled_mask
    for logprobs in (rollouts.sampling_logprobs, log.batches[1].old_logprobs):
        torch.testing.assert_close(logprobs[own], rollout["old_per_token_logps"][own], atol=of_logits, rtol=0)
    torch.testing.assert_close(torch.tensor(log.losses), torch.tensor(theirs["losses"]), atol=spread(tokens), rtol=spread(tokens))
    for ours, gradients in zip(log.gradients, theirs["gradients"], strict=True):
        named = {name.replace(".modules_to_save.default", "").rpartition("model.model.")[2]: g for name, g in ours.items()}
        expected = {name.removeprefix("model."): gradient for name, gradient in gradients.items()}
        assert_same_sums(named, expected, additions_of(policy.model, tokens, backward=True))
    assert 0.1 < log.metrics[1]["clip_ratio/region_mean"] < 0.9
