"""patch() and unpatch() on TRL itself, and real TRL trainers with and without."""

import copy
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")
trl = pytest.importorskip("trl")

from trl.trainer import utils  # noqa: E402

from sppo_kernels.integrations.trl import (  # noqa: E402
    UnsupportedTRLError,
    patch,
    patched,
    unpatch,
    versions,
)
from sppo_kernels.integrations.trl.function import FusedLogProbs  # noqa: E402
from sppo_kernels.integrations.trl.patching import is_patched  # noqa: E402

NAMES = ("_ChunkedLogProbFunction", "add_fused_lm_head", "_use_triton")
STEPS = 20
WORDS = [f"w{i}" for i in range(90)]


@pytest.fixture(autouse=True)
def unpatched():
    """Every test starts and must end with TRL's own objects."""
    before = everything()
    yield
    assert not is_patched()
    after = everything()  # with more modules, when the test loaded some
    assert after | before == after
    assert set(after.values()) == set(before.values())


def everything() -> dict:
    """id of all that TRL's loaded modules bind under the names that are replaced."""
    return {
        (name, key): id(vars(module)[key])
        for name, module in list(sys.modules.items())
        if module is not None and name.split(".")[0] == "trl"
        for key in (*NAMES, "ChunkedLogProbFunction")
        if key in vars(module)
    }


def current() -> list:
    return [getattr(utils, name) for name in NAMES]


# --- in and out -----------------------------------------------------------------------------------


def test_patch_twice_unpatch_once_restores_the_same_objects():
    import trl.trainer.dpo_trainer as dpo

    before = [*current(), dpo.add_fused_lm_head]
    assert patch() is patch(impl="reference")
    inside = [*current(), dpo.add_fused_lm_head]
    assert not any(a is b for a, b in zip(before, inside, strict=True))
    assert isinstance(utils._ChunkedLogProbFunction, FusedLogProbs)
    assert utils._ChunkedLogProbFunction.settings.impl == "reference"
    assert dpo.add_fused_lm_head is utils.add_fused_lm_head
    # The switch is only replaced where the head reads it: TRL's own kernels keep theirs.
    assert sys.modules["trl.kernels.chunked_logprob"]._use_triton is before[2]
    unpatch()
    assert all(a is b for a, b in zip(before, [*current(), dpo.add_fused_lm_head], strict=True))
    unpatch()
    assert all(a is b for a, b in zip(before, [*current(), dpo.add_fused_lm_head], strict=True))


def test_a_module_loaded_while_patched_is_restored_too():
    before = utils.add_fused_lm_head
    patch()
    late = types.ModuleType("trl.trainer.late_trainer")
    late.add_fused_lm_head = utils.add_fused_lm_head  # what `from .utils import` does
    sys.modules[late.__name__] = late
    try:
        unpatch()
        assert late.add_fused_lm_head is before
    finally:
        del sys.modules[late.__name__]


def test_context_managers_nest_and_errors_restore():
    before = current()
    with patched(memory_budget=1 << 20) as layout:
        settings = utils._ChunkedLogProbFunction.settings
        with pytest.raises(KeyError), patched(impl="reference"):
            assert (settings.impl, settings.memory_budget) == ("reference", 2 << 30)
            raise KeyError
        assert is_patched() and (settings.impl, settings.memory_budget) == ("auto", 1 << 20)
        with patched():
            unpatch()
        assert is_patched()
        assert utils._ChunkedLogProbFunction.settings.memory_budget == 1 << 20
    assert all(a is b for a, b in zip(before, current(), strict=True))
    assert layout.versions[1] == "1.16.0"
    for name, value in (("memory_budget", -1), ("impl", "fast")):
        with pytest.raises(ValueError, match=name):
            patch(**{name: value})


def test_the_caller_s_defaults_do_not_reach_the_proof():
    torch.set_default_dtype(torch.bfloat16)
    try:
        with patched(impl="triton"):  # a choice for tensors that are elsewhere
            pass
    finally:
        torch.set_default_dtype(torch.float32)


# --- unknown layouts ------------------------------------------------------------------------------


class _Other(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk_size, new_option):
        raise NotImplementedError


def _hotter(*args):
    """TRL's function if a version meant the inverse by `temperature`."""
    args = list(args)
    args[4] = 1 / args[4]
    return TRL_FUNCTION.apply(*args)


TRL_FUNCTION = utils._ChunkedLogProbFunction


