"""What the screen shows of a rollout, and what TensorBoard shows of a run, read back from its event file."""

import html
import io
import json
import warnings
from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock
from xml.etree import ElementTree

import pytest
import rich
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from rich.cells import cell_len
from rich.console import Console
from tensorboard import plugin_util
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata, plugin_data_pb2
from tiny_runs import Failing, OftenDone, Talk, build_adapter, build_data, build_trainer, fit

from hybrid_lightning.callbacks import RewardDivergence, RolloutProgress, RolloutSamples, RunSummary, display
from hybrid_lightning.callbacks.display import progress_bar
from hybrid_lightning.callbacks.loggers import markdown_table
from hybrid_lightning.callbacks.prediction_writer import new_file
from hybrid_lightning.callbacks.rollouts import OncePerRollout, say_completions
from hybrid_lightning.environments import EpisodeLimits
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.rollout.batching import pad_left, pad_right
from hybrid_lightning.training.module import LanguageModule
from hybrid_lightning.types import Completion, Prompt, Rewards, Rollout, Sequences


def read(folder):
    """A run in TensorBoard, and its pages of samples."""
    log = EventAccumulator(str(folder), size_guidance={"tensors": 0, "histograms": 0}).Reload()
    return log, {event.step: event.tensor_proto.string_val[0].decode() for event in log.Tensors("samples/text_summary")}


def test_every_second_rollout_has_a_page_and_a_histogram_after_a_resume_too(finished, resumed):
    log, pages = read(finished.folder)
    histograms = log.Histograms("rewards/histogram")
    assert list(pages) == [0, 2, 4] == [event.step for event in histograms] and histograms[0].histogram_value.num == 16
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in pages[4].splitlines()]
    assert head == ["prompt", "answer", "completion", "finished", "correct", "reward", "advantage"]
    assert len(rows) == 3 * 2 and all(len(row) == len(head) for row in rows)
    assert read(resumed.folder)[1] == {2: pages[2], 4: pages[4]}


def test_the_page_of_hyper_parameters_has_the_arguments_and_as_results_accuracy_and_reward(finished):
    log, _ = read(finished.folder)

    def data_of(tag):
        return plugin_data_pb2.HParamsPluginData.FromString(log.SummaryMetadata(tag).plugin_data.content)

    values = data_of(metadata.SESSION_START_INFO_TAG).session_start_info.hparams
    assert values["lr_lora"].number_value == 0.1 and values["reward/class_path"].string_value.endswith("StartsWithDigit")
    page = data_of(metadata.EXPERIMENT_TAG).experiment
    assert [info.name for info in page.hparam_infos][:5] == ["model", "loss", "adapter", "budget", "rank"]
    assert values["adapter"].string_value == "Hybrid-LoRA" and values["budget"].string_value == "ModuleBudget(share=0.2)"
    assert [info.name.tag for info in page.metric_infos] == ["summary/accuracy_before", "summary/accuracy_after", "reward"]
    for when, step in (("before", 0), ("after", 6)):
        (event,) = log.Scalars(f"summary/accuracy_{when}")
        assert event.step == step and event.value == pytest.approx(finished.summary[f"accuracy_{when}"])


def test_completions_fit_a_narrow_screen_and_stay_out_of_notebooks(monkeypatch):
    asked = Prompt(messages=({"content": "be brief"}, {"content": "an introduction, and then\n\tthe question"}))
    said = (Completion("steps\x1b[2J, 数数数数 and 42", 9, True), Completion("", 0, True))
    total = torch.tensor([[1.0], [0.0]])
    rewards = Rewards(total, {}, total > 0, counted=total > 0)
    evaluation = SimpleNamespace(greedy=rollout_of((asked, Prompt(text="1+1=")), said, rewards))
    for notebook in (False, True):
        monkeypatch.setattr(rich, "_console", screen := Console(width=50, file=io.StringIO(), force_jupyter=notebook))
        say_completions(Mock(spec=LanguageModule, evaluation=evaluation))
        lines = "" if notebook else "  ...the question -> ...数数数数 and 42 (reward 1)\n  1+1= -> (empty) (left out)\n"
        assert screen.file.getvalue() == lines and all(cell_len(line) <= 50 for line in lines.splitlines())


def rollout_of(prompts, completions, rewards):
    """A rollout with these rewards, and advantages of 0.5 and -0.5."""
    count = len(completions)
    sequences = Sequences(*pad_left([[5]] * count, 0, "cpu"), *pad_right([[6]] * count, 0, "cpu"))
    advantages = torch.where(rewards.correct, 0.5, -0.5)
    return Rollout(prompts, completions, sequences, torch.zeros(count, 1), rewards=rewards, advantages=advantages)


