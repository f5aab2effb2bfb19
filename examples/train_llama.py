"""Train a small Llama with SPPO on real responses with human comparisons, in plain PyTorch.

Data: the llmfao data set where its folder is (--data FOLDER), else the sample beside this file.
"""

import argparse
import time
from pathlib import Path

import torch
from llmfao import load
from measure import measure
from scipy.stats import spearmanr
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tqdm import trange
from transformers import LlamaConfig, LlamaForCausalLM

import sppo_kernels as sk

HERE = Path(__file__).resolve().parent
ETA = 200.0  # a win rate of 1 asks for 100 nats more than the reference gives


def build(texts: list[str]) -> tuple[Tokenizer, LlamaForCausalLM]:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    bpe = trainers.BpeTrainer(vocab_size=4096, special_tokens=["<unk>", "<s>", "</s>"])
    tokenizer.train_from_iterator(texts, bpe)
    sizes = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=tokenizer.get_vocab_size(), num_attention_heads=4, **sizes)
    return tokenizer, LlamaForCausalLM(config)


def encode(tokenizer: Tokenizer, prompt: str, answers: list[str], length: int):
    """Inputs [K, T], and labels [K, T] in which only the tokens of the response count."""
    head = [1, *tokenizer.encode(prompt).ids][: length // 3]
    rows = [[*head, *tokenizer.encode(a).ids, 2][:length] for a in answers]
    ids = torch.full((len(rows), max(map(len, rows))), 2)
    labels = torch.full_like(ids, -100)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        labels[i, len(head) - 1 : len(row) - 1] = torch.tensor(row[len(head) :])
    return ids, labels


def loss_of(model, ids, labels, ref, win, fused=True) -> sk.SPPOOutput:
    hidden, head = model.model(input_ids=ids).last_hidden_state, model.lm_head.weight
    if fused:
        return sk.fused_linear_sppo_loss(hidden, head, labels, ref, win, eta=ETA, units="win_rate")
    logps = sk.sequence_logps(hidden @ head.T, labels, impl="reference")
    return sk.SPPOOutput(sk.sppo_loss(logps, ref, win, eta=ETA, units="win_rate"), logps.detach())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=HERE.parents[1] / "shared/data/llmfao")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--length", type=int, default=64, help="tokens")
    args = parser.parse_args()
    torch.manual_seed(0)
    prompts = load(source := args.data if args.data.is_dir() else HERE / "sample")
    tokenizer, model = build([t for p in prompts for t in (p.text, *p.answers)])
    data = []
    with torch.no_grad():
        for p in prompts:  # reference log-probs, once
            ids, labels = encode(tokenizer, p.text, p.answers, args.length)
            hidden = model.model(input_ids=ids).last_hidden_state
            ref = sk.linear_sequence_logps(hidden, model.lm_head.weight, labels)
            data.append((ids, labels, ref, torch.tensor(p.win_rate)))
    print(
        f"{len(prompts)} prompts, {sum(len(p.answers) for p in prompts)} responses, {source.name}"
    )

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    begin, bar = time.perf_counter(), trange(args.epochs, desc="SPPO")
    for epoch in bar:
        residual, rank = [], []
        for ids, labels, ref, win in data:
            out = loss_of(model, ids, labels, ref, win)
            optimizer.zero_grad()
            out.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            residual.append(out.loss.item() ** 0.5)
            if epoch:  # at first policy and reference are equal, and there is nothing to rank
                rank.append(spearmanr(win, out.logps - ref).statistic)
        mean, order = sum(residual) / len(data), sum(rank) / max(1, len(rank))
        bar.write(
            f"epoch {epoch:2d}: residual {mean:.3f} of win rate, rank correlation {order:+.2f}"
        )
    print(f"trained in {time.perf_counter() - begin:.0f} s")
    for name, fused in (("fused", True), ("eager", False)):
        seconds, peak = measure(lambda f=fused: loss_of(model, *data[0], f).loss.backward())
        print(f"one {name} step: {seconds:.2f} s, {peak:.0f} MiB over the model")


if __name__ == "__main__":
    main()
