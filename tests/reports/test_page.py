"""The page of a report, read by Python's HTML parser: what it holds, and that hostile names are nothing but text."""

import base64
import hashlib
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from hf_poolformer.foundation.errors import UserError
from hf_poolformer.foundation.names import printable
from hf_poolformer.reports import page as pages
from hf_poolformer.reports.charts import FAINT
from hf_poolformer.reports.page import (
    Bars,
    Chart,
    Commands,
    Facts,
    Gallery,
    Page,
    Section,
    Table,
    Text,
    Tile,
    write_page,
)


VOID = {"meta", "link", "img", "br"}
HOSTILE = [
    "<script>alert(1)</script>",
    "\"><img src=x onerror=alert(1)>' onload='alert(2)",
    "</style></svg></title><iframe src=//example.com>",
    "{{ 7 * 7 }}{% raw %}",
    "line\nbreak\0 nul",
    "lone \ud800 and undecodable \udce9",
    "\u202egnp.exe",
    "$\\frac{1}$ $x_2$",
    "&amp;&#60;",
    "x" * 10_000,
]


class Reader(HTMLParser):
    """Elements as (tag, attributes), and the text in each; complains of tags that do not close."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def text(self, *tags):
        return [text.strip() for tag, text in self.texts if tag in tags]


def read(tmp_path, page):
    path = tmp_path / "report.html"
    write_page(path, page)
    return Reader(path.read_text(encoding="utf-8"))


def picture(index=0, size=(60, 40)):
    pixels = np.random.default_rng(index).integers(0, 255, (size[1] // 10, size[0] // 10, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size)


def with_every_part(name):
    """A page that says `name` wherever it can."""

    def draw(axes):
        axes.bar([0, 1], [0.2, 0.7], label=name)
        axes.axhline(0.5, color=FAINT)
        axes.set_xticks([0, 1], [name[:50], "other"])
        axes.set(title=name[:50], ylabel=name[:50])
        axes.legend()

    return Page(
        name,
        name,
        [
            Section(name, [Facts([("images", "12"), (name, name)]), Text(f"one\n\n{name}")], intro=name, level="bad"),
            Section(
                "Classes",
                [
                    Bars([("cat", 3, "3"), (name, 1, name), ("none", float("nan"), "?")], caption=name),
                    Table([name, "F1"], [[name, 0.5], ["b", None], ["c", float("nan")]], name, ["", ".3f"]),
                    Chart(draw, alt=name, caption=name),
                ],
                level="warning",
            ),
            Section("Images", [Gallery([Tile([picture(), picture(1)], [name, "b"], note=name)], caption=name)]),
            Section("Next", [Commands([name, "hf-poolformer env"]), Table(["nothing"], [])], level="good"),
        ],
    )


def test_a_page_is_one_file_that_asks_for_nothing(tmp_path):
    found = read(tmp_path, with_every_part("cat"))
    tags = [tag for tag, _ in found.elements]
    assert not {"iframe", "object", "embed", "base", "form", "audio", "video"} & set(tags)
    for tag, attributes in found.elements:
        assert not [name for name in attributes if name.startswith("on") or name in ("style", "srcset")], tag
        for name in ("src", "href", "xlink:href", "clip-path"):
            address = attributes.get(name, "#")
            assert address.startswith(("data:", "#", "url(#")), address
    policies = [meta["content"] for meta in found.all("meta") if "http-equiv" in meta]
    policy = dict(part.strip().split(" ", 1) for part in policies[0].split(";"))
    assert policy.keys() == {"default-src", "img-src", "style-src", "script-src", "base-uri", "form-action"}
    assert policy["default-src"] == "'none'" and policy["img-src"] == "data:"
    for tag, directive in (("style", "style-src"), ("script", "script-src")):
        (text,) = (text for inside, text in found.texts if inside == tag)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy[directive] == f"'sha256-{digest}'"


def test_headings_anchors_and_text_alternatives(tmp_path):
    found = read(tmp_path, with_every_part("cat"))
    ids = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    anchors = [link["href"] for link in found.all("a")]
    assert anchors == ["#s1", "#s2", "#s3", "#s4"] and {anchor[1:] for anchor in anchors} <= set(ids)
    headings = [tag for tag, _ in found.elements if re.fullmatch("h[1-6]", tag)]
    assert headings == ["h1", "h2", "h2", "h2", "h2"]
    assert [image["alt"] for image in found.all("img")] == ["cat (1 of 2)", "cat (2 of 2)"]
    assert {"role": "img", "aria-label": "cat"} in found.all("div")
    badges = [words for tag, words in found.texts if tag == "span"]
    assert badges == ["mend this", "look at this", "good"] * 2, "beside the title and in the list of contents"


def test_figures_are_written_as_they_are_asked_for(tmp_path):
    headings = ["name", "count", "share", "any", "mixed"]
    rows = [
        ["a", 1234, np.float32(0.12345), 0.000123456, 1],
        [None, None, float("nan"), float("inf"), "one"],
        ["c", np.int64(7), 1, 12345.6789, True],
    ]
    found = read(tmp_path, Page("t", "", [Section("s", [Table(headings, rows, formats=["", ",", ".1%", "", ""])])]))
    cells = [text for tag, text in found.texts if tag == "td"]
    assert cells[:5] == ["a", "1,234", "12.3%", "0.0001235", "1"]
    assert cells[5:10] == ["—", "—", "—", "inf", "one"]
    assert cells[10:] == ["c", "7", "100.0%", "12,346", "True"]
    with pytest.raises(ValueError, match="zip"):
        write_page(tmp_path / "x.html", Page("t", "", [Section("s", [Table(["a", "b"], [["one cell"]])])]))


@pytest.mark.parametrize("name", HOSTILE, ids=lambda name: ascii(name[:12]))
def test_a_hostile_name_is_text(tmp_path, name):
    harmless = read(tmp_path, with_every_part("cat"))
    found = read(tmp_path, with_every_part(name))
    elements = [(tag, attributes.keys() - {"class"}) for tag, attributes in found.elements if tag != "tspan"]
    drawn = {"g", "path", "text", "use", "defs"}  # how many there are depends on a chart's text
    assert [e for e in elements if e[0] not in drawn] == [
        (tag, attributes.keys() - {"class"}) for tag, attributes in harmless.elements if tag not in drawn
    ]
    said = printable(name)
    if len(name) <= pages.LONGEST:
        for tag in ("title", "h1", "h2", "dt", "dd", "th", "td", "caption", "figcaption", "p"):
            assert said in found.text(tag) or " ".join(said.split()) in found.text(tag), tag
        assert any(text.startswith(said[:4]) for text in found.text("text", "tspan")), (
            "in the chart, whose lines may break"
        )
    else:
        assert any(text.startswith("xxx") and "…" in text and len(text) < 200 for text in found.text("td"))
    assert found.text("code") == [f"{said}\nhf-poolformer env"], "commands are whole"


def test_the_same_page_gives_the_same_bytes_and_ids_of_two_charts_differ(tmp_path):
    chart = with_every_part("cat").sections[1].parts[2]
    page = Page("t", "", [Section("s", [chart, chart])])
    found = read(tmp_path, page)
    before = (tmp_path / "report.html").read_bytes()
    write_page(tmp_path / "report.html", page)
    assert (tmp_path / "report.html").read_bytes() == before
    ids = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    wanted = {value[1:] for use in found.all("use") for value in use.values() if value.startswith("#")}
    assert wanted and wanted <= set(ids)


def test_charts_follow_dark_and_light(tmp_path):
    def draw(axes):
        axes.semilogy([1, 2], [1, 100], label="a")
        axes.scatter([1], [10], color="C2")
        axes.text(1, 1, "white", color="white")

    read(tmp_path, Page("t", "", [Section("s", [Chart(draw, "alt")])]))
    svg = re.search("<svg.*</svg>", (tmp_path / "report.html").read_text(), re.DOTALL)[0]
    for variable in ("ink", "series-1", "series-3"):
        assert f"var(--{variable})" in svg
    assert 'fill="#ffffff"' in svg and "mathdefault" not in svg
    assert set(re.findall("#[0-9a-f]{6}", svg)) == {"#ffffff"}, "what was asked for, and nothing else"


def test_a_chart_that_cannot_be_drawn_ends_nothing(tmp_path, caplog):
    def draw(axes):
        raise ValueError("no such font")

    found = read(tmp_path, Page("t", "", [Section("s", [Chart(draw, "rising"), Text("after")])]))
    assert found.text("p") == ["rising", "after"] and not found.all("svg")
    assert "no such font" in caplog.text


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"])
def test_images_of_every_mode(tmp_path, mode):
    source = Image.fromarray(np.linspace(0, 255, 40 * 60).reshape(40, 60).astype(np.uint8))
    if mode.startswith(("I", "F")):
        source = Image.fromarray(
            (np.asarray(source) / (255 if mode == "F" else 1)).astype(
                {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
            )
        )
    else:
        source = source.convert(mode)
    found = read(tmp_path, Page("t", "", [Section("s", [Gallery([Tile([source], [mode])])])]))
    (image,) = found.all("img")
    assert re.match("data:image/(png|jpeg|webp);base64,", image["src"])
    assert (image["width"], image["height"], image["class"]) == ("96", "64", "pixelated")


def test_many_images_stay_small(tmp_path):
    """Noise, the worst there is: 200 tiles of it would be 2 MB."""
    noise = np.random.default_rng(0).integers(0, 255, (20, 300, 300, 3), dtype=np.uint8)
    tiles = [Tile([Image.fromarray(pixels)], ["noise"]) for pixels in noise]
    read(tmp_path, Page("t", "", [Section("s", [Gallery(tiles)])]))
    assert (tmp_path / "report.html").stat().st_size < 220_000
    long = Gallery([Tile([Image.new("RGB", (3000, 2))], ["a line"])])
    (image,) = read(tmp_path, Page("t", "", [Section("s", [long])])).all("img")
    assert (image["width"], image["height"]) == ("96", "1")


def test_a_file_is_whole_or_not_there(tmp_path):
    write_page(tmp_path / "new" / "report.html", Page("first", "", []))
    with pytest.raises(AttributeError):
        write_page(tmp_path / "new" / "report.html", Page("second", "", [Section("s", [Text(None)])]))
    (only,) = (tmp_path / "new").iterdir()
    assert "first" in only.read_text()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_page(tmp_path / "file" / "report.html", Page("third", "", []))


def luminance(colour):
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_every_colour_of_text_can_be_read(tmp_path):
    """WCAG 2.2, 1.4.3: contrast of at least 4.5, light and dark."""
    (style,) = read(tmp_path, Page("t", "", [])).text("style")
    schemes = [
        dict(re.findall(r"--([\w-]+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", style, re.S)
    ]
    light, dark = schemes
    assert light.keys() == dark.keys() and len(light) == 13
    for scheme in schemes:
        for name in scheme.keys() - {"paper", "card", "edge"}:
            for ground in ("paper", "card"):
                pair = sorted((luminance(scheme[name]), luminance(scheme[ground])))
                assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 4.5, (name, ground, scheme[name])
