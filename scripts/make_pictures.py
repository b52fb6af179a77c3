"""Draws the pictures of the documentation anew, after `make demo`: `python scripts/make_pictures.py`.

block.svg and families.svg are drawn here, the second from the table of families. curves.png is the demo's own. app.png
and explained.png are what the commands show of the demo's model. The others stay as they are: demo.png is a part of
the demo's predictions.png; inspect.png and report.png show Fashion-MNIST with faults that were put in by hand.
"""

import argparse
import html
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image

from hf_poolformer.configuration_poolformer import FAMILIES, FIRST_PAPER, MetaFormerConfig


ROOT = Path(__file__).resolve().parents[1]
FONT = "ui-sans-serif, system-ui, 'Helvetica Neue', Arial, sans-serif"
MONO = "ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace"
INK, FAINT, LINE, PAPER = "#1b2330", "#566070", "#7b8794", "#ffffff"
# Of each mixer, light enough for dark words.
COLOURS = {
    "pooling": "#bfe3d4",
    "identity": "#e6e8ec",
    "attention": "#f7cfc2",
    "separable_conv": "#c9daf6",
    "spatial_mlp": "#f4e3ab",
    "random": "#dfd0f0",
}
LARGEST = 200_000  # bytes of a picture


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draw the pictures of the documentation.")
    parser.add_argument("--demo", type=Path, default=ROOT / "outputs/demo", help="what `make demo` trained")
    parser.add_argument("--data", type=Path, default=ROOT / "outputs/demo-data", help="what it trained on")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "docs", help="(default: docs)")
    arguments = parser.parse_args(argv)
    out = arguments.output_dir
    out.mkdir(parents=True, exist_ok=True)
    (out / "block.svg").write_text(block(), encoding="utf-8", newline="\n")
    (out / "families.svg").write_text(families(), encoding="utf-8", newline="\n")
    if not (arguments.demo / "curves.png").is_file():
        print(f"error: {arguments.demo} holds no demo: run make demo first", file=sys.stderr)
        return 2
    smaller(arguments.demo / "curves.png", out / "curves.png")
    with tempfile.TemporaryDirectory() as scratch:
        digits = some_digits(arguments.data, Path(scratch))
        explained(arguments.demo, digits[0], out / "explained.png")
        app(arguments.demo, digits, out / "app.png")
    for path in sorted(out.glob("*.png")):
        if path.stat().st_size > LARGEST:
            print(f"error: {path} has {path.stat().st_size} bytes, more than {LARGEST}", file=sys.stderr)
            return 1
    return 0


# Drawn


