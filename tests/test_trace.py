"""The replay page in a real browser: what each pass shows, its controls, its themes, text that tries to be markup."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import a2d_jax
from a2d_jax.trace import render_page, trace_record

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WORLD_BASE = Path(a2d_jax.__file__).parent / "world_base"
QUESTION = "what goes into the amber bread?"
MARKUP = (
    '</script><script>document.title="broken"</script><img src=x onerror=\'document.title="broken"\'>&lt;b&gt;\u2028'
)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")


@pytest.fixture(scope="module")
def decoded():
    """One question answered, recorded; and again with a monitor that stops it at the first pass."""
    tokenizer = a2d_jax.load_tokenizer(WORLD_BASE)
    model = a2d_jax.load_pretrained(WORLD_BASE, dtype=jnp.float32)
    prompt = tokenizer.encode_prompt(QUESTION)
    records, results = [], []
    for reject_above in (None, -1.0):
        config = a2d_jax.SamplerConfig(gen_length=8, steps=8, block_length=4, reject_above=reject_above)
        result = a2d_jax.generate(model, [prompt], config, trace=True)
        answer = tokenizer.decode(result.tokens[0, len(prompt) :], skip_special_tokens=True)
        given = prompt + [tokenizer.mask_id] * config.gen_length
        records.append(trace_record(tokenizer, QUESTION, answer, given, result, 0, config))
        results.append(result)
    return tokenizer, records, results


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Root, as in containers, cannot have Chromium's own sandbox.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, tmp_path):
    """Opens records in a page without network; fails the test if the page reports an error or asks for anything."""
    contexts, complaints = [], []

    def open_page(records, color_scheme="light"):
        (tmp_path / "trace.html").write_text(render_page(records), encoding="utf-8")
        context = browser.new_context(offline=True, color_scheme=color_scheme)
        contexts.append(context)
        context.set_default_timeout(10_000)
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("request", lambda request: None if request.url.startswith("file:") else complaints.append(request.url))
        page.goto((tmp_path / "trace.html").as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def shown(page) -> dict[int, str]:
    """Position -> text of the tokens that the page shows as revealed."""
    chips = page.locator("#text .token").all()
    return {i: chip.text_content() for i, chip in enumerate(chips) if "shown" in chip.get_attribute("class")}


def test_a_record_holds_the_recording(decoded):
    tokenizer, (record, stopped), (result, _) = decoded
    trace = result.trace
    assert [slot["step"] for slot in record["slots"]] == np.asarray(trace.revealed_step)[0, -8:].tolist()
    assert sorted(slot["step"] for slot in record["slots"]) == list(range(8))  # one token a pass
    assert record["parts"][1] == [0, 8] and QUESTION in record["parts"][0]
    assert all(of_pass[4:] == [None] * 4 for of_pass in record["eos"][:4])  # the second block is looked at later
    np.testing.assert_allclose(record["eos"][0][0], result.eos_prob[0, 0], rtol=5e-3)
    assert (stopped["stop"], stopped["passes"], stopped["threshold"]) == (0, 1, -1.0)
    assert {slot["kind"] for slot in stopped["slots"]} == {"mask"}
    with pytest.raises(ValueError, match="trace=True"):
        trace_record(tokenizer, "", "", [], result._replace(trace=None), 0, a2d_jax.SamplerConfig())


def test_generate_writes_the_page_of_filled_blanks(tmp_path):
    page = tmp_path / "trace.html"
    command = [
        sys.executable, "-m", "a2d_jax.generate", f"--checkpoint={WORLD_BASE}", "--prompt=the <mask:2> cake",
        f"--trace={page}", "--dtype=float32",
    ]  # fmt: skip
    subprocess.run(command, cwd=Path(__file__).parents[1], check=True, capture_output=True)
    data = re.search(r'id="data">(.*?)</script>', page.read_text(encoding="utf-8"), re.DOTALL).group(1)
    (record,) = json.loads(data)
    assert record["parts"] == ["the", [0, 2], "cake"] and record["passes"] == 2
    assert record["answer"].split()[1:-1] == [slot["text"] for slot in record["slots"]]


def test_text_cannot_leave_its_data_block():
    page = render_page([{"prompt": MARKUP}])
    assert page.count("<script") == 2 and "\u2028" not in page
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL).group(1)
    assert json.loads(data) == [{"prompt": MARKUP}]


@needs_browser
def test_tokens_appear_in_the_order_they_were_revealed(decoded, open_page):
    _, (record, _), (result, _) = decoded
    page = open_page([record])
    revealed_step = np.asarray(result.trace.revealed_step)[0, -8:]
    assert shown(page) == {} and page.locator("#text .masked").count() == 8
    for num_passes in range(1, 9):
        page.get_by_role("button", name="One pass on").click()
        assert set(shown(page)) == set(np.flatnonzero(revealed_step < num_passes))
        assert page.locator("#text .fresh").count() == 1
        assert page.locator("#count").text_content() == f"{num_passes} of 8 passes"
    assert shown(page) == {i: slot["text"] for i, slot in enumerate(record["slots"])}
    page.get_by_role("button", name="One pass back").click()
    assert len(shown(page)) == 7


@needs_browser
def test_keyboard_slider_table_map_and_play_move_the_replay(decoded, open_page):
    from playwright.sync_api import expect

    page = open_page([decoded[1][0]])
    count = page.locator("#count")
    for key, passes in [("ArrowRight", 1), ("End", 8), ("ArrowLeft", 7), ("Home", 0), ("ArrowLeft", 0)]:
        page.keyboard.press(key)
        assert count.text_content() == f"{passes} of 8 passes"
    slider = page.get_by_role("slider", name="Forward pass")
    slider.fill("3")
    assert count.text_content() == "3 of 8 passes" and len(shown(page)) == 3
    assert slider.get_attribute("aria-valuetext") == "after pass 3 of 8"
    slider.press("ArrowRight")  # once, not once by the slider and once by the page
    assert count.text_content() == "4 of 8 passes"
    page.get_by_text("Order of revealing").click()
    page.get_by_role("button", name="Go to pass 6").click()
    assert count.text_content() == "6 of 8 passes" and page.locator("tr.now").count() == 1
    box = page.locator("#map").bounding_box()
    page.locator("#map").click(position={"x": 5, "y": box["height"] * 1.5 / 8})
    assert count.text_content() == "2 of 8 passes"
    page.locator("#speed").select_option("fast")
    page.locator("h1").click()  # away from the buttons, where space presses them
    page.keyboard.press(" ")
    expect(count).to_have_text("8 of 8 passes")
    assert page.get_by_role("button", name="Play").get_attribute("aria-pressed") == "false"


@needs_browser
def test_confidence_and_eos_probability_are_colours_and_numbers(decoded, open_page):
    record = json.loads(json.dumps(decoded[1][0]))
    first, second = (slot for slot in record["slots"] if slot["step"] in (0, 1))
    first["confidence"], second["confidence"] = 1.0, 0.0
    record["eos"][1] = [1.0 if p is not None else None for p in record["eos"][1]]
    page = open_page([record])
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    colours = [chip.evaluate("chip => getComputedStyle(chip).backgroundColor") for chip in page.locator(".shown").all()]
    assert colours[0] != colours[1]
    titles = [chip.get_attribute("title") for chip in page.locator(".shown").all()]
    assert sorted(title.split(", ")[1] for title in titles) == ["confidence 0.000", "confidence 1.000"]
    cells = page.locator("#strip i:not(.none)")
    assert cells.count() == 3  # the pass saw the block of four less the one revealed before
    assert cells.first.get_attribute("title").endswith("P([EOS]) 1.000")
    assert "highest 1.000" in page.locator("#said").text_content()


@needs_browser
def test_a_stopped_decoding_says_where_and_why(decoded, open_page):
    _, (record, stopped), _ = decoded
    page = open_page([record, stopped])
    assert page.locator("#badge").text_content() == "Finished after 8 passes" and page.locator("#limit").count() == 0
    page.get_by_label("Decoding", exact=True).select_option("1")
    assert page.locator("#badge").text_content() == "Stopped by the monitor at pass 1"
    page.keyboard.press("Escape")
    page.locator("h1").click()
    page.keyboard.press("End")
    assert "the monitor stopped" in page.locator("#said").text_content()
    assert page.locator("#limit").count() == 1 and page.locator("#stop").count() == 1
    assert "threshold -1 (left-most mask, first pass)" in page.locator("#chart").text_content()
    assert page.locator("#strip i.over").count() == 4
    assert "withdrawn" in page.locator("#answer").text_content()


@needs_browser
def test_markup_from_a_model_or_a_user_stays_text(decoded, open_page):
    record = json.loads(json.dumps(decoded[1][0])) | {"prompt": MARKUP, "answer": MARKUP, "settings": {MARKUP: MARKUP}}
    record["parts"][0] = MARKUP
    record["slots"][0]["text"] = MARKUP
    page = open_page([record, record])
    page.keyboard.press("End")
    assert page.locator("#prompt").text_content() == MARKUP and shown(page)[0] == MARKUP
    assert page.title() == "Decoding replay" and page.locator("img").count() == 0


@needs_browser
@pytest.mark.parametrize("color_scheme", ["light", "dark"])
def test_text_has_contrast_in_both_themes(decoded, open_page, color_scheme):
    """4.5 to 1 for every kind of text on its own background (WCAG AA)."""
    page = open_page([decoded[1][1]], color_scheme)
    colours = page.evaluate(
        """() => ["#prompt", "#settings", "#badge", "#said", "#answer", ".given", ".note", "#play"].map((selector) => {
            const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
            const rgb = (colour) => {
                canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
                return [...canvas.getImageData(0, 0, 1, 1).data];
            };
            const element = document.querySelector(selector);
            let behind = element;
            while (rgb(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
            return [selector, rgb(getComputedStyle(element).color), rgb(getComputedStyle(behind).backgroundColor)];
        })"""
    )

    def luminance(rgb):
        linear = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb[:3]]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for selector, ink, ground in colours:
        dark, light = sorted([luminance(ink), luminance(ground)])
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (selector, ink, ground)
    assert (luminance(colours[0][1]) < 0.2) == (color_scheme == "light")
