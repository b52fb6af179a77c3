"""The documentation as a site: it builds without a warning, needs no other host, misses no page and no public name."""

import contextlib
import functools
import http.server
import importlib.util
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import hf_poolformer
import hf_poolformer_cli


ROOT = Path(__file__).resolve().parents[1]
NAV = re.findall(r'"([\w./-]+\.md)"', (ROOT / "zensical.toml").read_text())
REFERENCE = {
    path.relative_to(ROOT).as_posix(): re.findall(r"^::: ([\w.]+)\n((?: {4}.*\n)*)", path.read_text(), re.MULTILINE)
    for path in [ROOT / "docs/reference.md", *sorted(ROOT.glob("docs/reference/*.md"))]
}
needs_zensical = pytest.mark.skipif(
    importlib.util.find_spec("zensical") is None or importlib.util.find_spec("mkdocstrings_handlers") is None,
    reason="the extra docs is not installed: pip install '.[docs]', with Python 3.11 or later",
)


@pytest.fixture(scope="module")
def make_site():
    spec = importlib.util.spec_from_file_location("make_site", ROOT / "scripts/make_site.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_site"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built as `make docs` does; once for all tests of this file."""
    folder = tmp_path_factory.mktemp("documentation")
    command = [sys.executable, ROOT / "scripts/make_site.py", "--output_dir", folder]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"open {folder / 'site/index.html'}" in done.stdout
    return folder / "site"


# Before it is built


def test_every_page_is_in_the_navigation(make_site):
    pages = {path.relative_to(ROOT).as_posix() for place in make_site.SOURCES for path in ROOT.glob(place)}
    pages = {"index.md" if page == "README.md" else page for page in pages if page.endswith(".md")}
    missing = (pages | {make_site.COMMANDS}) - set(NAV)
    assert not missing, f"enter in nav of zensical.toml: {sorted(missing)}"
    gone = set(NAV) - pages - {make_site.COMMANDS}
    assert not gone, f"nav of zensical.toml names pages that are not there: {sorted(gone)}"
    assert len(NAV) == len(set(NAV))


def test_the_reference_has_every_public_name():
    named = {name for entries in REFERENCE.values() for name, _ in entries}
    missing = {f"hf_poolformer.{name}" for name in hf_poolformer.__all__} - named
    assert not missing, f"enter in a page of docs/reference: {sorted(missing)}"
    for module in ("export", "hub", "prediction", "ops"):
        missing = {
            f"hf_poolformer.{module}.{name}" for name in importlib.import_module(f"hf_poolformer.{module}").__all__
        }
        assert f"hf_poolformer.{module}" in named or missing <= named, missing - named


def test_docstrings_of_the_reference_are_whole(caplog, monkeypatch):
    """Each name that a page shows says what it is and, of a function, what each argument is."""
    griffe = pytest.importorskip("griffe", reason="the extra docs is not installed: pip install '.[docs]'")
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from docstrings import Docstrings

    loader = griffe.GriffeLoader(search_paths=[ROOT / "src"], extensions=griffe.Extensions(Docstrings()))
    package = loader.load("hf_poolformer")
    loader.resolve_aliases(implicit=True)
    ways = {"returns_multiple_items": False, "returns_named_value": False, "warn_missing_types": False}
    wrong, seen = [], 0
    for name, options in [entry for entries in REFERENCE.values() for entry in entries]:
        found = package[name.removeprefix("hf_poolformer.")]
        found = found.final_target if found.is_alias else found
        listed = re.search(r"members: \[([^\]]*)\]", options)
        shown = [
            found,
            *(found.all_members[member] for member in (listed[1].split(", ") if listed and listed[1] else ())),
        ]
        if found.is_module:
            shown += [one for one in found.members.values() if not one.is_alias and one.is_function]
        for one in shown:
            seen += 1
            if not one.has_docstring:
                wrong.append(f"{one.path} has no docstring")
                continue
            sections = one.docstring.parse("google", **ways)
            if one.is_function and not found.is_module:
                told = {
                    entry.name for section in sections if section.kind.value == "parameters" for entry in section.value
                }
                missing = {parameter.name for parameter in one.parameters} - told - {"self", "cls", "kwargs"}
                wrong += [f"{one.path} does not say what {argument} is" for argument in sorted(missing)]
    assert not wrong
    assert seen > 80
    assert [record.message for record in caplog.records if record.name.startswith("griffe")] == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "A.\n\nArgs:\n    a, b: Two.\n        More.\n    c: One.",
            "A.\n\nArgs:\n    a: Two.\n        More.\n    b: See `a`.\n    c: One.",
        ),
        (
            "Args:\n    a (`int`, *optional*, defaults to 3):\n        Side.",
            "Args:\n    a (int):\n        Side. Default: 3.",
        ),
        (
            "Args:\n    a (`int`, *optional*, defaults to 2), b (`float`, defaults to 0.5):\n        Both.",
            "Args:\n    a (int):\n        Both. Default: 2.\n    b (float): See `a`. Default: 0.5.",
        ),
        (
            "labels (`T` of shape `(b, h)`, *optional*):\n    Of pixels.\n\nText.",
            "\nArgs:\n    labels (T): (b, h).\n        Of pixels.\n\nText.",
        ),
        ("Returns:\n    what it holds: figures", "Returns:\n    : what it holds: figures"),
    ],
)
def test_docstrings_are_brought_into_the_form_that_griffe_reads(text, expected, monkeypatch):
    pytest.importorskip("griffe", reason="the extra docs is not installed: pip install '.[docs]'")
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from docstrings import tidied

    assert "\n".join(tidied(text.splitlines(), "Args:")) == expected


def test_commands_are_described_by_their_parsers(make_site):
    text = make_site.command_reference()
    assert re.findall(r"^## (.*)", text, re.MULTILINE) == list(hf_poolformer_cli.COMMANDS)
    sections = dict(zip(hf_poolformer_cli.COMMANDS, re.split(r"^## .*$", text, flags=re.MULTILINE)[1:], strict=True))
    assert "`--learning_rate" in sections["train"] and "(default: 0.0002)" in sections["train"]
    assert "`--no_streaming`" in sections["train"]
    assert "hf-poolformer predict" in sections["predict"] and "`--top_k N`" in sections["predict"]
    assert "### benchmark latency" in sections["benchmark"]
    assert "One of `float32`, `bfloat16`, `float16`." in sections["predict"]


# Built


@needs_zensical
def test_the_site_has_every_page_and_nothing_else(site):
    pages = {re.sub(r"(^|/)README\.md$", r"\1index.md", page) for page in NAV}
    built = {path.relative_to(site).as_posix() for path in site.rglob("*.html")}
    assert built == {page.replace(".md", ".html") for page in pages} | {"404.html"}


@needs_zensical
def test_the_footer_says_version_and_licence(site):
    for page in ("index.html", "docs/train.html"):
        text = (site / page).read_text()
        assert f"hf-poolformer {hf_poolformer_cli.installed_version()}, licence Apache-2.0" in text


@needs_zensical
def test_the_reference_shows_what_the_docstrings_say(site):
    text = re.sub(r"<[^>]+>", "", (site / "docs/reference/models.html").read_text())
    assert "MetaFormerForImageClassification" in text and "Blocks and channels per stage." in text
    assert 'id="hf_poolformer.gradcam"' in (site / "docs/reference/using.html").read_text()


@needs_zensical
def test_a_browser_asks_no_other_host_and_finds_what_is_searched_for(site, browser):
    from playwright.sync_api import Error

    class Silent(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Silent, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/"
        page = browser.new_page()
        asked, faults = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.set_default_timeout(120_000)  # of a busy machine
        page.goto(f"{address}docs/train.html")
        # The results are out of reach of selectors, and the keys do nothing until the script runs.
        for _ in range(60):
            with contextlib.suppress(Error):  # of a page that is just being left
                if page.evaluate("document.activeElement === document.body"):
                    page.keyboard.press("Control+k")
                else:
                    page.keyboard.press("Control+a")
                    page.keyboard.type("gradcam")
                    page.wait_for_timeout(1000)
                    page.keyboard.press("Enter")
                page.wait_for_timeout(1000)
            if "using.html" in page.url:
                break
        assert page.url.startswith(f"{address}docs/reference/using.html"), "the first result is the function"
        page.close()
        server.shutdown()
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
    assert faults == []


# What is wrong is found


@pytest.mark.slow
@needs_zensical
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[there](nowhere.md)", "nowhere.md"),
        ("[there](#nothing)", "nothing"),
        ("::: hf_poolformer.nobody", "hf_poolformer.nobody"),
    ],
)
def test_a_page_with_a_fault_does_not_build(text, said, make_site, tmp_path):
    (tmp_path / "site-pages").mkdir()
    (tmp_path / "site-pages/index.md").write_text(f"# Page\n\n{text}\n")
    settings = (ROOT / "zensical.toml").read_text().replace("$ROOT", ROOT.as_posix())
    settings = re.sub(r"^nav = \[$.*?^\]$", "", settings, flags=re.MULTILINE | re.DOTALL)
    (tmp_path / "zensical.toml").write_text(settings)
    (fault,) = make_site.build(tmp_path)
    assert said in fault


def test_links_that_lead_nowhere_and_other_hosts_are_found(make_site, tmp_path):
    (tmp_path / "a.html").write_text(
        '<h1 id="top"></h1><a href="#top"></a><a href="b.html#x"></a><a href="c.html"></a><a href="b.html?q=1"></a>'
        '<a href="https://example.org/"></a><script src="//cdn.example.org/x.js"></script><img src="gone.png">'
        '<link rel="stylesheet" href="style.css">'
    )
    (tmp_path / "b.html").write_text("<p></p>")
    (tmp_path / "style.css").write_text("@font-face { src: url('https://fonts.example.org/f.woff2') }")
    site = make_site.read_site(tmp_path)
    assert list(make_site.check_links(site)) == [
        "a.html: b.html#x leads to no heading",
        "a.html: c.html leads to no file",
        "a.html: gone.png leads to no file",
    ]
    assert list(make_site.check_hosts(site)) == [
        "a.html needs another host: //cdn.example.org/x.js",
        "style.css needs another host: https://fonts.example.org/f.woff2",
    ]


def test_without_zensical_one_line_says_what_to_install(make_site, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "zensical", None)
    assert make_site.main([]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and ".[docs]" in said and said.count("\n") == 1
