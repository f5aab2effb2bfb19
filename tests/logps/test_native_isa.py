"""Every instruction set of the CPU kernels that this machine has, not only the best one."""

import json
import os
import platform
import subprocess
import sys

import pytest

SCRIPT = """
import json, torch
import sppo_kernels as sk
from sppo_kernels import _C
from sppo_kernels.testing import relative_error
from sppo_kernels.logps.linear import TOKEN_STATS

errors = {}
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for vocab in (3, 77, 1031):
        torch.manual_seed(vocab)
        logits = (torch.randn(2, 5, vocab) * 4).to(dtype)
        logits[0, 0, vocab // 2] = float("-inf")
        labels = torch.randint(0, vocab, (2, 5))
        labels[0, 0] = 0
        leaf, double = logits.clone().requires_grad_(), logits.double().requires_grad_()
        for z, impl in ((leaf, "native"), (double, "reference")):
            out = sk.token_logps(z, labels, impl=impl)
            out.backward(torch.linspace(-2, 3, 10).view(2, 5).to(out.dtype))
            errors.setdefault("value", []).append(out.detach().double())
        a, b = errors.pop("value")
        hidden = torch.randn(6, 8).to(dtype)
        weight = torch.randn(vocab, 8).to(dtype)
        bias = torch.randn(vocab).to(dtype)
        head = {"bias": bias, "logit_scale": 0.7, "softcap": 2.0}
        heads = []
        for cast, impl in ((dtype, "native"), (torch.float64, "reference")):
            w = weight.detach().clone().to(cast).requires_grad_()
            given = {**head, "bias": bias.to(cast), "impl": impl}
            labelled = (hidden.to(cast), w, labels.view(-1)[:6])
            out = sk.linear_token_logps(*labelled, **given)
            out.sum().backward()
            grad, w.grad = w.grad, None
            stats = sk.linear_token_stats(*labelled, outputs=TOKEN_STATS, **given)
            stats.entropy.sum().backward()
            heads.append((out, grad, torch.stack(stats[1:4]), w.grad))
        errors[f"{dtype} {vocab}"] = [
            relative_error(a, b),
            relative_error(leaf.grad, double.grad),
            *(relative_error(*pair) for pair in zip(*heads)),
        ]
print(json.dumps({"capability": _C.build_info()["cpu_capability"], "errors": errors}))
"""


def run(capability):
    env = os.environ | {"SPPO_KERNELS_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_each_instruction_set_is_within_rounding(capability):
    result = run(capability)
    if result["capability"] != capability:
        pytest.skip(f"this {platform.machine()} has no {capability}")
    for case, (value, gradient, *of_head) in result["errors"].items():
        dtype = case.split()[0]
        # gradients are rounded to the dtype; the head's logits are, too, before the softmax
        eps = {"torch.float32": 2**-23, "torch.bfloat16": 2**-8, "torch.float16": 2**-11}[dtype]
        assert value < 4e-7, case
        assert gradient < 4 * eps, case
        names = ("log p", "its gradient", "statistics", "the entropy's gradient")
        for name, error in zip(names, of_head, strict=True):
            assert error < 8 * eps, (case, name)