def table_of(page):
    """The elements and the cells of a page as TensorBoard shows it."""
    shown = ElementTree.fromstring(plugin_util.markdown_to_safe_html(page).replace("<br>", "\n"))
    cells = [["".join(cell.itertext()) for cell in row] for row in shown.iter("tr")]
    return {element.tag for element in shown.iter()}, cells


NASTY = [
    "a|b||c",
    "1\n2\r\n\n3",
    "<b>bold</b> <script>alert(1)</script> &amp; &#124;",
    "3*4*5 **x** _y_ __z__ `code` ~~no~~",
    "[link](http://example.com) ![image](x.png) \\* \\| {x} # - + 1. ```",
    "</td></tr></table>",
    "$\\frac{1}{2}$ <think>",
]


def page_of(prompt, *texts):
    """A page of completions of a prompt: the first is right, the others were cut."""
    first = torch.arange(len(texts))[None] == 0
    completions = tuple(Completion(text, 1, number == 0) for number, text in enumerate(texts))
    values = torch.where(first, 1.0, 0.25)
    rewards = Rewards(values, {"match": values, "form": 2 * values}, first)
    return markdown_table(*RolloutSamples().table(rollout_of((prompt,), completions, rewards)))


def test_a_page_shows_every_text_as_it_is():
    for text in NASTY:
        page, shown = page_of(Prompt(text=text, answer=text), text, ""), text.replace("\r", "")
        elements, (head, *cells) = table_of(page)
        assert head == ["prompt", "answer", "completion", "finished", "correct", "reward", "match", "form", "advantage"]
        assert elements <= {"table", "thead", "tbody", "tr", "th", "td", "em"}
        assert cells[0] == [shown, shown, shown, "yes", "yes", "1", "1", "2", "0.5"]
        assert cells[1] == [shown, shown, "(empty)", "no", "no", "0.25", "0.25", "0.5", "-0.5"]
        assert html.unescape(page).count("\n") == page.count("\n") == 3


def test_pages_have_no_column_of_right_completions_where_nothing_measures_that():
    texts, values = (Completion("a", 1, True), Completion("b", 1, False)), torch.tensor([[1.0, 0.5]])
    for counted, marks in ((None, ["yes", "no"]), (torch.tensor([[True, False]]), ["yes", "left out"])):
        rewards = Rewards(values, {"style": values}, values >= 1, counted=counted, measures_correctness=False)
        columns, rows = RolloutSamples().table(rollout_of((Prompt(text="?"),), texts, rewards))
        assert columns == ["prompt", "answer", "completion", "finished", "reward", "advantage"]
        assert [row[3] for row in rows] == marks and [rewards.right(0, sample) for sample in (0, 1)] == [None, None]


