"""What lies on the disk while the demo runs, and after it was stopped."""

import os
import signal
import stat
import subprocess
import sys

import httpx
import pytest
from tests.processes import free_port, page_of

pytest.importorskip("gradio", reason="the demo extra is not installed")

SCRIPT = """
import sys
from vitos.serve.demo.private import private_folder

with private_folder() as folder:
    from vitos.policy.vlm import SparseVLM
    from vitos.serve.demo.page import launch
    launch(SparseVLM.from_pretrained("nano", device="cpu"), folder, port=int(sys.argv[1]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_uploads_are_private_and_go_when_the_demo_is_stopped(tmp_path, number):
    """Gradio's own folder is not usable, as if another user owned it."""
    (tmp_path / "gradio").write_text("not a folder of ours")
    port = free_port()
    address = f"http://127.0.0.1:{port}/"
    environment = {k: v for k, v in os.environ.items() if k != "GRADIO_TEMP_DIR"} | {"TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(port)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        page = page_of(address, process)
        if page is None:
            process.kill()
        assert page is not None, process.communicate()
        upload = httpx.post(f"{address}gradio_api/upload", files={"files": ("Jane_Doe_1950.png", b"her picture")})
        (folder,) = tmp_path.glob("vitos-demo-*")
        (path,) = upload.json()
        assert path.startswith(str(folder))
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        process.send_signal(number)
        process.send_signal(number)  # as an impatient person does
        process.wait(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert [file.name for file in tmp_path.iterdir()] == ["gradio"]
