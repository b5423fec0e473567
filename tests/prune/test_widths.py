from __future__ import annotations

import pytest

from adaptc.errors import UnsupportedError, UsageError
from adaptc.prune.groups import architecture, couplings
from adaptc.prune.schedule import ratios
from adaptc.prune.widths import cubic, pruned_config, unit_size, widths

Shapes = dict[str, tuple[int, ...]]


def model(kind: str = "mistral", heads: int = 8, kv: int = 4, hidden: int = 32, ffn: int = 64) -> tuple[dict, Shapes]:
    d = hidden // heads
    plain = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv * d, hidden),
             "self_attn.v_proj": (kv * d, hidden), "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (ffn, hidden),
             "mlp.up_proj": (ffn, hidden), "mlp.down_proj": (hidden, ffn)}
    config = {"model_type": kind, "hidden_size": hidden, "num_hidden_layers": 2, "num_attention_heads": heads,
              "num_key_value_heads": kv, "intermediate_size": ffn}
    return config, {f"model.layers.{i}.{k}.weight": v for i in range(2) for k, v in plain.items()}


@pytest.mark.parametrize(("at", "ratio"), [(0.0, 0.0), (0.1, 0.0), (0.2, 0.165), (0.3, 0.289), (0.5, 0.4375),
                                           (0.7, 0.4922), (0.9, 0.5), (1.0, 0.5)])
def test_the_cubic_schedule_has_the_papers_points(at: float, ratio: float) -> None:
    assert cubic(at, 0.5) == pytest.approx(ratio, abs=1e-4)


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_a_schedule_rises_to_the_ratio(steps: int) -> None:
    found = ratios(0.4, steps)
    assert len(found) == steps
    assert found[-1] == pytest.approx(0.4)
    assert sorted(set(found)) == found
    assert found[0] > 0


@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.3, 0.5, 0.7])
def test_channels_make_up_for_coarse_heads(ratio: float) -> None:
    config, shapes = model()
    arch = architecture(config, shapes)
    groups = couplings(arch, shapes)
    keep = widths(arch, groups, shapes, ratio, multiple=1).units
    size = {g.kind: unit_size(g, shapes) for g in groups}
    whole = {g.kind: g.units for g in groups}
    gone = sum(size[k] * (whole[k] - keep[k]) for k in size) / sum(size[k] * whole[k] for k in size)
    assert gone == pytest.approx(ratio, abs=0.5 * size["ffn"] / sum(size[k] * whole[k] for k in size) + 1e-12)
    assert whole["heads"] - keep["heads"] == int(4 * ratio)


def test_channels_stay_a_multiple() -> None:
    config, shapes = model()
    arch = architecture(config, shapes)
    assert widths(arch, couplings(arch, shapes), shapes, 0.3, multiple=8).units["ffn"] % 8 == 0
    config, shapes = model(ffn=60)
    arch = architecture(config, shapes)
    keep = widths(arch, couplings(arch, shapes), shapes, 0.3, multiple=8).units["ffn"]
    assert keep % 4 == 0


def test_llama_keeps_heads_that_divide_its_width() -> None:
    config, shapes = model("llama")
    arch = architecture(config, shapes)
    groups = couplings(arch, shapes)
    assert widths(arch, groups, shapes, 0.3).units["heads"] == 4  # 3 would make 6 heads of a width of 32
    assert widths(arch, groups, shapes, 0.3, masked=True).units["heads"] == 3
    assert widths(arch, groups, shapes, 0.5).units["heads"] == 2


def test_something_always_stays() -> None:
    config, shapes = model()
    arch = architecture(config, shapes)
    keep = widths(arch, couplings(arch, shapes), shapes, 0.999, multiple=1).units
    assert keep["heads"] == 1
    assert keep["ffn"] >= 1


def test_one_kind_can_stay_whole() -> None:
    config, shapes = model()
    arch = architecture(config, shapes)
    groups = couplings(arch, shapes)
    assert widths(arch, groups, shapes, 0.5, heads=False).units == {"heads": 4, "ffn": 32}
    assert widths(arch, groups, shapes, 0.5, ffn=False).units == {"heads": 2, "ffn": 64}
    with pytest.raises(UsageError, match="removes none of 4 head units"):
        widths(arch, groups, shapes, 0.2, ffn=False)


def test_the_config_says_the_new_widths() -> None:
    config, shapes = model()
    arch = architecture(config, shapes)
    whole, single = couplings(arch, shapes)[0], couplings(arch, shapes, "query")[0]
    made = pruned_config(config, arch, whole, {"heads": 3, "ffn": 40})
    assert (made["num_attention_heads"], made["num_key_value_heads"], made["head_dim"]) == (6, 3, 4)
    assert made["intermediate_size"] == 40
    made = pruned_config(config, arch, single, {"heads": 4, "ffn": 64})
    assert (made["num_attention_heads"], made["num_key_value_heads"]) == (4, 4)


def test_heads_without_a_size_of_their_own_are_refused() -> None:
    names = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
    shapes: Shapes = {f"bert.encoder.layer.0.{n}.weight": (8, 8) for n in names}
    shapes |= {"bert.encoder.layer.0.intermediate.dense.weight": (16, 8), "bert.encoder.layer.0.output.dense.weight":
               (8, 16)}
    config = {"model_type": "bert", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
              "intermediate_size": 16}
    arch = architecture(config, shapes)
    groups = couplings(arch, shapes)
    with pytest.raises(UnsupportedError, match="a bert config has no head size of its own"):
        widths(arch, groups, shapes, 0.5, ffn=False)
    keep = widths(arch, groups, shapes, 0.5)
    assert keep.units == {"heads": 2, "ffn": 8}
    assert "heads stay" in keep.notes[0]
