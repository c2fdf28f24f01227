"""What the screen shows of a rollout, and what TensorBoard shows of a run, read back from its event file."""

import html
import io
import json
import re
import warnings
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import rich
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from rich.cells import cell_len
from rich.console import Console
from tensorboard import plugin_util
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata, plugin_data_pb2
from tiny_runs import DigitShare, StartsWithDigit, build_adapter, build_data, build_trainer, fit

from hybrid_lightning.callbacks import RewardDivergence, RolloutProgress, RolloutSamples, RunSummary, StepTimer
from hybrid_lightning.callbacks.display import progress_bar
from hybrid_lightning.callbacks.rollouts import say_completions
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.losses import GRPOLoss
from hybrid_lightning.policy import LinearSchedule
from hybrid_lightning.rewards import WeightedSum
from hybrid_lightning.rollout.batching import pad_left, pad_right
from hybrid_lightning.types import Completion, Prompt, Rewards, Rollouts, Sequences

# Some of each kind; that all that are documented are there is seen with the documentation.
SCALARS = {"reward", "solve_rate/mixed", "rewards/digit_share/mean", "completions/mean_length", "loss", "kl", "lr/full"}
SCALARS |= {"sampling/logp_difference/max", "grad_norm/lora", "time/step_s", "throughput/tokens_per_second", "val/avg@2"}


class Events:
    """The event file of a run."""

    def __init__(self, folder):
        self.events = EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0, "histograms": 0}).Reload()

    def scalar(self, name):
        return {event.step: event.value for event in self.events.Scalars(name)}

    def text(self, name):
        return {event.step: event.tensor_proto.string_val[0].decode() for event in self.events.Tensors(f"{name}/text_summary")}


@pytest.fixture(scope="module")
def run(model, sums, tmp_path_factory):
    """What TensorBoard has of a run, and its folder."""
    root = tmp_path_factory.mktemp("rollouts")
    train(model, sums, root)
    return Events(root / "run"), root / "run"


def train(model, sums, root, ckpt=None):
    policy = {"loss": GRPOLoss(kl_coef=0.01), "reward": WeightedSum([DigitShare(), StartsWithDigit()])}
    policy |= {"minibatches_per_rollout": 2, "schedule": LinearSchedule()}
    logger = TensorBoardLogger(root, name="", version="run", default_hp_metric=False)
    saver = ModelCheckpoint(filename="{step}", every_n_train_steps=1, save_top_k=-1)
    samples = RolloutSamples(2, prompts=3, completions=2)
    callbacks = (StepTimer(), RunSummary(), LearningRateMonitor("step"), build_adapter(), samples, saver)
    flags = {"max_steps": 6, "logger": logger, "log_every_n_steps": 1, "num_sanity_val_steps": -1, "enable_checkpointing": True}
    flags |= {"check_val_every_n_epoch": None, "val_check_interval": 4}
    data = build_data(sums, validation_fraction=0.4)
    return fit(model, sums, root, *callbacks, policy=policy, data=data, ckpt=ckpt, **flags)


def test_every_scalar_is_there_at_every_step_and_they_agree_with_each_other(run):
    log, _ = run
    for name in SCALARS:
        assert len(log.scalar(name)) == (3 if name.startswith("val/") else 6), name
    assert next(iter(log.scalar("val/avg@2"))) == 0, "the start policy is step 0"
    total = [log.scalar(f"rewards/{name}/mean") for name in ("digit_share", "starts_with_digit")]
    for step, reward in log.scalar("reward").items():
        assert reward == pytest.approx(total[0][step] + total[1][step], abs=1e-5)
    rates = [1e-3 * (1 - step / 6) for step in range(6)]
    assert list(log.scalar("lr/full").values()) == pytest.approx(rates)
    assert list(log.scalar("lr/lora").values()) == pytest.approx([10 * rate for rate in rates])
    assert log.scalar("kl")[0] == 0 < log.scalar("kl")[5] and log.scalar("ratio/mean")[0] == pytest.approx(1)
    assert 0 < log.scalar("entropy")[0] < 4 and log.scalar("grad_norm/full")[0] > 0


def test_every_second_rollout_has_a_page_and_a_histogram(run):
    log, _ = run
    pages = log.text("samples")
    assert list(pages) == [0, 4] == [event.step for event in log.events.Histograms("rewards/histogram")]
    assert log.events.Histograms("rewards/histogram")[0].histogram_value.num == 16
    lines = pages[4].splitlines()
    assert len(lines) == 2 + 3 * 2
    head = [cell.strip() for cell in lines[0].strip("|").split("|")]
    assert head == ["prompt", "answer", "completion", "correct", "reward", "digit_share", "starts_with_digit", "advantage"]
    assert all(line.count("|") == 9 for line in lines)