def _moved_use(logits):
    return utils._use_triton(logits)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("_ChunkedLogProbFunction", None, "absent"),
        ("_ChunkedLogProbFunction", _Other, "new_option"),
        (
            "_ChunkedLogProbFunction",
            types.SimpleNamespace(forward=TRL_FUNCTION.forward, apply=_hotter),
            "on a test problem",
        ),
        ("add_fused_lm_head", None, "add_fused_lm_head, which is absent"),
        ("add_fused_lm_head", lambda model, scale: None, "its parameters are"),
        ("add_fused_lm_head", lambda model, temperature: None, "look up"),
    ],
)
def test_an_unknown_layout_is_refused_and_nothing_changes(name, value, message, monkeypatch):
    monkeypatch.setattr(utils, name, value)
    before = current()
    with pytest.raises(UnsupportedTRLError, match=message) as caught:
        patch()
    assert trl.__version__ in str(caught.value)
    assert not is_patched() and all(a is b for a, b in zip(before, current(), strict=True))


def test_the_switch_must_have_no_other_reader(monkeypatch):
    code = "def another(device):\n    return _use_triton(device)\n"
    namespace = {"__name__": utils.__name__}
    exec(code, namespace)
    monkeypatch.setattr(utils, "another", namespace["another"], raising=False)
    with pytest.raises(UnsupportedTRLError, match="another"):
        patch()


@pytest.mark.parametrize("layout", versions.LAYOUTS[1:], ids=lambda layout: layout.versions[0])
def test_calls_of_older_layouts(layout, generator):
    """Older signatures, on TRL 1.16's function: the same numbers, log-probs and entropy."""
    parameters = [p if p != "hidden" else "last_hidden" for p in layout.parameters]
    space = {}
    exec(f"def forward(ctx, {', '.join(parameters)}): ...", space)
    found = versions.Found(
        "old", layout, utils, types.SimpleNamespace(forward=space["forward"]), None, None
    )
    from sppo_kernels.integrations.trl.function import Settings

    values = {
        "hidden": torch.randn(3, 4, generator=generator),
        "weight": torch.randn(9, 4, generator=generator),
        "bias": torch.randn(9, generator=generator) if "bias" in layout.parameters else None,
        "targets": torch.randint(9, (3,), generator=generator),
        "temperature": 0.8,
        "chunk_size": 4,
        "final_logit_softcapping": 2.0 if "final_logit_softcapping" in layout.parameters else None,
        "logit_scale": 1.2,
    }
    got = FusedLogProbs(found, Settings()).apply(*(values[p] for p in layout.parameters))
    expected = TRL_FUNCTION.apply(*values.values())
    assert len(got) == 2
    for a, b in zip(got, expected[:2], strict=True):
        torch.testing.assert_close(a, b)


OLDER = [
    folder for folder in os.environ.get("SPPO_KERNELS_OLD_TRL", "").split(os.pathsep) if folder
]


@pytest.mark.skipif(not OLDER, reason="SPPO_KERNELS_OLD_TRL names no folders with other TRLs")
@pytest.mark.parametrize("folder", OLDER)
def test_other_releases(folder):
    """Detected, proven against the release's own function by patch(), used, and restored.

    A folder is made by `pip install --no-deps --target FOLDER trl==1.14.2`.
    """
    code = """
import sys, trl
from packaging.version import Version
from trl.trainer import utils
from sppo_kernels.integrations.trl import patch, unpatch
original = utils._ChunkedLogProbFunction
layout = patch()
first, last = map(Version, layout.versions)
assert first <= Version(trl.__version__) <= last, (trl.__version__, layout)
import trl.trainer.dpo_trainer, trl.trainer.kto_trainer
names = [
    m for n, m in sys.modules.items() if n.startswith("trl.") and not n.startswith("trl.kernels")
]
assert not any(vars(m).get("_ChunkedLogProbFunction") is original for m in names)
unpatch()
assert utils._ChunkedLogProbFunction is original
assert trl.__file__.startswith(sys.argv[1]), trl.__file__
print(trl.__version__)
"""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code, folder],
        env=os.environ | {"PYTHONPATH": os.pathsep.join((folder, str(root)))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)


