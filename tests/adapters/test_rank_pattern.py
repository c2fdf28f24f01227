import pytest
from tiny_models import FAMILIES, build_model

from hybrid_lightning.adapters.candidates import find_candidates
from hybrid_lightning.adapters.rank_pattern import module_group, ranks_by_pattern
from hybrid_lightning.errors import ConfigError, ModelError


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("transformer.h.3.attn.c_attn", "attention"),
        ("gpt_neox.layers.1.attention.query_key_value", "attention"),
        ("model.layers.0.linear_attn.in_proj_qkvz", "attention"),
        ("model.decoder.layers.2.fc1", "mlp"),
        ("model.layers.0.block_sparse_moe.gate", "mlp"),
        ("model.layers.0.feed_forward.w1", "mlp"),
        ("transformer.blocks.0.ffn.up_proj", "mlp"),
        ("backbone.layers.0.mixer.in_proj", None),
    ],
)
def test_groups_of_modules(name, group):
    assert module_group(name) == group


@pytest.mark.parametrize("family", FAMILIES)
def test_all_modules_of_all_families_have_a_group(family):
    groups = [module_group(name) for name in find_candidates(build_model(family))]
    assert set(groups) == {"attention", "mlp"}


def test_the_longest_name_decides():
    names = ["layers.0.self_attn.q_proj", "layers.0.mlp.up_proj", "layers.1.mlp.up_proj", "layers.1.mlp.down_proj", "layers.1.x"]
    pattern = {"1.mlp.up_proj": 2, "mlp": 8, "up_proj": 5, "attention": 0}
    expected = dict(zip(names, [0, 5, 2, 8, 16], strict=True))
    assert ranks_by_pattern(names, pattern, 16) == expected
    assert ranks_by_pattern(names, dict(reversed(pattern.items())), 16) == expected
    assert set(ranks_by_pattern(names, {}, 7).values()) == {7}


@pytest.mark.parametrize("rank", [-1, 1.5, True, "8"])
def test_impossible_ranks_are_refused(rank):
    with pytest.raises(ConfigError, match=r"rank_pattern: mlp=.* must be a whole number"):
        ranks_by_pattern(["layers.0.mlp.up_proj"], {"mlp": rank}, 4)


@pytest.mark.parametrize("key", ["_proj", "attention"])
def test_a_key_that_matches_nothing_is_refused(key):
    with pytest.raises(ModelError, match=rf"rank_pattern: '{key}' matches no candidate .*\(it has mlp\)"):
        ranks_by_pattern(["layers.0.mlp.up_proj", "layers.0.mlp.down_proj"], {"mlp": 2, key: 3}, 4)