def test_the_page_of_hyper_parameters_has_the_arguments_and_as_results_accuracy_and_reward(run):
    log, folder = run

    def data_of(tag):
        return plugin_data_pb2.HParamsPluginData.FromString(log.events.SummaryMetadata(tag).plugin_data.content)

    values = data_of(metadata.SESSION_START_INFO_TAG).session_start_info.hparams
    assert values["lr_lora"].number_value == 0.01 and values["loss/init_args/kl_coef"].number_value == 0.01
    assert values["loss/class_path"].string_value == "hybrid_lightning.losses.GRPOLoss"
    page = data_of(metadata.EXPERIMENT_TAG).experiment
    assert [info.name for info in page.hparam_infos][:12] == [
        *("model", "loss", "adapter", "budget", "rank", "alpha", "lr_lora", "lr_full"),
        *("prompts_per_rollout", "samples_per_prompt", "minibatches_per_rollout", "max_new_tokens"),
    ]
    assert values["adapter"].string_value == "Hybrid-LoRA" and values["budget"].string_value == "ModuleBudget(share=0.2)"
    assert [info.name.tag for info in page.metric_infos] == ["summary/accuracy_before", "summary/accuracy_after", "reward"]
    summary = json.loads((folder / "summary.json").read_text())
    assert log.scalar("summary/accuracy_before") == {0: pytest.approx(summary["accuracy_before"])}
    assert log.scalar("summary/accuracy_after") == {6: pytest.approx(summary["accuracy_after"])}


def test_completions_fit_a_narrow_screen_and_stay_out_of_notebooks(monkeypatch):
    asked = Prompt(messages=({"role": "user", "content": "an introduction, and then\n\tthe question"},))
    said = (Completion("steps\x1b[2J, 数数数数 and 42", 9, True), Completion("", 0, True))
    greedy = (
        SimpleNamespace(prompts=(asked, Prompt(text="1+1=")), completions=said),
        SimpleNamespace(total=torch.tensor([1.0, 0.0])),
    )
    for notebook in (False, True):
        screen = Console(width=50, file=io.StringIO(), force_jupyter=notebook)
        monkeypatch.setattr(rich, "_console", screen)
        say_completions(SimpleNamespace(evaluation=SimpleNamespace(greedy=greedy)))
        lines = "" if notebook else "  ...the question -> ...数数数数 and 42 (reward 1)\n  1+1= -> (empty) (reward 0)\n"
        assert screen.file.getvalue() == lines and all(cell_len(line) <= 50 for line in lines.splitlines())


def test_pages_of_a_resumed_run_lie_on_those_of_the_whole(run, model, sums, tmp_path):
    log, folder = run
    resumed = train(model, sums, tmp_path, ckpt=folder / "checkpoints" / "step=1.ckpt")
    expected = {at: page for at, page in log.text("samples").items() if at >= 1}
    assert Events(tmp_path / "run").text("samples") == expected and resumed.trainer.global_step == 6


