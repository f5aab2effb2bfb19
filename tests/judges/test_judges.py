"""Judges against plain re-computations, position bias, errors."""

import json
import math

import pytest
import torch

from sppo_kernels.data.rows import OverLengthError
from sppo_kernels.judges import (
    CallableJudge,
    Judge,
    JudgeError,
    PairRMJudge,
    RecordedJudge,
    RewardModelJudge,
    load_judge,
    win_matrices,
)

transformers = pytest.importorskip("transformers")

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "one", "dog", "ran", "far", "away"]
MARKS = ["<|source|>", "<|candidate1|>", "<|candidate2|>"]


def sentences(generator, count, low=1, high=9):
    picks = [
        torch.randint(0, len(WORDS), (int(torch.randint(low, high, (), generator=generator)),))
        for _ in range(count)
    ]
    return [" ".join(WORDS[i] for i in pick.tolist()) for pick in picks]


def save_tokenizer(folder, extra=()):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    specials = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *extra]
    vocab = {w: i for i, w in enumerate([*specials, *WORDS])}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        additional_special_tokens=list(extra),
    )
    fast.save_pretrained(folder)
    return fast


@pytest.fixture(params=["transformers", "blender"])
def checkpoint(request, tmp_path):
    """A small random PairRM in one of the two published layouts."""
    from safetensors.torch import save_file

    from sppo_kernels.judges.pairrm import PairRMModel

    tokenizer = save_tokenizer(tmp_path, MARKS)
    config = transformers.DebertaV2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
        max_position_embeddings=128,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    ids = dict(
        zip(("source", "cand1", "cand2"), tokenizer.convert_tokens_to_ids(MARKS), strict=True)
    )
    model = PairRMModel(config, ids).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    if request.param == "transformers":
        config.architectures = ["DebertaV2PairRM"]
        body = json.loads(config.to_json_string(use_diff=False))
        body |= {f"{name}_prefix_id": i for name, i in ids.items()} | {"n_tasks": 1}
        (tmp_path / "config.json").write_text(json.dumps(body))
    else:
        config.save_pretrained(tmp_path / "backbone")
        (tmp_path / "config.json").write_text(
            json.dumps(
                {
                    "ranker_type": "pairranker",
                    "model_type": "deberta",
                    "model_name": "backbone",
                    "source_maxlength": 30,
                    "candidate_maxlength": 20,
                }
            )
        )
    return tmp_path, model


def by_hand(model, tokenizer, prompt, first, second):
    """One pair, unbatched and unpadded, from texts with the marks written into them."""
    ids = []
    for mark, text in zip(MARKS, (prompt, first, second), strict=True):
        ids += tokenizer(f"{mark} {text}")["input_ids"]
    ids = torch.tensor([ids])
    states = model.pretrained_model(ids).last_hidden_state[0]
    at = [states[ids[0] == tokenizer.convert_tokens_to_ids(mark)][0] for mark in MARKS]
    scores = [model.head_layer(torch.cat([at[0], at[k]])) for k in (1, 2)]
    return float(scores[0] - scores[1])


def test_pairrm_scores_both_orders_as_a_plain_computation(checkpoint, generator):
    path, model = checkpoint
    judge = PairRMJudge(path, batch_size=5)
    assert isinstance(judge, Judge)
    prompts, answers = sentences(generator, 2), [sentences(generator, 3) for _ in range(2)]
    logits = judge.logits(prompts, answers)
    assert logits.shape == (2, 3, 3)
    with torch.no_grad():
        for n in range(2):
            for i in range(3):
                for j in range(3):
                    if i != j:
                        expected = by_hand(
                            model, judge.tokenizer, prompts[n], answers[n][i], answers[n][j]
                        )
                        assert float(logits[n, i, j]) == pytest.approx(expected, abs=2e-5)


def test_pairrm_does_not_cut_silently(checkpoint, generator, caplog):
    path, _ = checkpoint
    long = " ".join(["cat"] * 60)
    limits = {"source_max_length": 20, "max_length": 60}
    with pytest.raises(OverLengthError, match=r"PairRM: 2 texts in 2 comparisons"):
        PairRMJudge(path, **limits).logits(["the mat"], [[long, "a dog"]])
    judge = PairRMJudge(path, overlong="truncate", **limits)
    judge.logits(["the mat"], [[long, "a dog"]])
    assert judge.truncated == 2
    assert "were cut" in caplog.text


def test_pairrm_names_what_is_wrong_with_a_folder(tmp_path):
    with pytest.raises(JudgeError, match=r"no config\.json"):
        PairRMJudge(tmp_path)
    (tmp_path / "config.json").write_text('{"hidden_size": 3}')
    with pytest.raises(JudgeError, match="model_type 'deberta-v2', or ranker_type"):
        PairRMJudge(tmp_path)


