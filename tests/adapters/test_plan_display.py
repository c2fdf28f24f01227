import dataclasses
import io
import itertools

import matplotlib
import numpy as np
import pytest
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm
from rich.console import Console

from hybrid_lightning.adapters import AdapterPlan, LoraSettings, PlannedModule
from hybrid_lightning.adapters.plan_display import FRAME_COLOR, VALUES_UP_TO, draw_heatmap, plan_rows, plan_table, plan_title

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
    color = matplotlib.colors.to_rgba(FRAME_COLOR)
    return [(int(patch.get_x()), int(patch.get_y())) for patch in figure.axes[0].patches if patch.get_edgecolor() == color]


def labels(ticks) -> list[str]:
    return [label.get_text() for label in ticks]


@pytest.mark.parametrize("count", [2, 30])
def test_every_module_stands_in_its_cell_and_no_global_state_is_left(count):
    before = dict(matplotlib.rcParams)
    figure = draw_heatmap(plan_of(layers(count)))
    figure.savefig(io.BytesIO(), format="png")
    assert dict(matplotlib.rcParams) == before
    axes = figure.axes[0]
    np.testing.assert_array_equal(mesh(figure).get_array(), np.arange(1, 3 * count + 1.0).reshape(count, 3).T)
    assert labels(axes.get_yticklabels()) == KINDS and axes.get_xticklabels()[1].get_text() == "1"
    assert frames(figure) == [(0, 0), (0, 1)] and bool(axes.texts) == (3 * count <= VALUES_UP_TO)
    boxes = [label.get_window_extent(figure.canvas.get_renderer()) for label in axes.get_xticklabels()]
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))


def test_layers_are_ordered_and_second_stacks_and_modules_outside_stand_apart_and_wide_spans_are_logarithmic():
    axes = draw_heatmap(plan_of(["encoder.layers.0.fc", "decoder.layers.0.fc", "project"])).axes[0]
    assert labels(axes.get_yticklabels()) == ["encoder.layers: fc", "decoder.layers: fc", "project"]
    assert labels(axes.get_xticklabels()) == ["0", "other"]
    np.testing.assert_array_equal(mesh(draw_heatmap(plan_of([f"h.{n}.fc" for n in (10, 2, 0)]))).get_array(), [[3, 2, 1]])
    wide = mesh(draw_heatmap(plan_of(layers(2), lambda index: 0.0 if index == 0 else 10.0**-index))).norm
    assert isinstance(wide, LogNorm) and wide.vmin == pytest.approx(1e-5) and float(wide(0.0)) == 0
    narrow = mesh(draw_heatmap(plan_of(layers(2), lambda index: -1.0 + index))).norm
    assert not isinstance(narrow, LogNorm) and narrow.vmin == -1
    assert mesh(draw_heatmap(plan_of(layers(2), lambda _: None))).get_array().mask.all(), "without scores, all modules are grey"


# ---- tables


def test_tables_list_all_modules_by_score_and_ranks_that_differ_or_the_full_ones_and_the_next_few(make_model, plan_for):
    plan = plan_for(make_model("qwen2"))
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(plan_table(plan))
    text = console.export_text()
    names = [m.name for m in sorted(plan.candidates, key=lambda m: -m.score)]
    places = [text.index(f"{name} ") for name in names]
    assert places == sorted(places) and "3 fully trained, 11 with LoRA of rank 4" in text
    assert [row[0] for row in plan_rows(plan)[1]] == names
    full = set(plan.full_modules)
    others = [name for name in names if name not in full][:2]
    assert list(plan_table(plan, 2).columns[0].cells) == [name for name in names if name in full or name in others]
    first, *others = plan.candidates
    plan = dataclasses.replace(plan, candidates=(dataclasses.replace(first, mode="lora", rank=1), *others))
    assert "LoRA of ranks 1 to 4" in plan_title(plan) and "lora, rank 1" in {row[-1] for row in plan_rows(plan)[1]}
    everything = plan_of([f"h.{layer}.fc" for layer in range(42)], full=42)
    assert plan_table(everything, 10).row_count == 30 and plan_table(everything).row_count == 42
