"""Headless Chromium of the system, for tests of pages. They are skipped, with the reason, where it is missing.

Accessibility is checked by axe-core from the npm registry. `VITOS_AXE=path/to/axe.min.js` names a copy of it.
"""

import functools
import os
import shutil
import subprocess
import tarfile
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or ""
ARGUMENTS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="there is no chromium on this machine: apt install chromium")


@contextmanager
def chromium():
    """A browser with a profile of its own."""
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=[*ARGUMENTS])
        yield browser
        browser.close()


AXE_VERSION = "4.14.1"


@functools.cache
def axe_script():
    """The text of axe.min.js; skips, with the reason, where it cannot be had."""
    if named := os.environ.get("VITOS_AXE"):
        return Path(named).read_text(encoding="utf-8")
    if not shutil.which("npm"):
        pytest.skip("needs axe-core: npm is missing, and VITOS_AXE names no axe.min.js")
    with tempfile.TemporaryDirectory() as folder:
        command = ["npm", "pack", f"axe-core@{AXE_VERSION}", "--silent", "--fetch-retries=0", "--fetch-timeout=10000"]
        try:
            subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=60)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
            pytest.skip(f"needs axe-core: npm could not get axe-core@{AXE_VERSION}, and VITOS_AXE names no axe.min.js")
        with tarfile.open(next(Path(folder).glob("*.tgz"))) as archive:
            return archive.extractfile("package/axe.min.js").read().decode()


def serious_faults(page):
    """Serious and critical faults that axe-core finds on a page: rule, and the elements at fault."""
    if not page.evaluate("typeof axe === 'object'"):
        page.evaluate(axe_script())
    found = page.evaluate("axe.run()")["violations"]
    return [
        (one["id"], [node["html"][:160] for node in one["nodes"]])
        for one in found
        if one["impact"] in ("serious", "critical")
    ]


def low_contrast(page):
    """Elements that hold text directly with less contrast than WCAG 2.1 AA wants, 4.5 : 1."""
    return page.evaluate(CONTRAST)


CONTRAST = """() => {
  const parse = c => (c.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const under = e => {
    for (; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (c.length < 4 || c[3] > 0.5) return c;
    }
    return [255, 255, 255];
  };
  const bad = [];
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    const seen = e.checkVisibility({ checkOpacity: true, checkVisibilityCSS: true });
    if (!own || !seen || e.tagName === "STYLE") continue;
    const box = e.getBoundingClientRect();
    if (box.width < 2 || box.height < 2) continue;
    const [a, b] = [light(parse(getComputedStyle(e).color)), light(under(e))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) bad.push(`${ratio.toFixed(2)} ${e.className} ${e.textContent.trim().slice(0, 40)}`);
  }
  return bad;
}"""