def test_reward_models_give_bradley_terry(tmp_path, generator):
    tokenizer = save_tokenizer(tmp_path)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=1,
        pad_token_id=0,
    )
    model = transformers.LlamaForSequenceClassification(config).eval()
    with torch.no_grad():
        model.score.weight.mul_(50)
    prompts, answers = sentences(generator, 3), [sentences(generator, 4) for _ in range(3)]
    judge = RewardModelJudge(model, tokenizer=tokenizer, batch_size=5)
    found = win_matrices(judge.logits(prompts, answers))
    for n in range(3):
        with torch.no_grad():
            ids = [torch.tensor([tokenizer(prompts[n], y)["input_ids"]]) for y in answers[n]]
            scores = torch.cat([model(i).logits[0] for i in ids])
        expected = torch.sigmoid(scores[:, None] - scores[None, :])
        torch.testing.assert_close(found[n], expected, atol=1e-4, rtol=0)
    with pytest.raises(
        OverLengthError, match=r"reward model: 2 texts in 2 responses .* max_length=4"
    ):
        RewardModelJudge(model, tokenizer=tokenizer, max_length=4).logits(
            ["the cat sat"], [["on a mat", "far away"]]
        )
    config.num_labels = 2
    with pytest.raises(JudgeError, match="one output"):
        RewardModelJudge(transformers.LlamaForSequenceClassification(config), tokenizer=tokenizer)


def length_judge(prompt, first, second):
    return 0.1 * (len(first) - len(second)) + 3.0  # a constant for standing first


def test_a_position_bias_cancels_and_temperature_divides():
    judge = load_judge(f"{__name__}:length_judge")
    logits = judge.logits(["p"], [["a", "bbb", "cc"]])
    difference = torch.tensor([[0.0, -2, -1], [2, 0, 1], [1, -1, 0]]) * 0.1
    torch.testing.assert_close(win_matrices(logits)[0], torch.sigmoid(difference))
    torch.testing.assert_close(
        win_matrices(logits, temperature=4.0)[0], torch.sigmoid(difference / 4)
    )
    biased = win_matrices(logits, debias=False)[0]
    assert float(biased[0, 1]) == pytest.approx(1 / (1 + math.exp(-2.8)), rel=1e-5)
    torch.testing.assert_close(biased + biased.T, torch.ones(3, 3))


def test_recorded_comparisons_become_odds(caplog):
    rows = [("a", "b", "left")] * 3 + [("b", "a", "left")] + [("a", "b", "tie")] * 2
    table = [{"prompt": "p", "response_x": x, "response_y": y, "winner": w} for x, y, w in rows]
    judge = RecordedJudge(table, smoothing=0.5)
    logits = judge.logits(["p"], [["a", "b", "c"]])[0]
    assert float(logits[0, 1]) == pytest.approx(math.log(4.5 / 2.5))
    assert float(logits[1, 0]) == pytest.approx(-math.log(4.5 / 2.5))
    assert float(logits[0, 2]) == 0.0
    assert judge.unseen == 4
    assert "4 ordered pairs" in caplog.text
    with pytest.raises(JudgeError, match="never compared"):
        RecordedJudge(table, missing="refuse").logits(["p"], [["a", "c"]])
    with pytest.raises(JudgeError, match=r"winner: .*left-ish.* row 0"):
        RecordedJudge([table[0] | {"winner": "left-ish"}])
    with pytest.raises(JudgeError, match=r"winner: expected a share in \[0, 1\], got 3.0 in row 1"):
        RecordedJudge([table[0], table[0] | {"winner": 3}])
    with pytest.raises(JudgeError, match=r"\['winner'\] missing"):
        RecordedJudge([table[0], {k: v for k, v in table[0].items() if k != "winner"}])


def test_errors_of_the_protocol():
    judge = CallableJudge(length_judge)
    with pytest.raises(JudgeError, match="at least 2"):
        judge.logits(["p"], [["a"]])
    with pytest.raises(JudgeError, match="same number"):
        judge.logits(["p", "q"], [["a", "b"], ["a", "b", "c"]])
    with pytest.raises(JudgeError, match="cannot find"):
        CallableJudge(f"{__name__}:no_such_function")
    with pytest.raises(JudgeError, match="expected pairrm:PATH"):
        load_judge("pairrm")
    with pytest.raises(JudgeError, match=r"NaN at \(0, 0, 1\)"):
        win_matrices(torch.tensor([[[0.0, math.nan], [1.0, 0.0]]]))
    with pytest.raises(JudgeError, match="temperature"):
        win_matrices(torch.zeros(1, 2, 2), temperature=0.0)
