"""python -m benchmarks: the loss path and the games, with their ceilings and peers, in one run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks import core, games
from benchmarks.harness import environment
from benchmarks.render import markdown


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    results = core.main(["--json", str(args.json), "--repeats", str(args.repeats)])
    games.main(["--json", str(args.json.with_name(args.json.stem + "-games.json"))])
    if args.markdown:
        env = json.dumps(environment(), indent=1)
        args.markdown.write_text(f"{markdown(results)}\n```json\n{env}\n```\n")


if __name__ == "__main__":
    main()
