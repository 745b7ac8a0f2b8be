"""RL on open questions, scored by the rule or by a judge that errs: `python studies/open_answers/run.py [--seed 0]`.

Phantoms asked without options (`vitos data phantom --in-words`), seeds 0 to 2, in two arms: the rule's score is the
accuracy in the reward, or the grade of a stub judge that is right 90 % of the time. Both are evaluated by the rule.
Finished runs are kept in `runs/open_answers/` and unfinished ones are continued, so the study can be stopped at any
time. Writes `table.md` and `results.json` beside this file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from vitos.core.answers import is_right
from vitos.core.record import Record
from vitos.eval.seeds import nested_bootstrap

HERE, RUNS, DATA = Path(__file__).parent, Path("runs/open_answers"), Path("runs/phantom_open")
ARMS = ("rule", "judge")
WRONG = 0.1  # share of answers that the stub judge grades wrongly, always the same ones


class StubGrader(BaseHTTPRequestHandler):
    """Right exactly where the rule is, but for one answer in ten."""

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][0]["content"]
        fields = dict(line.split(": ", 1) for line in prompt.splitlines() if line.startswith(("Reference", "Answer")))
        gold, answer = json.loads(fields["Reference"]), json.loads(fields["Answer"])
        drawn = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "big") / 2**32
        right = is_right(answer, Record("", (), "", gold, kind="text")) != (drawn < WRONG)
        reply = {"choices": [{"message": {"content": "right" if right else "wrong"}}], "usage": {"total_tokens": 1}}
        data = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def stub_judge() -> Iterator[str]:
    """The URL of the stub judge while it runs."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), StubGrader)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


def vitos(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "vitos", *words], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def run_one(arm: str, seed: int) -> None:
    """Train and evaluate one arm, or go on with it, unless it is finished."""
    folder = RUNS / f"{arm}-{seed}"
    if not (folder / "results.json").is_file():
        sets = [f"output_dir={folder}", f"name={arm}, seed {seed}", f"seed={seed}"]
        with stub_judge() as url:
            if arm == "judge":
                kinds = "judge.kinds=[text, word, number]"
                sets += [f"judge.url={url}", "judge.model=stub", kinds, f"judge.cache={RUNS}/judge.sqlite"]
            words = [word for one in sets for word in ("--set", one)]
            vitos("train", str(HERE / "study.yaml"), "--resume", *words)


def gains(arm: str, seed: int) -> list[float]:
    """Of each test question, the score after training minus that before."""
    lines = (RUNS / f"{arm}-{seed}" / "cases.jsonl").read_text(encoding="utf-8").splitlines()
    asked = [case["conditions"] for case in sorted(map(json.loads, lines), key=lambda case: case["id"])]
    return [one["sparse"]["score"] - one["untrained_sparse"]["score"] for one in asked]


def row_of(arm: str, seed: int) -> dict[str, Any]:
    results = json.loads((RUNS / f"{arm}-{seed}" / "results.json").read_text(encoding="utf-8"))
    opened = results["open"]
    gap = next(
        g for g in opened["comparisons"] if (g["a"], g["b"], g["by"]) == ("sparse", "untrained_sparse", "score")
    )
    return {
        "arm": arm,
        "seed": seed,
        "questions": gap["num_questions"],
        "untrained": opened["conditions"]["untrained_sparse"]["score"],
        "trained": opened["conditions"]["sparse"]["score"],
        "difference": gap["difference"],
        "ci": gap["ci"],
        "text_only": opened["conditions"]["text_only"]["score"],
        "kept": results["kept_ratio"],
    }


def write() -> None:
    """The table of all runs that are done; of an arm with several seeds, the gain over seeds and questions."""
    seeds = {arm: [s for s in range(3) if (RUNS / f"{arm}-{s}" / "results.json").is_file()] for arm in ARMS}
    rows = [row_of(arm, seed) for arm in ARMS for seed in seeds[arm]]
    for arm in ARMS:
        if len(seeds[arm]) > 1:
            of_arm = [row for row in rows if row["arm"] == arm]
            mean = {k: sum(r[k] for r in of_arm) / len(of_arm) for k in ("untrained", "trained", "text_only", "kept")}
            gap = nested_bootstrap([gains(arm, seed) for seed in seeds[arm]])
            pooled = {"seed": "all", "questions": of_arm[0]["questions"], "difference": gap.estimate}
            rows.append({"arm": arm, **pooled, "ci": [gap.low, gap.high], **mean})
    lines = [
        "Rule's score of the sparse branch on open phantom questions, by `python studies/open_answers/run.py`.",
        "",
        "| reward | seed | questions | untrained | trained | difference (95 %) | blank image | tokens kept |",
        "| :-- | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for r in rows:
        low, high = r["ci"]
        gap = f"{r['difference']:+.3f} ({low:+.3f} to {high:+.3f})"
        figures = f"{r['untrained']:.3f} | {r['trained']:.3f} | {gap} | {r['text_only']:.3f} | {r['kept']:.1%}"
        lines.append(f"| {r['arm']} | {r['seed']} | {r['questions']} | {figures} |")
    (HERE / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (HERE / "results.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, action="append", help="by default 0, 1 and 2")
    parser.add_argument("--arm", choices=ARMS, action="append", help="by default both")
    given = parser.parse_args()
    if not (DATA / "test.json").is_file():
        vitos("data", "phantom", str(DATA), "--train", "1000", "--val", "0", "--test", "400", "--in-words")
    for seed in given.seed or (0, 1, 2):
        for arm in given.arm or ARMS:
            run_one(arm, seed)
            write()


if __name__ == "__main__":
    main()
