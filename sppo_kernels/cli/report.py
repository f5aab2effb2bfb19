"""What a run comes to: a table on the terminal and one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sppo_kernels.files import atomic_file, read_json
from sppo_kernels.optional import require

COLORS = {"sppo": "#1f5fa8", "dpo": "#c8641e"}


def table(results: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    """Header and one line a round: win rates against the start, methods side by side."""
    lines = [["round", *(f"{name.upper()} win rate vs start" for name in results), "seconds"]]
    for t in range(max(map(len, results.values()))):
        line = [str(t + 1)]
        for rounds in results.values():
            r = rounds[t]
            line.append(f"{r['win_rate']:.3f}  [{r['low']:.3f}, {r['high']:.3f}]")
        line.append(" + ".join(f"{sum(r[t]['times'].values()):.0f}" for r in results.values()))
        lines.append(line)
    return lines


def print_table(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """The table, by rich where it is installed."""
    header, *lines = table(results)
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        for line in (header, *lines):
            print("  ".join(f"{cell:>28}" for cell in line))
    else:
        drawn = Table(title="Win rate against the start, 95 % interval over held-out prompts")
        for name in header:
            drawn.add_column(name, justify="right")
        for line in lines:
            drawn.add_row(*line)
        Console(width=max(100, 34 * len(header))).print(drawn)
    print(f"report: {path}")


def write_report(folder: Path, results: dict[str, list[dict[str, Any]]]) -> Path:
    """`report.png`: win rates with intervals, loss, log-ratios, time; prints the table."""
    require("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    wins, loss, ratio, seconds = figure.subplots(2, 2).ravel()
    stages = ("generate", "judge", "train", "evaluate")
    for number, (name, rounds) in enumerate(results.items()):
        color = COLORS.get(name, "gray")
        x = [r["round"] for r in rounds]
        y = [r["win_rate"] for r in rounds]
        error = [
            [r["win_rate"] - r["low"] for r in rounds],
            [r["high"] - r["win_rate"] for r in rounds],
        ]
        wins.errorbar(x, y, error, color=color, marker="o", capsize=4, label=name.upper())
        offset = 0
        for r in rounds:
            log = [
                e
                for e in read_json(folder / name / f"round-{r['round']}" / "model/training.json")
                if "loss" in e
            ]
            steps = [offset + e["step"] for e in log]
            first = r["round"] == 1
            if name == "sppo":
                loss.plot(steps, [e["loss_win_rate"] for e in log], color=color)
            for key, style in (("logratio_best", "-"), ("logratio_worst", ":")):
                label = f"{name.upper()} {key.split('_')[1]}" if first else None
                ratio.plot(steps, [e[key] for e in log], style, color=color, label=label)
            offset = steps[-1] if steps else offset
        bottom = 0.0
        for k, stage in enumerate(stages):
            total = sum(r["times"][stage] for r in rounds)
            seconds.bar(
                name.upper(), total, bottom=bottom, color=f"C{k}", label=None if number else stage
            )
            bottom += total
    wins.axhline(0.5, color="gray", linewidth=0.8, linestyle="--")
    wins.set(title="Win rate against the start (95 % interval)", xlabel="round", ylim=(0, 1))
    wins.set_xticks([r["round"] for r in next(iter(results.values()))])
    loss.set(title="SPPO loss (win-rate units) within each round", xlabel="step")
    ratio.set(title="Log-ratio to the round's reference (nats)", xlabel="step")
    seconds.set(title="Time", ylabel="seconds")
    seconds.margins(y=0.2)
    for axis, columns in ((wins, 1), (ratio, 1), (seconds, len(stages))):
        axis.legend(frameon=False, ncols=columns)
    path = folder / "report.png"
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    print_table(results, path)
    return path
