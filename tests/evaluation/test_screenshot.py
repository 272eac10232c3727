"""The report as a browser draws it: the number on the first screen, in light and in dark, and nothing too wide."""

import json
import re
import shutil
import subprocess

import pytest
from report_inputs import make_report

from draft_model.evaluation.report import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium here; Debian: apt-get install chromium")
TRAINED = {"light": (0x1D, 0x5F, 0xD1), "dark": (0x6E, 0xA8, 0xFF)}


def browse(folder, *options):
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync",
        "--disable-component-update", "--no-first-run", "--hide-scrollbars", "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={folder / 'profile'}", *options,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=240).stdout


@pytest.mark.parametrize("scheme", TRAINED)
def test_the_first_screen_is_drawn(tmp_path, scheme):
    from PIL import Image

    report, picture = tmp_path / "report.html", tmp_path / "report.png"
    write_report(report, make_report())
    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    browse(tmp_path, f"--screenshot={picture}", "--window-size=1280,900", *dark, report.as_uri())
    image = Image.open(picture).convert("RGB")
    assert image.size == (1280, 900)
    colours = dict(map(reversed, image.getcolors(1 << 24)))
    # The acceptance length and the bar of the trained draft are the only things of that colour so high up.
    assert colours.get(TRAINED[scheme], 0) > 1000
    assert (sum(image.getpixel((2, 2))) > 600) == (scheme == "light")
    assert len(colours) > 50


def measured(folder, width, height, expression):
    """What a page around the report finds in it, at the size of a screen: the report itself forbids scripts."""
    report, page = folder / "report.html", folder / "page.html"
    write_report(report, make_report())
    page.write_text(
        f'<iframe id="f" width="{width}" height="{height}" src={json.dumps(report.as_uri())}></iframe><p id="out"></p>'
        "<script>onload = () => { const d = document.getElementById('f').contentDocument.documentElement;"
        f"document.getElementById('out').textContent = `found ${{{expression}}}.`; }}</script>",
        encoding="utf-8",
    )
    drawn = browse(folder, "--allow-file-access-from-files", "--dump-dom", page.as_uri())
    return re.search(r"found (.*?)\.<", drawn)[1]


def test_nothing_is_wider_than_a_telephone(tmp_path):
    assert measured(tmp_path, 390, 800, "[d.scrollWidth, d.clientWidth]") == "390,390"


def test_what_a_manager_asks_fits_one_screen(tmp_path):
    # What was trained, how much it saves, and the tiles: lossless, on what, how long, what to check.
    bottoms = "[...d.querySelectorAll('h1, .hero, .tiles')].map(e => Math.round(e.getBoundingClientRect().bottom))"
    title, saved, tiles = map(int, measured(tmp_path, 1280, 800, bottoms).split(","))
    assert title < saved <= tiles <= 800
