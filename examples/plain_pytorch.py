"""SPPO in a plain PyTorch loop, around any transformers causal language model.

Everything is made up here, so it runs anywhere in seconds: a tiny random model, prompts of random
ids with four sampled responses each, and a judge that likes small ids.
"""

import argparse

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import sppo_kernels as sk
from sppo_kernels.integrations.transformers import model_sequence_logps, model_sppo_loss

ETA, K, PROMPT, LENGTH, VOCAB = 20.0, 4, 6, 12, 257


def build() -> LlamaForCausalLM:
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **sizes, **heads))


def play(model, prompts: int) -> list[dict]:
    """K responses a prompt, judged against each other, with the reference's log-probs."""
    data = []
    for _ in range(prompts):
        prompt = torch.randint(3, VOCAB, (1, PROMPT)).expand(K, -1)
        ids = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=True,
            max_new_tokens=LENGTH,
            min_new_tokens=LENGTH,
            pad_token_id=0,
        )
        taste = -ids[:, PROMPT:].float().mean(1) / 20
        wins = torch.sigmoid(taste[:, None] - taste)  # P(i beats j)
        labels = ids.clone()
        labels[:, :PROMPT] = -100  # aligned with ids, as transformers has it
        mask = torch.ones_like(ids)
        with torch.no_grad():
            ref = model_sequence_logps(model, ids, labels, mask)
        batch = {"input_ids": ids, "labels": labels, "attention_mask": mask}
        data.append(batch | {"ref_logps": ref, "win_rate": sk.win_rates(wins)})
    return data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=10)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = build().eval()
    data = play(model, args.prompts)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for epoch in range(args.epochs):
        losses = []
        for batch in data:
            # The one line that differs from a loop with any other loss.
            loss, _ = model_sppo_loss(model, **batch, eta=ETA, units="win_rate")
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
        print(f"epoch {epoch:2d}: loss {sum(losses) / len(losses):.4f}")


if __name__ == "__main__":
    main()
