"""The shape of axolotl 0.19.0: axolotl/integrations/{base,config}.py, core/builders/rl.py,
core/training_args_base.py, core/trainers/mixins and utils/dict.py.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field

from tests.standins import module


class BasePlugin:
    def register(self, cfg):
        pass

    def on_config_validation_error(self, cfg):
        pass

    def get_input_args(self):
        pass

    def pre_model_load(self, cfg):
        pass

    def post_trainer_create(self, cfg, trainer):
        pass

    def post_train_unload(self, cfg):
        pass


class PluginManager:
    _instance = None

    def __init__(self):
        self.plugins, self.cfg = {}, None

    @staticmethod
    def get_instance():
        if PluginManager._instance is None:
            PluginManager._instance = PluginManager()
        return PluginManager._instance

    def register(self, plugin_name):
        name, _, cls = plugin_name.rpartition(".")
        self.plugins[plugin_name] = getattr(importlib.import_module(name), cls)()

    def get_input_args(self):
        return [x for x in (p.get_input_args() for p in self.plugins.values()) if x]

    def get_trainer_cls(self, cfg):
        return None

    def pre_model_load(self, cfg):
        for plugin in self.plugins.values():
            plugin.pre_model_load(cfg)

    def post_trainer_create(self, cfg, trainer):
        for plugin in self.plugins.values():
            plugin.post_trainer_create(cfg, trainer)

    def post_train_unload(self, cfg):
        for plugin in self.plugins.values():
            plugin.post_train_unload(cfg)


class DictDefault(dict):
    """A dictionary whose missing entries are None, also as attributes."""

    def __getattr__(self, name):
        return self.get(name)


class HFRLTrainerBuilder:
    """Only the choice of the class; the arguments of the call are those of `build`."""

    def _get_trainer_cls(self, trainer_kwargs):
        name, _, cls = self.cfg.trainer_cls.rpartition(".")
        return getattr(importlib.import_module(name), cls), [self.model, self.model_ref]


@dataclass
class AxolotlTrainingMixins:
    sample_packing: bool = field(default=False)
    lr_groups: list | None = field(default=None)


def modules():
    from transformers import Trainer, TrainingArguments

    @dataclass
    class AxolotlDPOConfig(AxolotlTrainingMixins, TrainingArguments):
        beta: float = 0.1
        max_length: int = 1024

    mixins = {
        name: type(name, (Trainer,), {})
        for name in ("RngLoaderMixin", "SchedulerMixin", "OptimizerMixin")
    }
    optimizer = {"OptimizerInitMixin": type("OptimizerInitMixin", (), {})}
    PluginManager._instance = None
    base = module("axolotl.integrations.base", BasePlugin=BasePlugin, PluginManager=PluginManager)
    return {
        "axolotl": module("axolotl", __version__="0.19.0"),
        "axolotl.integrations.base": base,
        "axolotl.utils.dict": module("axolotl.utils.dict", DictDefault=DictDefault),
        "axolotl.core.training_args_base": module(
            "axolotl.core.training_args_base", AxolotlTrainingMixins=AxolotlTrainingMixins
        ),
        "axolotl.core.trainers.mixins": module("axolotl.core.trainers.mixins", **mixins),
        "axolotl.core.trainers.mixins.optimizer": module(
            "axolotl.core.trainers.mixins.optimizer", **optimizer
        ),
        "axolotl.core.trainers.dpo.args": module(
            "axolotl.core.trainers.dpo.args", AxolotlDPOConfig=AxolotlDPOConfig
        ),
        "axolotl.core.builders.rl": module(
            "axolotl.core.builders.rl", HFRLTrainerBuilder=HFRLTrainerBuilder
        ),
    }