# --- trainers -------------------------------------------------------------------------------------


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {w: i for i, w in enumerate(["<pad>", "<s>", "</s>", *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>")


def model(seed: int):
    """Large enough weights that losses move; dropout, so that random numbers must agree too."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    made = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            attention_dropout=0.1,
            tie_word_embeddings=False,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    with torch.no_grad():
        for p in made.parameters():
            if p.dim() > 1:
                p.mul_(8)
    return made


def texts(generator, count: int, kind: str) -> list[dict]:
    def text(low, high):
        n = int(torch.randint(low, high, (), generator=generator))
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=generator))

    rows = []
    for i in range(count):
        row = {"prompt": text(2, 9)}
        if kind == "dpo":
            row |= {"chosen": " " + text(1, 12), "rejected": " " + text(1, 12)}
        else:
            row |= {"completion": " " + text(1, 12)} | (
                {"label": i % 3 > 0} if kind == "kto" else {}
            )
        rows.append(row)
    return rows


def reward(completions, **_) -> list[float]:
    """Something that differs between any two completions."""
    return [float(sum(map(ord, text)) % 97) for text in completions]


def run(kind: str, settings: dict, data: list[dict], seed: int, folder):
    """20 steps of a TRL trainer; what it logged, its weights before and after."""
    from datasets import Dataset
    from transformers import set_seed

    set_seed(seed)
    config, trainer = {
        "dpo": (trl.DPOConfig, trl.DPOTrainer),
        "sft": (trl.SFTConfig, trl.SFTTrainer),
        "kto": (trl.KTOConfig, trl.KTOTrainer),
        "grpo": (trl.GRPOConfig, trl.GRPOTrainer),
    }[kind]
    args = config(
        output_dir=str(folder),
        report_to=[],
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        disable_tqdm=True,
        max_steps=STEPS,
        logging_steps=1,
        per_device_train_batch_size=4,
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        optim="sgd",
        seed=seed,
        **{k: v for k, v in settings.items() if k != "lora"},
    )
    lora = settings.get("lora", False)
    policy, extra = model(seed), {}
    if kind == "grpo":
        extra["reward_funcs"] = reward
    elif lora:
        peft = pytest.importorskip("peft")
        extra["peft_config"] = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    elif kind != "sft":
        extra["ref_model"] = copy.deepcopy(policy)
    dataset = Dataset.from_list(data)
    made = trainer(policy, args=args, train_dataset=dataset, processing_class=tokenizer(), **extra)
    start = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    made.train()
    logs = [
        {k: v for k, v in entry.items() if not k.startswith(("train_", "epoch", "step_time"))}
        for entry in made.state.log_history
        if "loss" in entry
    ]
    return logs, start, dict(made.model.named_parameters())


TRAINERS = {
    "dpo-sppo_hard": ("dpo", {"loss_type": "sppo_hard", "beta": 0.05, "learning_rate": 2e-3}),
    "dpo-sigmoid": ("dpo", {"loss_type": "sigmoid", "beta": 0.1, "learning_rate": 5e-3}),
    "dpo-ipo": ("dpo", {"loss_type": "ipo", "beta": 0.1, "learning_rate": 5e-3}),
    # Weighting asks for the last optional output, log_sum_sq_probs.
    "dpo-weighted": ("dpo", {"use_weighting": True, "beta": 0.1, "learning_rate": 5e-3}),
    # The head is frozen, and the reference is the policy without its adapter.
    "dpo-lora": ("dpo", {"lora": True, "beta": 0.1, "learning_rate": 0.1, "max_grad_norm": 0.0}),
    "sft": ("sft", {"learning_rate": 1e-2, "completion_only_loss": True}),
    "kto": ("kto", {"learning_rate": 1e-2, "beta": 0.1}),
    # It samples, so that one random number out of place would change everything.
    "grpo": (
        "grpo",
        {
            "learning_rate": 1e-2,
            "num_generations": 2,
            "max_completion_length": 8,
            "temperature": 0.9,
        },
    ),
}


@pytest.mark.parametrize("name", TRAINERS)
def test_the_same_training_with_and_without(name, generator, tmp_path, monkeypatch):
    kind, settings = TRAINERS[name]
    seed = int(torch.randint(10_000, (), generator=generator))
    data = texts(generator, 24, kind)
    logs, start, weights = run(kind, settings, data, seed, tmp_path / "theirs")
    calls = []
    apply = FusedLogProbs.apply
    monkeypatch.setattr(
        FusedLogProbs, "apply", lambda self, *args: calls.append(0) or apply(self, *args)
    )
    with patched():
        ours, _, ours_weights = run(kind, settings, data, seed, tmp_path / "ours")
    assert len(calls) >= STEPS
    assert len(logs) == len(ours) == STEPS
    moved = max(abs(entry["loss"] - logs[0]["loss"]) for entry in logs)
    assert moved > 0.01 * abs(logs[0]["loss"])  # there is a curve to compare
    for step, (a, b) in enumerate(zip(logs, ours, strict=True)):
        assert a.keys() == b.keys()
        for key in a:
            assert b[key] == pytest.approx(a[key], rel=2e-4, abs=1e-4), (step, key)
    with torch.no_grad():
        distance = sum((ours_weights[n] - w).square().sum() for n, w in weights.items()).sqrt()
        path = sum((start[n] - w).square().sum() for n, w in weights.items()).sqrt()
    print(name, float(distance / path), [round(entry["loss"], 4) for entry in logs])
    assert distance < 1e-4 * path
