"""vLLM in this process, for tests that need the real one; without it they are skipped with the reason.

`make test-vllm` runs them in a separate environment.
"""

import gc
import os

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


def pytest_terminal_summary(terminalreporter):
    done = [report for report in terminalreporter.stats.get("passed", []) if report.when == "call"]
    rows = [value for report in done for name, value in report.user_properties if name == "figures"]
    if rows:
        terminalreporter.section("vLLM against the torch engine")
        terminalreporter.write_line(f"{'model, way, case':74} kept greedy   |Δ| prompt  |Δ| output")
        for row in rows:
            terminalreporter.write_line(row)


@pytest.fixture
def note(record_property):
    """`note(name, kept, tokens, prompt, output)`: adds a row to the table at the end of the output.

    As a property of the test, because it may run in another process (pytest-xdist).
    """

    def add(name, kept, tokens, prompt, output):
        record_property("figures", f"{name:74} {kept:4} {tokens:6}   {prompt:10.1e}  {output:10.1e}")

    return add


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
