"""The axolotl plugin and trainer class, on axolotl where it is importable and on a stand-in."""

from __future__ import annotations

import copy
import importlib
import inspect
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("pydantic")

from sppo_kernels.integrations._swap import IntegrationError
from sppo_kernels.trainer import SPPOConfig, SPPOTrainer
from tests import standins
from tests.standins import axolotl as standin
from tests.trainer_models import build

PLUGIN = "sppo_kernels.integrations.axolotl.SPPOPlugin"
OURS = ("sppo_kernels.integrations.axolotl", "sppo_kernels.integrations._axolotl_trainer")


def forget():
    for name in OURS:
        sys.modules.pop(name, None)


@pytest.fixture(params=standins.KINDS)
def axolotl(request, monkeypatch):
    standins.use(request.param, standin.modules(), monkeypatch)
    forget()
    manager = importlib.import_module("axolotl.integrations.base").PluginManager
    manager.get_instance().plugins.clear()
    yield importlib.import_module
    manager.get_instance().plugins.clear()
    manager.get_instance().cfg = None
    forget()


def loaded(axolotl, **yaml):
    """A configuration as axolotl's cli/config.py takes it up: plugins registered, then known."""
    cfg = axolotl("axolotl.utils.dict").DictDefault({"plugins": [PLUGIN], "rl": "dpo", **yaml})
    manager = axolotl("axolotl.integrations.base").PluginManager.get_instance()
    for name in cfg["plugins"]:
        manager.register(name)
    for plugin in manager.plugins.values():
        plugin.register(cfg)
    manager.cfg = cfg
    return cfg, manager


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    vocab |= {chr(97 + i): 4 + i for i in range(26)}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        unk_token="<unk>",
    )  # fmt: skip


def data(generator, soft=True):
    """Rows as axolotl hands them to a DPO trainer; half of the prompts have a BOS in their text."""

    def words(n):
        return " ".join(chr(97 + int(i)) for i in torch.randint(0, 26, (n,), generator=generator))

    rows = []
    for i in range(6):
        row = {"prompt": ("<s> " if i % 2 else "") + words(3 + i), "chosen": words(4)}
        row["rejected"] = words(2 + i)
        if soft:
            win, lose = torch.rand(2, generator=generator).tolist()
            row |= {"chosen_probs_win": win, "chosen_probs_lose": lose}
        rows.append(row)
    return rows


def arguments(axolotl, tmp_path, **more):
    cls = axolotl("axolotl.core.trainers.dpo.args").AxolotlDPOConfig
    common = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", "max_steps": 3,
              "per_device_train_batch_size": 2, "learning_rate": 1e-2, "disable_tqdm": True,
              "save_strategy": "no", "logging_steps": 1, "seed": 7, "bf16": False}  # fmt: skip
    return cls(**common, max_length=64, **more), common


def built(axolotl, cfg, model, args, rows, **kwargs):
    """What axolotl's RL builder does with the configuration, from its own choice of the class."""
    from datasets import Dataset

    builder = object.__new__(axolotl("axolotl.core.builders.rl").HFRLTrainerBuilder)
    builder.cfg, builder.model = cfg, model
    builder.model_ref = None
    cls, positional = builder._get_trainer_cls({})
    assert "tokenizer" not in inspect.signature(cls).parameters  # else it is passed by that name
    return cls(
        *positional, args=args, train_dataset=Dataset.from_list(rows), callbacks=[], **kwargs
    )


@pytest.fixture
def rl(axolotl):
    """axolotl compares cfg.rl with members of its enumeration once it is validated."""
    try:
        enums = importlib.import_module("axolotl.utils.schemas.enums")
    except ImportError:
        return "dpo"
    return enums.RLType.DPO


@pytest.mark.parametrize("eta", [400.0, None])
def test_trains_as_our_trainer_does(axolotl, rl, generator, tmp_path, eta):
    """Three steps from the YAML's options; weights equal to SPPOTrainer's on the same rows."""
    options = {"packing": "padded", "loss_units": "win_rate"} | ({"eta": eta} if eta else {})
    cfg, manager = loaded(axolotl, sppo_kernels=options)
    cfg["rl"] = rl
    args, common = arguments(axolotl, tmp_path, beta=0.02)
    rows, model = data(generator), build("llama-untied")
    plain = copy.deepcopy(model)
    trainer = built(axolotl, cfg, model, args, rows, processing_class=tokenizer())
    manager.post_trainer_create(cfg, trainer)
    assert isinstance(trainer, SPPOTrainer) and trainer.args.eta == (eta or 50.0)
    assert trainer.args.max_length == 64
    assert all(ids.count(1) == 1 for ids in trainer.train_dataset["prompt_ids"])
    trainer.train()
    stripped = [{**row, "prompt": row["prompt"].removeprefix("<s> ")} for row in rows]
    settings = SPPOConfig(**common | {"output_dir": str(tmp_path / "plain")}, eta=eta or 50.0,
                          packing="padded", max_length=64)  # fmt: skip
    SPPOTrainer(plain, settings, stripped, processing_class=tokenizer()).train()
    for (name, value), other in zip(
        trainer.model.named_parameters(), plain.parameters(), strict=True
    ):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-5, msg=name)


