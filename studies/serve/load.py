"""Good, bad, slow and huge requests at once, against a server of its own: `python studies/serve/load.py`.

Every request must get an answer of the kind it deserves, and the server must be afterwards what it was before: no open
files more, nothing running. Writes `results.json` beside this file.
"""

from __future__ import annotations

import argparse
import base64
import collections
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from vitos.core import registry
from vitos.data.phantom import write_phantoms
from vitos.data.readers import read_records

HERE = Path(__file__).parent
PLANS = registry.PLANS.names()


def bodies(folder: Path) -> list[dict[str, Any]]:
    """One good request a question and plan."""
    out = []
    for i, record in enumerate(read_records(write_phantoms(folder, "val", 40, 11))):
        image = base64.b64encode(record.image_paths[0].read_bytes()).decode()
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}},
            {"type": "text", "text": record.question.replace("<image>", "")},
        ]
        message = {"role": "user", "content": content}
        out.append({"model": "nano", "messages": [message], "vitos": {"plan": PLANS[i % len(PLANS)]}})
    return out


def state(pid: int, base: str) -> dict[str, Any]:
    """Memory and open files of the server, and what it says of itself."""
    status = Path(f"/proc/{pid}/status").read_text()
    resident = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
    health = httpx.get(f"{base}/health", timeout=60).json()
    return {"resident_mib": resident // 1024, "open_files": len(os.listdir(f"/proc/{pid}/fd")), **health}


def one(kind: str, base: str, body: dict[str, Any]) -> str:
    """Send one request; what came of it."""
    url = f"{base}/v1/chat/completions"
    if kind == "good":
        return str(httpx.post(url, json=body, timeout=300).status_code)
    if kind == "stream":
        with httpx.stream("POST", url, json=body | {"stream": True}, timeout=300) as answer:
            lines = list(answer.iter_lines()) if answer.status_code == 200 else []
            done = "done" if "data: [DONE]" in lines else "cut"
            return f"{answer.status_code} {done}" if lines else str(answer.status_code)
    if kind == "bad":
        return str(httpx.post(url, json=body | {"temperature": 2}, timeout=300).status_code)
    if kind == "broken":
        content = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}]
        message = {"role": "user", "content": [*content, {"type": "text", "text": "What?"}]}
        return str(httpx.post(url, json=body | {"messages": [message]}, timeout=300).status_code)
    if kind == "huge":
        try:
            return str(httpx.post(url, content=b"{" + b" " * (40 << 20), headers=JSON, timeout=300).status_code)
        except httpx.WriteError:
            return "413"  # answered and closed while the body was still on its way
    # gone: the client leaves in the middle of its body
    with socket.create_connection(("127.0.0.1", httpx.URL(base).port)) as client:
        client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n")
        client.sendall(b"Content-Length: 1000\r\n\r\n{")
        time.sleep(0.5)
    return "left"


@contextlib.contextmanager
def serving(environment: dict[str, str], *options: str) -> Iterator[tuple[str, int]]:
    """Address and process of a server of nano that is ready; it is ended afterwards."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    base = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "vitos", "serve", "nano", "--port", str(port), *options]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | environment)
    try:
        while True:
            try:
                httpx.get(f"{base}/health")
                break
            except httpx.ConnectError:
                if server.poll() is not None:
                    raise SystemExit("the server ended before it was ready") from None
                time.sleep(0.2)
        yield base, server.pid
    finally:
        server.terminate()
        code = server.wait(60)
        print(f"the server's exit code: {code}", file=sys.stderr)


JSON = {"Content-Type": "application/json"}
KINDS = {"good": 0.6, "stream": 0.15, "bad": 0.1, "broken": 0.05, "huge": 0.03, "gone": 0.07}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=600)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        good = bodies(Path(folder))
    with serving({}, "--max-waiting", "8") as (base, pid):
        for body in good:  # all images known and all code warm, before memory is read
            httpx.post(f"{base}/v1/chat/completions", json=body, timeout=300)
        before = state(pid, base)
        rng = random.Random(args.seed)
        kinds = rng.choices(list(KINDS), list(KINDS.values()), k=args.requests)
        todo = collections.deque((kind, rng.choice(good)) for kind in kinds)
        outcomes: collections.Counter[tuple[str, str]] = collections.Counter()
        seconds: list[float] = []

        def client() -> None:
            while todo:
                try:
                    kind, body = todo.popleft()
                except IndexError:
                    return
                started = time.perf_counter()
                outcome = one(kind, base, body)
                if outcome in ("200", "200 done"):
                    seconds.append(time.perf_counter() - started)
                outcomes[kind, outcome] += 1

        threads = [threading.Thread(target=client) for _ in range(args.clients)]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        spent = time.perf_counter() - started
        time.sleep(2)
        after = state(pid, base)
    result = {
        "requests": args.requests,
        "clients": args.clients,
        "seed": args.seed,
        "outcomes": {f"{kind}: {outcome}": count for (kind, outcome), count in sorted(outcomes.items())},
        "lost": args.requests - sum(outcomes.values()),
        "answers": len(seconds),
        "answers_per_second": round(len(seconds) / spent, 2),
        "p50_seconds": round(float(np.percentile(seconds, 50)), 2),
        "p95_seconds": round(float(np.percentile(seconds, 95)), 2),
        "before": before,
        "after": after,
    }
    (HERE / "results.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
