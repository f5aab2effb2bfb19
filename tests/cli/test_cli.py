"""The command line: files in and out, self-play resumed after a kill, named errors."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")

from sppo_kernels.cli import main
from sppo_kernels.data.rows import read_parquet, write_parquet
from sppo_kernels.files import whole_folder
from sppo_kernels.selfplay.demo import DemoOptions, make_prompts, warm_up

JUDGE = "sppo_kernels.cli.demo:judge"  # as folders of older runs name it


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A tiny model with the demo's tokenizer, barely trained."""
    folder = tmp_path_factory.mktemp("start") / "model"
    options = DemoOptions(warmup_steps=3, hidden_size=32, quiet=True)
    return whole_folder(folder, lambda path: warm_up(path, options))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.parquet"
    write_parquet(make_prompts(20, 3), path)
    return path


def flags(**values):
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def loop_flags(start, prompts, folder, **extra):
    settings = {
        "model": start,
        "prompts": prompts,
        "run_dir": folder,
        "judge": JUDGE,
        "rounds": 2,
        "num_responses": 3,
        "max_new_tokens": 6,
        "generate_batch_size": 4,
        "eval_prompts": 6,
        "eval_samples": 2,
        "engine": "transformers",
        "device": "cpu",
        "use_cpu": True,
        "disable_tqdm": True,
        "max_length": 64,
        "eta": 10,
        "learning_rate": 1e-2,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
    }
    return flags(**(settings | extra))


def weights(folder):
    from safetensors.torch import load_file

    return load_file(Path(folder) / "sppo" / "round-2" / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def whole_run(start, prompts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert main(["iterate", *loop_flags(start, prompts, folder, baseline="dpo")]) == 0
    return folder


def test_iterate_leaves_results_report_and_nothing_unfinished(whole_run):
    results = json.loads((whole_run / "results.json").read_text())
    assert set(results) == {"sppo", "dpo"}
    for rounds in results.values():
        assert [r["round"] for r in rounds] == [1, 2]
        assert all(r["low"] <= r["win_rate"] <= r["high"] for r in rounds)
    assert (whole_run / "report.png").read_bytes()[:4] == b"\x89PNG"
    left = [p.name for p in whole_run.rglob("*") if p.name.startswith(".") or ".parts" in p.name]
    assert left == []
    rows = read_parquet(whole_run / "sppo" / "round-2" / "judged.parquet")
    first = read_parquet(whole_run / "sppo" / "round-1" / "judged.parquet")
    assert not {r["id"] for r in rows} & {r["id"] for r in first}  # fresh prompts each round
    assert rows[0]["judge"] == JUDGE
    # both methods start from the same answers
    assert not (whole_run / "dpo" / "round-1" / "responses.parquet").exists()


def test_ids_are_kept_from_sampling_to_training(whole_run, start):
    from transformers import AutoTokenizer

    from sppo_kernels.data.tokenize import prepare_dataset
    from sppo_kernels.trainer import SPPOConfig

    tokenizer = AutoTokenizer.from_pretrained(start)
    rows = read_parquet(whole_run / "sppo" / "round-1" / "judged.parquet")
    data = prepare_dataset(rows, tokenizer, SPPOConfig(output_dir="unused", use_cpu=True))
    assert [r["response_ids"] for r in rows] == list(data["response_ids"])
    for row in rows:
        for ids, text, done in zip(
            row["response_ids"], row["responses"], row["finished"], strict=True
        ):
            assert done == (ids[-1] == tokenizer.eos_token_id)
            assert done or len(ids) == 6  # else it was stopped at max_new_tokens
            assert tokenizer.decode(ids, skip_special_tokens=True) == text


class Killed(BaseException):
    """Stands for a kill: no handler of ours may catch it."""


@pytest.mark.parametrize("survive", [1, 4, 7, 10, 13])
def test_a_run_cut_between_any_two_writes_ends_with_the_same_weights(
    survive, start, prompts, tmp_path, whole_run, monkeypatch
):
    replace, count = os.replace, [0]

    def fragile(source, target):
        if str(target).startswith(str(tmp_path)):
            count[0] += 1
            if count[0] == survive:
                raise Killed(target)
        return replace(source, target)

    monkeypatch.setattr(os, "replace", fragile)
    arguments = ["iterate", *loop_flags(start, prompts, tmp_path)]
    with pytest.raises(Killed):
        main(arguments)
    monkeypatch.undo()
    assert main(arguments) == 0
    expected = weights(whole_run)
    found = weights(tmp_path)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_a_killed_process_resumes(start, prompts, tmp_path, whole_run):
    command = [sys.executable, "-m", "sppo_kernels", "iterate"]
    command += loop_flags(start, prompts, tmp_path)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 900
    while not list(tmp_path.rglob("judged.parquet")) and time.monotonic() < deadline:
        time.sleep(0.02)  # killed as soon as training begins
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "sppo" / "round-2" / "model").exists()
    assert main(["iterate", *loop_flags(start, prompts, tmp_path)]) == 0
    expected, found = weights(whole_run), weights(tmp_path)
    for name in expected:  # another process, another number of threads
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-4)


