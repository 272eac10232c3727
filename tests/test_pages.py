"""Every HTML page that this project writes, as a browser draws it: at a desk and on a telephone, in light and dark.

KFP's UI shows the pages as artifacts, so they must bring all that they need and complain of nothing.
"""

import io
import json

import pytest
import tiny
from browser import BROWSER, Browser
from evaluation.report_inputs import make_report

from draft_model.dataset import REPORT_PAGE, DatasetConfig, run
from draft_model.evaluation.report import write_report
from draft_model.parameters import Parameters

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium here; Debian: apt-get install chromium")

TOO_WIDE = "document.documentElement.scrollWidth > document.documentElement.clientWidth"
TEXTS = """
(() => {
  const parse = colour => colour.match(/[\\d.]+/g).map(Number);
  const over = (top, below) => [0, 1, 2].map(i => top[i] * (top[3] ?? 1) + below[i] * (1 - (top[3] ?? 1)));
  const background = element => {
    const colours = [];
    for (let e = element; e; e = e.parentElement) colours.push(parse(getComputedStyle(e).backgroundColor));
    const page = matchMedia('(prefers-color-scheme: dark)').matches ? [18, 18, 18] : [255, 255, 255];
    return colours.reverse().reduce((below, top) => over(top, below), page);
  };
  const light = colour => {
    const [r, g, b] = colour.map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const scrolls = e => e && (['auto', 'scroll'].includes(getComputedStyle(e).overflowX) || scrolls(e.parentElement));
  const found = [];
  for (const element of document.body.querySelectorAll('*')) {
    const own = [...element.childNodes].filter(n => n.nodeType === 3 && n.textContent.trim());
    const box = element.getBoundingClientRect(), style = getComputedStyle(element);
    const unseen = style.visibility === 'hidden' || style.clipPath !== 'none';
    if (!own.length || !box.width || !box.height || unseen) continue;
    const svg = element instanceof SVGElement;
    const below = background(svg ? element.ownerSVGElement : element);
    const ink = over(parse(svg ? style.fill : style.color), below);
    const [a, b] = [light(ink), light(below)].sort((x, y) => y - x);
    const drawn = svg && element.getScreenCTM();
    const scale = svg ? Math.hypot(drawn.a, drawn.b) : 1;
    found.push({
      text: own[0].textContent.trim().slice(0, 40), size: parseFloat(style.fontSize) * scale,
      contrast: (a + 0.05) / (b + 0.05), outside: !scrolls(element) && (box.left < 0 || box.right > innerWidth + 0.5),
    });
  }
  return found;
})()
"""
"""Of each text: its size in pixels, its contrast as WCAG 2 has it, and whether it lies beside the screen."""


@pytest.fixture(scope="module")
def pages(inputs, tmp_path_factory):
    """All pages, from inputs that fill each of their parts."""
    folder = tmp_path_factory.mktemp("pages")
    write_report(folder / "evaluation.html", make_report())
    rows = [json.dumps(row) for row in tiny.conversations(60)]
    rows[7], rows[11] = "no JSON", json.dumps({"conversations": [{"role": "user", "content": "<b>&amp;" * 40}]})
    train = folder / "a-rather-long-name-of-a-file-that-nothing-in-it-can-be-broken-at.jsonl"
    train.write_text("\n".join(rows))
    validation = tiny.write_jsonl(folder / "validation.jsonl", tiny.conversations(9, seed=1))
    data = {"dataset_train_split": str(train), "dataset_validation_split": str(validation), "chat_template": "qwen"}
    parameters = Parameters(**data, max_length=48, max_rejected_fraction=0.2)
    dataset = folder / "dataset"
    run(DatasetConfig(inputs.model, str(dataset), parameters, folder / "work"))
    return {"evaluation": folder / "evaluation.html", "dataset": dataset / REPORT_PAGE}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("page", ["evaluation", "dataset"])
def test_a_page_is_readable_and_asks_for_nothing(browser, pages, page, width, scheme):
    browser.open(pages[page], width, scheme)
    assert browser.complaints == []
    assert [url for url in browser.requests if not url.startswith("data:")] == [pages[page].as_uri()]
    assert browser.find(f"[innerWidth, {TOO_WIDE}]") == [width, False]
    texts = browser.find(TEXTS)
    assert len(texts) > 40
    assert [text for text in texts if text["outside"]] == []
    assert [text for text in texts if text["size"] < 10] == []
    assert [text for text in texts if text["contrast"] < 4.5] == []
    bright = browser.find("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).every(v => v > 128)")
    assert bright == (scheme == "light")


TRAINED = {"light": (0x1D, 0x5F, 0xD1), "dark": (0x6E, 0xA8, 0xFF)}


@pytest.mark.parametrize("scheme", TRAINED)
def test_the_first_screen_of_the_evaluation_has_what_a_manager_asks(browser, pages, scheme):
    from PIL import Image

    browser.open(pages["evaluation"], 1280, scheme)
    # What was trained, how much it saves, and the tiles: lossless, on what, how long, what to check.
    bottoms = "[...document.querySelectorAll('h1, .hero, .tiles')].map(e => e.getBoundingClientRect().bottom)"
    title, saved, tiles = browser.find(bottoms)
    assert title < saved <= tiles <= 800
    image = Image.open(io.BytesIO(browser.picture())).convert("RGB")
    assert image.size == (1280, 800)
    colours = dict(map(reversed, image.getcolors(1 << 24)))
    # The acceptance length and the bar of the trained draft are the only things of that colour so high up.
    assert colours.get(TRAINED[scheme], 0) > 1000
    assert (sum(image.getpixel((2, 2))) > 600) == (scheme == "light")
    assert len(colours) > 50


@pytest.mark.parametrize("fault", ["script", "image", "wide", "pale"])
def test_a_page_with_a_fault_is_found_out(browser, pages, tmp_path, fault):
    spoilt = {
        "script": "<script>throw 1</script>",
        "image": '<img src="http://127.0.0.1:9/x.png">',
        "wide": '<div style="width: 500px; white-space: nowrap">text</div>',
        "pale": '<p style="color: #ccc; background: #fff">text</p>',
    }
    page = tmp_path / "page.html"
    html = pages["dataset"].read_text(encoding="utf-8")
    if fault == "script":
        html = html.replace("default-src 'none';", "default-src 'none'; script-src 'unsafe-inline';")
    page.write_text(html.replace("</body>", f"{spoilt[fault]}</body>"), encoding="utf-8")
    browser.open(page, 400, "light")
    if fault in ("script", "image"):
        assert browser.complaints
    elif fault == "wide":
        assert browser.find(TOO_WIDE)
    else:
        assert [text["text"] for text in browser.find(TEXTS) if text["contrast"] < 4.5] == ["text"]
