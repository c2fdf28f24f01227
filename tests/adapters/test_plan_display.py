import dataclasses
import io
import itertools

import matplotlib
import numpy as np
import pytest
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm
from matplotlib.patches import Rectangle
from rich.console import Console

from hybrid_lightning.adapters import AdapterPlan, LoraSettings, PlannedModule
from hybrid_lightning.adapters.plan_display import FRAME_COLOR, VALUES_UP_TO, draw_heatmap, plan_markdown, plan_table, plan_title

KINDS = ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"]


def plan_of(names, score=lambda index: float(index + 1), full=2) -> AdapterPlan:
    modes = ["full" if index < full else "lora" for index in range(len(names))]
    modules = tuple(PlannedModule(name, (8, 8), 64, score(i), modes[i]) for i, name in enumerate(names))
    scorer = {"class_path": "a.b.TailEnergy", "init_args": {}}
    return AdapterPlan("tiny", None, "0", modules, LoraSettings(), {}, scorer)


def layers(count: int) -> list[str]:
    return [f"model.layers.{layer}.{kind}" for layer in range(count) for kind in KINDS]


def mesh(figure) -> QuadMesh:
    (found,) = [child for child in figure.axes[0].get_children() if isinstance(child, QuadMesh)]
    return found


def frames(figure) -> list[tuple[int, int]]:
    patches = [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]
    color = matplotlib.colors.to_rgba(FRAME_COLOR)
    return [(int(p.get_x()), int(p.get_y())) for p in patches if p.get_edgecolor() == color]


@pytest.mark.parametrize("count", [2, 30])
def test_every_module_stands_in_its_cell(count):
    figure = draw_heatmap(plan_of(layers(count)))
    values = mesh(figure).get_array()
    assert values.shape == (3, count)
    np.testing.assert_array_equal(values, np.arange(1, 3 * count + 1.0).reshape(count, 3).T)
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == KINDS
    assert axes.get_xticklabels()[1].get_text() == "1"
    assert frames(figure) == [(0, 0), (0, 1)]
    assert bool(axes.texts) == (3 * count <= VALUES_UP_TO)


def test_wide_spans_are_logarithmic_and_zeros_are_drawn():
    wide = mesh(draw_heatmap(plan_of(layers(2), lambda index: 0.0 if index == 0 else 10.0**-index)))
    assert isinstance(wide.norm, LogNorm) and wide.norm.vmin == pytest.approx(1e-5)
    assert float(wide.norm(0.0)) == 0
    narrow = mesh(draw_heatmap(plan_of(layers(2), lambda index: -1.0 + index)))
    assert not isinstance(narrow.norm, LogNorm) and narrow.norm.vmin == -1


def test_layers_are_ordered_and_second_stacks_and_modules_outside_stand_apart():
    names = ["encoder.layers.0.fc", "decoder.layers.0.fc", "project"]
    figure = draw_heatmap(plan_of(names))
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["encoder.layers: fc", "decoder.layers: fc", "project"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "other"]
    figure = draw_heatmap(plan_of([f"h.{layer}.fc" for layer in (10, 2, 0)]))
    np.testing.assert_array_equal(mesh(figure).get_array(), [[3, 2, 1]])


@pytest.mark.parametrize(
    ("count", "score"),
    [(4, float), (72, float), (2, lambda _: None), (2, lambda _: 1.0), (2, lambda index: None if index else 2.0)],
    ids=["few", "many", "no scores", "equal scores", "one score"],
)
def test_the_picture_is_legible_and_leaves_no_global_state(count, score):
    before = dict(matplotlib.rcParams)
    figure = draw_heatmap(plan_of(layers(count), score))
    figure.savefig(io.BytesIO(), format="png")
    assert dict(matplotlib.rcParams) == before
    renderer = figure.canvas.get_renderer()
    assert 5 < figure.get_figwidth() <= 24
    boxes = [label.get_window_extent(renderer) for label in figure.axes[0].get_xticklabels()]
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))
    everything = figure.get_tightbbox(renderer)
    assert everything.x1 <= figure.get_figwidth() + 0.05 and everything.x0 >= -0.05


# ---- tables


@pytest.fixture
def plan(make_model, plan_for) -> AdapterPlan:
    return plan_for(make_model("qwen2"))


def test_tables_list_all_modules_by_score_and_ranks_that_differ(plan):
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(plan_table(plan))
    text = console.export_text()
    names = [m.name for m in sorted(plan.candidates, key=lambda m: -m.score)]
    for table in (text, plan_markdown(plan)):
        places = [table.index(f"{name} " if table is text else name) for name in names]
        assert places == sorted(places)
        assert "3 fully trained, 11 with LoRA of rank 4" in table
    assert f"| **{names[0]}** |" in plan_markdown(plan)
    first, *others = plan.candidates
    plan = dataclasses.replace(plan, candidates=(dataclasses.replace(first, mode="lora", rank=1), *others))
    assert "LoRA of ranks 1 to 4" in plan_title(plan) and "| lora, rank 1 |" in plan_markdown(plan)


def test_a_table_may_be_of_the_full_modules_and_the_next_few(plan):
    by_score = [m.name for m in sorted(plan.candidates, key=lambda m: -m.score)]
    (names, *_), full = plan_table(plan, 2).columns, set(plan.full_modules)
    others = [name for name in by_score if name not in full][:2]
    assert list(names.cells) == [name for name in by_score if name in full or name in others]
    everything = plan_of([f"h.{layer}.fc" for layer in range(42)], full=42)
    assert plan_table(everything, 10).row_count == 30 and plan_table(everything).row_count == 42