def test_options_reach_the_schema(axolotl):
    """axolotl merges the class that get_input_args names into its own; a typo is an error."""
    from pydantic import ValidationError

    _, manager = loaded(axolotl, sppo_kernels={"eta": 1000})
    (path,) = manager.get_input_args()
    name, _, cls = path.rpartition(".")
    schema = getattr(importlib.import_module(name), cls)
    assert schema(sppo_kernels={"eta": 3}).sppo_kernels.eta == 3
    for wrong in ({"etta": 3}, {"eta": -1}, {"loss": "dpo"}):
        with pytest.raises(ValidationError):
            schema(sppo_kernels=wrong)
    assert schema().sppo_kernels is None


@pytest.mark.parametrize("axolotl", ["real"], indirect=True)  # a stand-in has no schema
def test_axolotl_merges_the_options_into_its_schema(axolotl):
    loaded(axolotl, sppo_kernels={"eta": 1000})
    merged = axolotl("axolotl.integrations.config").merge_input_args()
    assert all("sppo_kernels" in schema.model_fields for schema in merged)


def test_wrong_configurations_are_refused(axolotl, generator, tmp_path):
    with pytest.raises(ValueError, match=r"rl: expected dpo .*got 'grpo'"):
        loaded(axolotl, rl="grpo")
    with pytest.raises(ValueError, match=r"trainer_cls: expected none .*got 'my\.Trainer'"):
        loaded(axolotl, trainer_cls="my.Trainer")
    cfg, manager = loaded(axolotl)
    plugin = manager.plugins[PLUGIN]
    with pytest.raises(IntegrationError, match="expected AxolotlSPPOTrainer, axolotl built object"):
        manager.post_trainer_create(cfg, object())
    plugin.on_config_validation_error(cfg)
    assert cfg["trainer_cls"] is None
    ours = importlib.import_module(OURS[1])
    args, _ = arguments(axolotl, tmp_path)
    with pytest.raises(IntegrationError, match="pad_to_multiple_of: expected unset"):
        ours.AxolotlSPPOTrainer(build("llama-untied"), args=args, data_collator=lambda rows: rows)
    args.loss_type = ["ipo"]
    with pytest.raises(IntegrationError, match="dpo_loss_type: expected unset"):
        ours.AxolotlSPPOTrainer(build("llama-untied"), args=args)


def test_head_of_trl_only(axolotl, monkeypatch):
    """`loss: trl` leaves trainer_cls alone, patches before the model is loaded, unpatches after."""
    calls = []
    layout = SimpleNamespace(trainers="DPO, KTO, GRPO (1.14); AsyncGRPO")
    fake = ModuleType("sppo_kernels.integrations.trl")
    fake.patch = lambda: calls.append("patch") or layout
    fake.unpatch = lambda: calls.append("unpatch")
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    package = importlib.import_module("sppo_kernels.integrations")
    monkeypatch.setattr(package, "trl", fake, raising=False)
    cfg, manager = loaded(axolotl, sppo_kernels={"loss": "trl"})
    assert cfg.get("trainer_cls") is None and calls == []
    manager.pre_model_load(cfg)
    manager.pre_model_load(cfg)
    assert calls == ["patch"]
    manager.post_train_unload(cfg)
    manager.post_train_unload(cfg)
    assert calls == ["patch", "unpatch"]
    layout.trainers = "AsyncGRPO"
    with pytest.raises(IntegrationError, match=r"in its DPO trainer .*found it in AsyncGRPO only"):
        manager.pre_model_load(cfg)
    assert calls == ["patch", "unpatch"] * 2


@pytest.mark.parametrize("axolotl", ["standin"], indirect=True)
def test_head_of_the_installed_trl(axolotl):
    """The TRL of this environment is patched and restored; one whose DPO has no head is refused."""
    pytest.importorskip("trl")
    found = importlib.import_module("sppo_kernels.integrations.trl.versions").detect()
    before = dict(vars(found.utils))
    cfg, manager = loaded(axolotl, sppo_kernels={"loss": "trl"})
    if "DPO" in found.layout.trainers:
        manager.pre_model_load(cfg)
        now = vars(found.utils)
        assert any(now[name] is not value for name, value in before.items())
        manager.post_train_unload(cfg)
    else:
        with pytest.raises(IntegrationError, match="expected a fused head in its DPO trainer"):
            manager.pre_model_load(cfg)
    assert all(vars(found.utils)[name] is value for name, value in before.items())


@pytest.mark.parametrize("axolotl", ["standin"], indirect=True)
def test_unknown_layout_is_refused(axolotl, monkeypatch):
    base = axolotl("axolotl.integrations.base")
    monkeypatch.setattr(base.BasePlugin, "pre_model_load", lambda self: None)
    with pytest.raises(IntegrationError, match=r"expected .*pre_model_load\(self, cfg\).*0\.19\.0"):
        importlib.import_module(OURS[0])


def test_standin_has_the_shape_of_axolotl():
    base = pytest.importorskip("axolotl.integrations.base")
    for name in vars(standin.BasePlugin):
        if not name.startswith("_"):
            standins.same_shape(getattr(standin.BasePlugin, name), getattr(base.BasePlugin, name))
    for name in ("register", "get_trainer_cls", "pre_model_load", "post_trainer_create"):
        standins.same_shape(getattr(standin.PluginManager, name), getattr(base.PluginManager, name))
    mixins = importlib.import_module("axolotl.core.training_args_base").AxolotlTrainingMixins
    assert set(standin.AxolotlTrainingMixins.__dataclass_fields__) <= set(
        mixins.__dataclass_fields__
    )