class Table(HTMLParser):
    """The cells of a table as text, as a reader sees them."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.rows, self.tags = [], set()
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "br":
            self.rows[-1][-1] += "\n"

    def handle_data(self, data):
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip("\n")


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
    """A page of completions of a prompt, of which the first is right and the others were cut."""
    count = len(texts)
    sequences = Sequences(*pad_left([[5]] * count, 0, "cpu"), *pad_right([[6]] * count, 0, "cpu"))
    first = torch.arange(count) == 0
    completions = tuple(Completion(text, 1, True) for text in texts)
    rollouts = Rollouts((prompt,), sequences, completions, torch.zeros(count, 1), first, count)
    values = torch.where(first, 1.0, 0.25)
    return RolloutSamples().page(rollouts, Rewards(values, {"match": values}, first), torch.where(first, 0.5, -0.5))


def test_a_page_shows_every_text_as_it_is():
    for text in NASTY:
        page = page_of(Prompt(text=text, answer=text), text, "")
        table = Table(plugin_util.markdown_to_safe_html(page))
        assert table.tags <= {"table", "thead", "tbody", "tr", "th", "td", "br", "em"}
        shown = re.sub(r"\n+", "\n", text.replace("\r", ""))
        cells = [[re.sub(r"\n+", "\n", cell) for cell in row] for row in table.rows if any(cell.strip() for cell in row)]
        assert cells[1] == [shown, shown, shown, "yes", "1", "+0.500"]
        assert cells[2] == [shown, shown, "(empty) (cut)", "no", "0.25", "-0.500"]
        assert html.unescape(page).count("\n") == page.count("\n") == 3


def test_a_chat_shows_its_last_message_and_long_prompts_their_end():
    messages = ({"role": "system", "content": "be brief"}, {"role": "user", "content": "x" * 400 + "2+2?"})
    row = Table(plugin_util.markdown_to_safe_html(page_of(Prompt(messages=messages), "4"))).rows[1]
    assert row[0].endswith("x2+2?") and len(row[0]) == 300 and "brief" not in row[0]


IMPOSSIBLE = [
    *((RolloutSamples, {name: 0}, rf"samples\.{name} must be at least 1, got 0") for name in ("prompts", "completions")),
    (RolloutSamples, {"every_n_rollouts": 0}, r"samples\.every_n_rollouts must be at least 1, got 0"),
    (RewardDivergence, {"window": 7}, r"divergence\.window must be an even number of at least 4, got 7"),
    (RewardDivergence, {"standard_errors": 0.0}, r"divergence\.standard_errors must be positive, got 0"),
]


def test_impossible_settings_are_refused():
    for kind, options, message in IMPOSSIBLE:
        with pytest.raises(ConfigError, match=message):
            kind(**options)


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
        pl_module.generation_listeners.append(lambda *state: self.on_token(trainer.progress_bar_callback, state))

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
    watch, policy = watched(model, sums, tmp_path, RunSummary(), max_steps=2)
    assert len(watch.generation) == 12
    for (running, decoded, total), (completed, of, visible), description in watch.generation:
        assert "Generating" in description and (completed, of) == (decoded, total)
        assert visible == (running > 0 and decoded < total)
    assert watch.metrics[0].keys() >= {"reward", "completions/mean_length"} and "v_num" not in watch.metrics[0]
    output = screen.file.getvalue()
    assert "reward: " in output and "completions/mean_length: " in output and "epoch 0" in output.lower()
    assert [listener for listener in policy.generation_listeners if "RolloutProgress" in str(listener)] == [], "after the run"


def test_the_bar_ends_where_the_run_does(model, sums, tmp_path, screen):
    watch, _ = watched(model, sums, tmp_path, max_steps=3, accumulate_grad_batches=2)
    assert watch.totals == [6] * 6
    watch, _ = watched(model, sums, tmp_path, max_steps=6)
    assert watch.totals == [4] * 4 + [2] * 2


def test_scoring_shows_its_bars_only_where_bars_are_wanted(tmp_path, screen):
    for wanted in (False, True):
        with progress_bar(build_trainer(tmp_path, enable_progress_bar=wanted), "Scoring modules", None) as advance:
            advance(3, 8)
        assert ("Scoring modules" in screen.file.getvalue()) == wanted


def feed(callback, accuracies, left_out=False, **parts):
    """Give the callback one rollout of 100 completions for each accuracy; returns the messages of its warnings."""
    trainer, messages = SimpleNamespace(global_step=0), []
    for step, accuracy in enumerate(accuracies):
        correct = torch.arange(100) < 100 * accuracy
        values = {name: torch.full((100,), series[step]) for name, series in parts.items()}
        counted = torch.ones(100, dtype=torch.bool)
        if left_out:  # beside one that is left out
            correct, counted = (F.pad(value, (0, 1), value=end) for value, end in ((correct, True), (counted, False)))
            values = {name: F.pad(value, (0, 1), value=torch.nan) for name, value in values.items()}
        rollout = (None, Rewards(correct.float(), {"match": correct.float(), **values}, correct, counted=counted), None)
        trainer.global_step = step
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):  # every micro-batch of a rollout brings the same one
                callback.on_train_batch_start(trainer, SimpleNamespace(last_rollout=rollout), None, 0)
        messages += [str(warning.message) for warning in caught]
    return messages


def series(start, end, count=20, noise=0.02, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [start + (end - start) * i / (count - 1) + noise * float(torch.randn((), generator=generator)) for i in range(count)]


def test_each_part_is_warned_of_on_its_own():
    up = series(0.1, 0.9, 40, seed=1)
    rose = {"ended": up, "flat": series(0.5, 0.5, 40, seed=2), "other": up}
    fell = "rose while the share of correct completions fell over the last 20 rollouts (step "
    for left_out in (False, True):
        messages = feed(RewardDivergence(20), series(0.5, 0.1, 40), left_out, **rose)
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
