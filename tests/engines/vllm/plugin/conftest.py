"""vLLM in this process, for tests that need the real one; without it they are skipped with the reason.

`make test-vllm` runs them in a separate environment.
"""

import gc
import os
from importlib.metadata import version
from pathlib import Path

import pytest

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
# Blocks of 32 tokens, not of 128: the prefix cache holds whole blocks, and our prompts are short.
SMALL = {"dtype": "float32", "enforce_eager": True, "max_model_len": 2048, "max_num_seqs": 16, "block_size": 32}


PAGE = Path(__file__).parents[4] / "docs" / "vllm.md"
MARKS = "<!-- written by make test-vllm -->", "<!-- end -->"


def pytest_terminal_summary(terminalreporter):
    done = [report for report in terminalreporter.stats.get("passed", []) if report.when == "call"]
    rows = [value for report in done for name, value in report.user_properties if name == "figures"]
    if not rows:
        return
    terminalreporter.section("vLLM against the torch engine")
    terminalreporter.write_line(f"{'model, way, case':74} kept greedy   |Δ| prompt  |Δ| output")
    for name, kept, tokens, prompt, output in rows:
        terminalreporter.write_line(f"{name:74} {kept:4} {tokens:4} =   {prompt:10.1e}  {output:10.1e}")
    if os.environ.get("VITOS_WRITE_TABLES"):
        write_table(rows)


def write_table(rows):
    """Put the largest differences of each model and way into the page, with the versions that made them."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("vllm-cpu", "torch", "transformers"))
    worst = {}
    for name, _, _, prompt, output in rows:
        key = tuple(name.split("; ")[:2])
        before = worst.get(key, (0, 0.0, 0.0))
        worst[key] = (before[0] + 1, max(before[1], prompt), max(before[2], output))
    lines = ["| model | request | cases | prompt | output |", "| :-- | :-- | --: | --: | --: |"]
    for (model, way), (cases, prompt, output) in worst.items():
        last = "not compared" if output != output or way == "HTTP" else f"{output:.1e}"
        lines.append(f"| {model} | {way} | {cases} | {prompt:.1e} | {last} |")
    text = PAGE.read_text(encoding="utf-8")
    before, behind = text.split(MARKS[0])[0], text.split(MARKS[1])[1]
    table = "\n".join([MARKS[0], "", f"Versions: {versions}.", "", *lines, "", MARKS[1]])
    PAGE.write_text(before + table + behind, encoding="utf-8")


@pytest.fixture
def note(record_property):
    """`note(name, kept, tokens, prompt, output)`: adds a row to the table at the end of the output.

    As a property of the test, because it may run in another process (pytest-xdist).
    """
    return lambda *row: record_property("figures", row)


@pytest.fixture(scope="session")
def vllm():
    return pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")


@pytest.fixture(scope="session")
def started(vllm):
    """`started(folder, backbone, **options)`: a vLLM engine, started as by our server and trainer; one at a time."""
    from contextlib import contextmanager

    from vitos.engines.vllm.sampler import vllm_options

    @contextmanager
    def start(folder, backbone, **options):
        llm = vllm.LLM(
            **vllm_options(folder, backbone),
            **SMALL | options,
        )
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()
            from vllm.distributed import cleanup_dist_env_and_memory

            cleanup_dist_env_and_memory()

    return start
