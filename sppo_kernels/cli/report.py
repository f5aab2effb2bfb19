"""What a run comes to: a table on the terminal and one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sppo_kernels.files import atomic_file, read_json
from sppo_kernels.optional import require

COLORS = {"sppo": "#1f5fa8", "dpo": "#c8641e"}
STAGES = ("generate", "judge", "train", "evaluate")


def print_table(curves: dict[str, dict[str, list]]) -> None:
    """A line a round: win rates against the start, methods side by side; by rich where it is."""
    found = list(curves.values())
    header = ["round", *(f"{method.upper()} win rate vs start" for method in curves), "seconds"]
    lines = [
        [
            str(number),
            *(f"{c['win_rate'][t]:.3f}  [{c['low'][t]:.3f}, {c['high'][t]:.3f}]" for c in found),
            " + ".join(f"{sum(c['times'][t].values()):.0f}" for c in found),
        ]
        for t, number in enumerate(found[0]["round"])
    ]
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


def write_report(folder: Path, results: dict[str, list[dict[str, Any]]]) -> Path:
    """`report.png`: win rates with intervals, loss, log-ratios, time; prints the table."""
    require("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = {
        method: {name: [r[name] for r in rounds] for name in rounds[0]}
        for method, rounds in results.items()
    }
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    wins, loss, ratio, seconds = figure.subplots(2, 2).ravel()
    for number, (method, c) in enumerate(curves.items()):
        name, color = method.upper(), COLORS.get(method, "gray")
        error = [
            [abs(w - bound) for w, bound in zip(c["win_rate"], c[side], strict=True)]
            for side in ("low", "high")
        ]
        style = {"color": color, "marker": "o", "capsize": 4, "label": name}
        wins.errorbar(c["round"], c["win_rate"], error, **style)
        offset = 0
        for t in c["round"]:
            log = read_json(folder / method / f"round-{t}" / "model/training.json")
            log = [e for e in log if "loss" in e]
            steps = [offset + e["step"] for e in log]
            if method == "sppo":
                loss.plot(steps, [e["loss_win_rate"] for e in log], color=color)
            for key, line in (("logratio_best", "-"), ("logratio_worst", ":")):
                label = f"{name} {key.split('_')[1]}" if t == 1 else None
                ratio.plot(steps, [e[key] for e in log], line, color=color, label=label)
            offset = steps[-1] if steps else offset
        bottom = 0.0
        for k, stage in enumerate(STAGES):
            total, label = sum(times[stage] for times in c["times"]), None if number else stage
            seconds.bar(name, total, bottom=bottom, color=f"C{k}", label=label)
            bottom += total
    wins.axhline(0.5, color="gray", linewidth=0.8, linestyle="--")
    wins.set(title="Win rate against the start (95 % interval)", xlabel="round", ylim=(0, 1))
    wins.set_xticks(c["round"])
    loss.set(title="SPPO loss (win-rate units) within each round", xlabel="step")
    ratio.set(title="Log-ratio to the round's reference (nats)", xlabel="step")
    seconds.set(title="Time", ylabel="seconds")
    seconds.margins(y=0.2)
    for axis, columns in ((wins, 1), (ratio, 1), (seconds, len(STAGES))):
        axis.legend(frameon=False, ncols=columns)
    path = folder / "report.png"
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    print_table(curves)
    print(f"report: {path}")
    return path