def test_impossible_settings_are_refused():
    for kind, name, value, message in (
        (RolloutSamples, "prompts", 0, r"samples\.prompts must be at least 1, got 0"),
        (RewardDivergence, "window", 7, r"divergence\.window must be an even number of at least 4, got 7"),
        (RewardDivergence, "standard_errors", 0.0, r"divergence\.standard_errors must be positive, got 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            kind(**{name: value})


# ---- which rollout


class Looks(OncePerRollout):
    """Notes the step of each look, and what every micro-batch came with."""

    def __init__(self):
        self.steps, self.seen = [], []

    def on_rollout(self, trainer, batch):
        self.steps.append(trainer.global_step)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        rollout, rewards = batch.rollout, batch.rollout.rewards
        known = _tokens(rollout.sequences)
        assert all(row in known for row in _tokens(batch.sequences)), "its own rollout"
        assert float(rewards.total.mean()) == pytest.approx(batch.metrics["reward"])
        texts = [(prompt.text, *map(str, rollout.completions)) for prompt in rollout.prompts]
        self.seen.append((trainer.global_step, batch.rollout_number, texts, rewards.total.flatten().tolist()))


def _tokens(sequences):
    return [row[mask].tolist() for row, mask in zip(sequences.completion_ids, sequences.completion_mask, strict=True)]


@pytest.mark.filterwarnings("ignore:.*give --model.correction:UserWarning")
@pytest.mark.parametrize("ahead", [0, 1])
def test_callbacks_see_the_rollout_that_is_trained_on_once_whenever_it_was_made_and_after_a_resume(model, sums, tmp_path, ahead):
    whole, resumed, policy = Looks(), Looks(), {"rollouts_ahead": ahead, "minibatches_per_rollout": 2}
    saver, rows = (
        ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1),
        partial(RolloutSamples, write_rows=True),
    )
    fit(model, sums, tmp_path, whole, rows(), saver, policy=policy, max_steps=6, enable_checkpointing=True)
    fit(model, sums, tmp_path, resumed, rows(), policy=policy, max_steps=6, ckpt=tmp_path / "step=3.ckpt")
    assert whole.steps == [0, 2, 4] and resumed.steps == [4], "the rollout of the third step was seen before the stop"
    assert resumed.seen == whole.seen[3:] and [number for _, number, *_ in whole.seen] == [0, 0, 1, 1, 2, 2]
    rows, later = (written(tmp_path / f"version_{number}") for number in (0, 1))
    assert later == rows[32:], "rows written before the stop are not written again"
    for first, (step, number, ((_, *texts), *_), total) in zip((0, 16, 32), whole.seen[::2], strict=True):
        of_rollout = rows[first : first + 16]
        assert {(row["step"], row["rollout"]) for row in of_rollout} == {(step - 1, number)}
        assert [row["completion"] for row in of_rollout] == texts and [row["reward"] for row in of_rollout] == total
        assert [row["sample"] for row in of_rollout] == [0, 1, 2, 3] * 4 and any(row["advantage"] for row in of_rollout)


def written(folder, name="rollouts"):
    """The rows of rollouts that a run has written."""
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_rows_of_episodes_have_their_messages_and_what_is_left_out_no_rewards(model, sums, tmp_path):
    policy = {"environment": Talk(), "reward": None, "turn_template": "{content}", "sampler": OftenDone(5), "kind": Failing}
    policy |= {"episodes": EpisodeLimits(max_tokens=60)}
    fit(model, sums, tmp_path, RolloutSamples(write_rows=True), policy=policy, max_steps=1)
    rows = written(tmp_path / "version_0")
    assert len(rows) == 16 and [row["counted"] for row in rows] == [(row["index"] + row["sample"] % 4) % 4 > 0 for row in rows]
    for row in rows:
        said = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
        assert row["end"] and row["messages"][0]["content"] == row["prompt"] and row["completion"] == "\n".join(said)
        paid = (row["reward"], *row["reward_parts"].values(), row["correct"])
        assert paid == (None,) * 3 if not row["counted"] else paid[0] == paid[1] >= 0


def test_each_fit_and_each_process_has_a_file_of_rows_of_its_own(tmp_path):
    for rank, names in ((0, ["rollouts.rank0", "rollouts-v1.rank0"]), (1, ["rollouts.rank1"])):
        for name in names:
            path = new_file(tmp_path, "rollouts", SimpleNamespace(world_size=2, global_rank=rank))
            assert path.name == f"{name}.jsonl"
            path.touch()


# ---- on the screen


@pytest.fixture
def screen(monkeypatch):
    """A terminal that keeps what was written to it."""
    console = Console(file=io.StringIO(), force_terminal=True, width=200)
    monkeypatch.setattr(rich, "_console", console)
    monkeypatch.setattr("lightning.pytorch.callbacks.progress.rich_progress.reconfigure", lambda **_: None, raising=False)
    return console


class Watch(Callback):
    """Notes the bars at every micro-batch, and the generation bar at every token."""

    def __init__(self):
        self.totals, self.generation, self.metrics = [], [], []

    def on_train_start(self, trainer, pl_module):
        pl_module.run.listeners.append(lambda *state: self.on_token(trainer.progress_bar_callback, state))

    def on_token(self, bar, state):
        task = next(task for task in bar.progress.tasks if task.id == bar._generation_task)
        self.generation.append((state, (task.completed, task.total, task.visible), task.description))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        bar = trainer.progress_bar_callback
        (task,) = (task for task in bar.progress.tasks if task.id == bar.train_progress_bar_id)
        self.totals.append(task.total)
        self.metrics.append(bar.get_metrics(trainer, pl_module))


def watched(model, sums, root, *callbacks, **flags):
    watch, data = Watch(), build_data(sums, validation_fraction=0.25)
    flags = {"enable_progress_bar": True, "num_sanity_val_steps": -1, "limit_val_batches": 0, **flags}
    policy = fit(model, sums, root, RolloutProgress(), build_adapter(), *callbacks, watch, data=data, **flags)
    return watch, policy


def test_generation_has_a_bar_that_is_hidden_when_done_beside_reward_and_length(model, sums, tmp_path, screen):
    watch, policy = watched(model, sums, tmp_path, RunSummary(), max_steps=3, accumulate_grad_batches=2)
    assert watch.totals == [6] * 6 and len(watch.generation) == 18
    for (running, decoded, total), (completed, of, visible), description in watch.generation:
        assert "Generating" in description and (completed, of) == (decoded, total)
        assert visible == (running > 0 and decoded < total)
    assert watch.metrics[0].keys() >= {"reward", "tokens"} and "v_num" not in watch.metrics[0]
    output = screen.file.getvalue()
    assert "reward: " in output and "tokens: " in output and "epoch 0" in output.lower()
    assert [listener for listener in policy.run.listeners if "RolloutProgress" in str(listener)] == [], "after the run"


def test_the_bar_of_the_last_epoch_ends_where_the_run_does(model, sums, tmp_path, screen):
    assert watched(model, sums, tmp_path, max_steps=6)[0].totals == [4] * 4 + [2] * 2


def test_scoring_shows_its_bars_only_where_bars_are_wanted_and_in_a_file_a_line_a_minute(tmp_path, screen, monkeypatch):
    for wanted in (False, True):
        with progress_bar(build_trainer(tmp_path, enable_progress_bar=wanted), "Scoring modules", None) as advance:
            advance(3, 8)
        assert ("Scoring modules" in screen.file.getvalue()) == wanted
    seconds = iter([0.0, 30.0, 61.0, 61.0, 100.0])
    monkeypatch.setattr(display.time, "monotonic", lambda: next(seconds))
    log = Console(file=io.StringIO())
    monkeypatch.setattr(display, "console", lambda: log)
    with progress_bar(build_trainer(tmp_path), "Scoring modules", 8) as advance:
        for done in (1, 2, 3):
            advance(done, None)
    assert log.file.getvalue() == "Scoring modules ...\nScoring modules: 2/8\n"


def feed(callback, accuracies, weights=None, **parts):
    """Give the callback rollouts of these accuracies, of 100 completions and one that is left out; returns its warnings."""
    messages, counted = [], torch.arange(101) < 100
    for step, accuracy in enumerate(accuracies):
        correct = torch.arange(101) < 100 * accuracy
        values = {name: torch.full((101,), series[step]).where(counted, torch.nan) for name, series in parts.items()}
        parts_of = {"match": correct.float(), **values}
        rewards = Rewards(correct.float(), parts_of, correct | ~counted, weights or {}, counted)
        batch = SimpleNamespace(rollout=SimpleNamespace(rewards=rewards), rollout_number=step)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):  # every micro-batch of a rollout brings the same one
                callback.on_train_batch_start(SimpleNamespace(global_step=step), None, batch, 0)
        messages += [str(warning.message) for warning in caught]
    return messages