def test_other_settings_in_the_same_folder_are_refused(start, prompts, whole_run, capsys):
    arguments = loop_flags(start, prompts, whole_run, baseline="dpo", eta=11)
    assert main(["iterate", *arguments]) == 1
    assert "started with other args.eta (args.eta: 10.0 then, 11.0 now)" in capsys.readouterr().err


def test_generate_judge_train_convert(start, prompts, tmp_path, capsys):
    answers, judged, model = tmp_path / "a.parquet", tmp_path / "j.parquet", tmp_path / "m"
    common = flags(device="cpu", engine="transformers", num_responses=3, max_new_tokens=5)
    files = flags(model=start, prompts=prompts, output=answers)
    assert main(["generate", *files, *common]) == 0
    assert main(["judge", *flags(input=answers, output=judged, judge=JUDGE)]) == 0
    nash = tmp_path / "n.parquet"
    options = flags(input=answers, output=nash, judge=JUDGE, targets="nash")
    assert main(["judge", *options]) == 0
    for row, other in zip(read_parquet(judged), read_parquet(nash), strict=True):
        assert row["win_matrix"] == other["win_matrix"]
        assert max(other["win_rate"]) <= 0.5 + 1e-6  # nothing beats the equilibrium
    config = tmp_path / "train.yaml"
    config.write_text("eta: 10\nmax_steps: 2\nreport_to: none\nuse_cpu: true\ndisable_tqdm: true\n")
    train = flags(model=start, train_data=judged, output_dir=model, device="cpu", config=config)
    assert main(["train", *train, "--lora_r", "2", "--max_steps", "1"]) == 0
    assert "trained for 1 steps" in capsys.readouterr().out  # the flag wins over the file
    from transformers import AutoModelForCausalLM

    before = AutoModelForCausalLM.from_pretrained(start).state_dict()
    after = AutoModelForCausalLM.from_pretrained(model).state_dict()
    assert set(before) == set(after)  # adapters are merged

    released, back = tmp_path / "u.parquet", tmp_path / "b.parquet"
    assert main(["convert", *flags(input=judged, output=released, to="uclaml")]) == 0
    assert main(["convert", *flags(input=released, output=back, to="sppo")]) == 0
    for row, pair in zip(read_parquet(judged), read_parquet(back), strict=True):
        assert pair["win_rate"] == [max(row["win_rate"]), min(row["win_rate"])]
        assert pair["prompt"][-1]["content"] == row["prompt"]
        best = row["win_rate"].index(max(row["win_rate"]))
        assert pair["responses"][0] == row["responses"][best]


def test_named_errors(tmp_path, start, prompts, capsys):
    damaged = tmp_path / "damaged.parquet"
    damaged.write_bytes(b"PAR1 and then nothing")
    single = tmp_path / "single.parquet"
    write_parquet([{"prompt": "a", "responses": ["b"]}], single)
    typo = tmp_path / "typo.json"
    typo.write_text('{"num_respnses": 4}')
    output = tmp_path / "out.parquet"
    cases = [
        (["judge", *flags(input=damaged, output=output, judge=JUDGE)], "cannot be read as Parquet"),
        (["judge", *flags(input=single, output=output, judge=JUDGE)], "at least 2 responses"),
        (["judge", *flags(input=single, output=output, judge="nonsense")], "MODULE:FUNCTION"),
        (["judge", *flags(input=single, output=output, judge=JUDGE, targets="elo")], "--targets"),
        (["generate", *flags(config=typo)], "unknown settings ['num_respnses']"),
        (["generate", *flags(prompts=prompts, output=output)], "expected --model"),
        (["iterate", *loop_flags(start, prompts, tmp_path, rounds=40)], "at least 46"),
    ]
    for arguments, message in cases:
        assert main(arguments) == 1
        assert message in capsys.readouterr().err
    assert not output.exists()
    assert main(["nonsense"]) == 2
