"""Builds the documentation as a site: `python scripts/make_site.py`, or `make docs`.

README.md, docs/, benchmarks/ and examples/ are laid out as they lie in the repository, so that links between them
hold. The reference of the commands is written from the parsers. Zensical makes pages of it all (zensical.toml);
whatever it warns of is an error, and so are a link that leads nowhere and a page that needs another host.
"""

import argparse
import contextlib
import html.parser
import io
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock
from urllib.parse import unquote, urlsplit


ROOT = Path(__file__).resolve().parents[1]
# What pages are made of, show and link to.
SOURCES = ("*.md", "LICENSE", "CITATION.cff", "docs/**/*", "benchmarks/*", "examples/*", "model_cards/*.md")
COMMANDS = "docs/reference/commands.md"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build the documentation as a site, and check it.")
    parser.add_argument(
        "--output_dir", type=Path, default=ROOT / "outputs", help="gets the folder site (default: outputs)"
    )
    arguments = parser.parse_args(argv)
    folder = arguments.output_dir.resolve()
    try:
        import zensical  # noqa: F401
    except ImportError:
        print("error: Zensical builds the site, and is not installed: pip install '.[docs]'", file=sys.stderr)
        return 2
    lay_out(folder)
    faults = build(folder)
    site = read_site(folder / "site")
    faults += [*check_links(site), *check_hosts(site)]
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    if faults:
        return 1
    outward = sorted({link for page in site.values() for link in page.links if is_outward(link)})
    (folder / "site-links.txt").write_text("".join(f"{link}\n" for link in outward), encoding="utf-8")
    print(f"{len(site)} pages: open {folder / 'site/index.html'}")
    print(f"to search in them, too: {Path(sys.executable).name} -m http.server -b 127.0.0.1 -d {folder / 'site'}")
    print(f"{len(outward)} links lead to other hosts, and were not followed: {folder / 'site-links.txt'}")
    return 0


# Laying out


def lay_out(folder: Path) -> None:
    """Writes `folder/site-pages` and `folder/zensical.toml`."""
    import hf_poolformer_cli

    pages = folder / "site-pages"
    shutil.rmtree(pages, ignore_errors=True)
    for path in sorted({path for pattern in SOURCES for path in ROOT.glob(pattern) if path.is_file()}):
        name = "index.md" if path == ROOT / "README.md" else path.relative_to(ROOT)
        (pages / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, pages / name)
    (pages / COMMANDS).write_text(command_reference(), encoding="utf-8", newline="\n")
    settings = (ROOT / "zensical.toml").read_text(encoding="utf-8")
    for word, value in {"VERSION": hf_poolformer_cli.installed_version(), "ROOT": ROOT.as_posix()}.items():
        settings = settings.replace(f"${word}", value)
    (folder / "zensical.toml").write_text(settings, encoding="utf-8")


def command_reference() -> str:
    """A section for each command, made of its parser."""
    import hf_poolformer_cli

    sections = [
        "# Commands\n\nWhat each command takes, from its own parser: the same as `hf-poolformer COMMAND --help`. In "
        "the place of `_` in a flag, `-` does as well.\n"
    ]
    for name, summary in hf_poolformer_cli.COMMANDS.items():
        parser = parser_of(name)
        sections.append(f"## {name}\n\n*{summary[0].upper()}{summary[1:]}.*\n\n{described(parser)}")
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                sections += [f"### {name} {word}\n\n{described(one)}" for word, one in action.choices.items()]
    return "\n".join(sections)


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser that answers `hf-poolformer COMMAND --help`."""
    import hf_poolformer_cli

    asked = []
    with (
        mock.patch.object(argparse.ArgumentParser, "print_help", lambda parser, file=None: asked.append(parser)),
        contextlib.suppress(SystemExit),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        hf_poolformer_cli.main([command, "--help"])
    return asked[-1]


def described(parser: argparse.ArgumentParser) -> str:
    """The text of a parser, and a table of the flags of each of its groups."""
    formatter = parser._get_formatter()
    parts = [f"```text\n{usage(parser)}\n```\n", as_written(parser.description)]
    for group in parser._action_groups:
        rows = [
            f"| {invocation(action)} | {meaning(action, formatter)} |"
            for action in group._group_actions
            if action.help != argparse.SUPPRESS and not isinstance(action, argparse._HelpAction)
        ]
        if rows:
            title = "" if group.title in ("options", "positional arguments") else f"**{group.title}**\n\n"
            parts.append("\n".join([f"{title}| argument | |", "|---|---|", *rows, ""]))
    return "\n".join(part for part in [*parts, as_written(parser.epilog)] if part)


def usage(parser: argparse.ArgumentParser) -> str:
    """In short: what has to be given, and that there is more."""
    needed = [action for action in parser._actions if action.required or not action.option_strings]
    flags = [action for action in parser._actions if action.option_strings and not action.required]
    words = [" ".join([*action.option_strings[:1], value(action)]) for action in needed]
    return " ".join([parser.prog, *words, *(["[FLAGS]"] if flags else [])])


def value(action: argparse.Action) -> str:
    if action.nargs == 0:
        return ""
    word = action.metavar or {int: "N", float: "X"}.get(action.type, "VALUE")
    return {"*": f"[{word} ...]", "+": f"{word} [{word} ...]", "?": f"[{word}]"}.get(action.nargs, word)


def meaning(action: argparse.Action, formatter: argparse.HelpFormatter) -> str:
    """As a table's cell."""
    said, default, rest = (cell(formatter._expand_help(action)) if action.help else "").partition("(default: ")
    if action.choices is not None and action.metavar is None:
        said += f" One of {', '.join(f'`{cell(str(choice))}`' for choice in action.choices)}. "
    return said + default + rest


