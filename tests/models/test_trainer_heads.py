"""The head probe: what it accepts is right, what it does not understand goes through logits."""

import logging

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")

from sppo_kernels.models.head import find_head
from sppo_kernels.models.probe import probe_head
from sppo_kernels.trainer import HeadProbeError
from sppo_kernels.trainer.forward import probe
from tests.trainer_models import FAMILIES, build, rows

SETTINGS = {"eta": 5.0, "units": "log_ratio", "memory_budget": None, "impl": "auto"}


def run_probe(model, data, head="auto", packing="auto"):
    return probe(
        model,
        data,
        head=head,
        packing_mode=packing,
        device=torch.device("cpu"),
        settings=SETTINGS,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs_fused_and_packed(family, generator):
    model = build(family)
    forward, packed = run_probe(model, rows(generator, 2), head="fused", packing="shared")
    assert forward.fused
    assert packed


def test_what_the_probe_found_is_what_the_config_says():
    assert find_head(build("gemma2-softcap")).softcap == 2.0
    assert find_head(build("cohere-scale")).logit_scale == 0.25
    assert find_head(build("granite-divisor")).logit_scale == pytest.approx(1 / 8)
    assert find_head(build("phi-bias")).parameters()[1] is not None


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("gemma2-softcap", {"softcap": None}),
        ("cohere-scale", {"logit_scale": 1.0}),
        ("llama-untied", {"logit_scale": 1.01}),  # 1 % is far above rounding
    ],
)
def test_a_wrong_head_is_named(family, change, generator):
    model = build(family).eval()
    head = find_head(model)
    for name, value in change.items():
        setattr(head, name, value)
    ids = torch.randint(3, 211, (2, 9), generator=generator)
    with pytest.raises(HeadProbeError, match="logit_scale"):
        probe_head(model, head, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})


class Twisted(torch.nn.Linear):
    """A head that no config describes."""

    def forward(self, x):
        return super().forward(x) + x.sum(-1, keepdim=True) * torch.linspace(
            0, 1, self.out_features
        )


def test_an_unknown_head_goes_through_logits_with_the_reason_once(generator, caplog):
    model = build("llama-untied")
    twisted = Twisted(32, 211, bias=False)
    twisted.weight = model.lm_head.weight
    model.lm_head = twisted
    data = rows(generator, 2)
    with caplog.at_level(logging.WARNING, "sppo_kernels"):
        forward, _ = run_probe(model, data)
    assert not forward.fused
    assert sum("logits in" in r.message for r in caplog.records) == 1
    with pytest.raises(HeadProbeError, match="fused log-probability"):
        run_probe(model, data, head="fused")


def test_a_model_that_cannot_be_packed_is_padded(generator, caplog):
    model = build("llama-untied")
    layer = model.model.layers[0].self_attn
    plain = layer.forward
    # An attention that drops the layout: every response would see its siblings.
    layer.forward = lambda *a, sppo_layout=None, **k: plain(*a, **k)
    with caplog.at_level(logging.WARNING, "sppo_kernels"):
        _, packed = run_probe(model, rows(generator, 2))
    assert not packed
    assert "cannot be packed" in caplog.text
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(HeadProbeError, match="cannot be packed"):
        run_probe(model, rows(generator, 2), packing="shared")