def svg(width: int, height: int, title: str, parts: list[str]) -> str:
    """On a card of its own, so that it can be read on a light page and on a dark one."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" role="img" font-family="{FONT}">',
            f"<title>{html.escape(title)}</title>",
            '<defs><marker id="end" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{LINE}"/></marker></defs>',
            f'<rect x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8" fill="{PAPER}" '
            f'stroke="#d5dae1"/>',
            *parts,
            "</svg>\n",
        ]
    )


def words(x: float, y: float, text: str, *, size: int = 15, colour: str = INK, anchor: str = "middle", **more) -> str:
    others = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in more.items())
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{colour}" text-anchor="{anchor}"{others}>'
        f"{html.escape(text)}</text>"
    )


def box(x: float, y: float, width: float, text: str, colour: str, height: float = 44) -> list[str]:
    """Centred on (x, y)."""
    return [
        f'<rect x="{x - width / 2:g}" y="{y - height / 2:g}" width="{width:g}" height="{height:g}" rx="6" '
        f'fill="{colour}" stroke="{LINE}"/>',
        words(x, y + 5, text),
    ]


def line(path: str) -> str:
    return f'<path d="{path}" fill="none" stroke="{LINE}" stroke-width="1.6"/>'


def arrow(path: str) -> str:
    return line(path).replace("/>", ' marker-end="url(#end)"/>')


def block() -> str:
    """The block: norm, token mixer, shortcut; norm, channel MLP, shortcut."""
    parts: list[str] = []
    rows = (
        (110, "token mixer", COLOURS["pooling"], "mixes tokens: the part that is exchanged"),
        (300, "channel MLP", COLOURS["separable_conv"], "mixes channels, of each token alone"),
    )
    for y, name, colour, said in rows:
        parts += [
            words(40, y - 74, said, anchor="start", size=14, colour=FAINT),
            arrow(f"M84 {y} V{y - 44} Q84 {y - 54} 94 {y - 54} H572 Q582 {y - 54} 582 {y - 44} V{y - 15}"),
            words(333, y - 60, "shortcut", size=13, colour=FAINT),
            arrow(f"M56 {y} H126"),
            *box(170, y, 84, "norm", "#eef0f4"),
            arrow(f"M212 {y} H256"),
            *box(320, y, 124, name, colour),
            arrow(f"M382 {y} H426"),
            *box(482, y, 108, "layer scale", "#eef0f4"),
            arrow(f"M536 {y} H567"),
            f'<circle cx="582" cy="{y}" r="14" fill="#eef0f4" stroke="{LINE}"/>',
            words(582, y + 6, "+", size=18),
        ]
    parts += [
        words(44, 115, "x"),
        line("M596 110 H622 Q632 110 632 120 V168 Q632 178 622 178 H34 Q24 178 24 188 V290 Q24 300 34 300 H60"),
        arrow("M596 300 H634"),
        words(648, 305, "y"),
        words(
            340,
            358,
            "layer scale: first paper. Second paper: a scale on the shortcut, in stages 3 and 4.",
            size=13,
            colour=FAINT,
        ),
    ]
    return svg(680, 378, "The MetaFormer block", parts)


def families() -> str:
    """Which mixer each family has in which stage."""
    left, top, width, height = 186, 66, 118, 32
    parts = [words(left + width * (stage + 0.5), 34, f"stage {stage + 1}") for stage in range(4)]
    parts += [
        words(left + width * (stage + 0.5), 52, f"1/{2 ** (stage + 2)} of the side", size=12, colour=FAINT)
        for stage in range(4)
    ]
    y, paper = top, None
    for name, family in FAMILIES.items():
        this = "first paper" if family.source.startswith(FIRST_PAPER) else "second paper"
        if this != paper:
            parts.append(words(16, y + 18, this, size=13, anchor="start", colour=FAINT))
            y, paper = y + 28, this
        parts.append(words(16, y + height / 2 + 5, name, size=13, anchor="start", font_family=MONO))
        for stage, mixer in enumerate(family.config.get("token_mixers", MetaFormerConfig.token_mixers)):
            parts += [
                f'<rect x="{left + width * stage + 2}" y="{y + 2}" width="{width - 4}" height="{height - 4}" rx="4" '
                f'fill="{COLOURS[mixer]}"/>',
                words(left + width * (stage + 0.5), y + height / 2 + 5, mixer.replace("_", " "), size=13),
            ]
        y += height
    return svg(left + 4 * width + 16, y + 14, "The token mixers of the families, stage by stage", parts)


# Taken


def smaller(source: Path, goal: Path, longest: int = 1600) -> None:
    """A copy with few colours, and at most so many pixels along its longer side."""
    with Image.open(source) as image:
        picture = image.convert("RGB")
    picture.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    picture.quantize(128, dither=Image.Dither.NONE).save(goal, optimize=True)


def some_digits(data: Path, folder: Path, count: int = 4) -> list[Path]:
    """The first test image of some classes, as files."""
    rows = pq.read_table(sorted(data.glob("test-*.parquet"))[0]).to_pylist()
    first = {row["label"]: row["image"]["bytes"] for row in reversed(rows)}
    paths = []
    for label in sorted(first)[-count:]:
        paths.append(folder / f"digit-{label}.png")
        paths[-1].write_bytes(first[label])
    return paths


def explained(model: Path, image: Path, goal: Path) -> None:
    words = ["explain", str(model), str(image), "--output", str(goal.with_suffix(".large.png"))]
    subprocess.run([sys.executable, "-m", "hf_poolformer", *words], check=True)
    smaller(goal.with_suffix(".large.png"), goal, 1200)
    goal.with_suffix(".large.png").unlink()


def app(model: Path, images: list[Path], goal: Path) -> None:
    """The page of `hf-poolformer app` in Chromium, after an image was uploaded."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    command = [sys.executable, "-u", "-m", "hf_poolformer", "app", str(model), "--examples", *map(str, images)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            address = next(found[0] for line in server.stdout if (found := re.search(r"http://\S+", line)))
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
                page = browser.new_page(viewport={"width": 1100, "height": 860})
                page.set_default_timeout(180_000)  # of a busy machine
                page.goto(address)
                page.locator("#look").wait_for()
                page.locator("#upload input[type=file]").set_input_files(images[0])
                page.locator("[data-testid=label-output-value]").wait_for()
                page.locator("#picture img").wait_for()
                page.wait_for_timeout(500)  # for what fades in
                page.screenshot(path=goal)
                browser.close()
        finally:
            server.terminate()
    smaller(goal, goal)


if __name__ == "__main__":
    sys.exit(main())