def invocation(action: argparse.Action) -> str:
    """As a table's cell. Of the spellings of a flag with _ and with -, the first."""
    spellings = list({flag.replace("_", "-"): flag for flag in reversed(action.option_strings)}.values())
    words = [f"{', '.join(reversed(spellings))} {value(action)}".strip()]
    return f"`{cell(words[0])}`"


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def as_written(text: str | None) -> str:
    """A paragraph, or as it is where its lines are set."""
    if not text:
        return ""
    return f"```text\n{text.strip()}\n```\n" if "\n" in text.strip() else f"{cell(text)}\n"


# Building


def build(folder: Path) -> list[str]:
    """Runs Zensical over what was laid out; what it found wrong."""
    shutil.rmtree(folder / "site", ignore_errors=True)
    words = ["build", "--strict", "--clean", "--config-file", str(folder / "zensical.toml")]
    done = subprocess.run(
        [sys.executable, "-m", "zensical", *words],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    said = re.sub(r"\x1b\[[\d;]*m", "", done.stdout + done.stderr)
    # --strict knows Zensical's own warnings only, and not what mkdocstrings and griffe log.
    logged = re.search(r"\b(warning|error)\b", re.sub(r"\b0 (warnings|errors)\b", "", said), re.IGNORECASE)
    return [f"zensical, exit status {done.returncode}:\n{said}"] if done.returncode or logged else []


# Checking


@dataclass
class Page:
    """What the HTML of a page names."""

    anchors: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    resources: list[str] = field(default_factory=list)


class Reader(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.page = Page()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        known = {name: text for name, text in attributes if text}
        self.page.anchors |= {known[name] for name in ("id", "name") if name in known}
        if tag == "a" and "href" in known:
            self.page.links.append(known["href"])
        elif tag == "link" and known.get("rel") not in ("canonical", "prev", "next"):
            self.page.resources.append(known.get("href", ""))
        elif tag in ("script", "img", "iframe", "source", "video", "audio", "embed", "object"):
            self.page.resources += [known[name] for name in ("src", "srcset", "data") if name in known]


def read_site(site: Path) -> dict[Path, Page]:
    found = {}
    for path in sorted(site.rglob("*.html")):
        reader = Reader()
        reader.feed(path.read_text(encoding="utf-8"))
        found[path] = reader.page
    return found


def is_outward(link: str) -> bool:
    return bool(urlsplit(link).scheme or urlsplit(link).netloc)


def check_links(site: dict[Path, Page]) -> Iterator[str]:
    """Each link within the site, and each resource, that leads to no file or no heading."""
    for path, page in site.items():
        if path.name == "404.html":  # shown at any depth, so that its links begin at the root
            continue
        for link in [*page.links, *page.resources]:
            if is_outward(link):
                continue
            place, _, anchor = unquote(link).partition("#")
            goal = (path.parent / place.partition("?")[0]).resolve() if place else path
            goal = goal / "index.html" if goal.is_dir() else goal
            if not goal.is_file():
                yield f"{path.name}: {link} leads to no file"
            elif anchor and goal in site and anchor not in site[goal].anchors:
                yield f"{path.name}: {link} leads to no heading"


def check_hosts(site: dict[Path, Page]) -> Iterator[str]:
    """Each script, style, font and picture that would come from another host."""
    for path, page in site.items():
        for resource in page.resources:
            if urlsplit(resource).netloc:
                yield f"{path.name} needs another host: {resource}"
    folder = next(iter(site)).parent
    for path in folder.rglob("*.css"):
        for place in re.findall(r"""(?:url\(|@import)\s*["']?((?:https?:)?//[^"')\s]+)""", path.read_text("utf-8")):
            yield f"{path.name} needs another host: {place}"


if __name__ == "__main__":
    sys.exit(main())