def series(start, end, count=20, noise=0.02, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [start + (end - start) * i / (count - 1) + noise * float(torch.randn((), generator=generator)) for i in range(count)]


def test_each_part_is_warned_of_on_its_own():
    up = series(0.1, 0.9, 40, seed=1)
    rose = {"ended": up, "flat": series(0.5, 0.5, 40, seed=2), "other": up}
    fell = "rose while the share of correct completions fell over the last 20 rollouts (step "
    unpaid = {"metric": 0.0, "penalty": -0.5}
    messages = feed(RewardDivergence(20), series(0.5, 0.1, 40), unpaid, **rose, metric=up, penalty=up)
    assert sorted(message.split()[0] for message in messages) == ["rewards/ended", "rewards/other"], "and once"
    assert all(fell in message and message.endswith("lower its weight or remove it") for message in messages)


OTHERS = {
    "both rise": (series(0.1, 0.5, 40), series(0.1, 0.9, 40, seed=1)),
    "both fall": (series(0.5, 0.1, 40), series(0.9, 0.1, 40, seed=1)),
    "no fall": (series(0.3, 0.3, 40), series(0.1, 0.9, 40, seed=1)),
    "constant": ([0.5] * 40, [0.5] * 40),
    "too short": (series(0.5, 0.1, 19), series(0.1, 0.9, 19, seed=1)),
}


def test_nothing_else_is_warned_of_and_changes_without_any_noise_count():
    for name, (accuracy, ended) in OTHERS.items():
        assert feed(RewardDivergence(20), accuracy, ended=ended) == [], name
    assert len(feed(RewardDivergence(4), [0.5, 0.5, 0.4, 0.4], ended=[0.0, 0.0, 1.0, 1.0])) == 1


def test_the_window_forgets_and_a_resumed_run_warns_where_the_whole_would(stop=25):
    accuracy, ended = series(0.5, 0.1, 40), series(0.1, 0.9, 40, seed=1)
    whole, before, resumed = (RewardDivergence(20) for _ in range(3))
    messages = feed(before, accuracy[:stop], ended=ended[:stop])
    resumed.load_state_dict(before.state_dict())
    messages += feed(resumed, accuracy[stop:], ended=ended[stop:])
    assert len(feed(whole, accuracy, ended=ended)) == len(messages) == 1
    assert resumed.diverging() == whole.diverging() == ["rewards/ended"]
    feed(whole, series(0.1, 0.1, 20), ended=series(0.9, 0.9, 20, seed=1))
    assert whole.diverging() == []
