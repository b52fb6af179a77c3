"""The page: an image in, what the model says and a picture out. Gradio (extra `app`)."""

from __future__ import annotations

import html
import logging
import os
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any


# Read by Gradio when it is imported: nothing is reported to anybody, and no visitor's images are kept in the browser.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("GRADIO_RUN_HISTORY", "False")

import gradio as gr
from fastapi.responses import FileResponse

from ..data.files import is_image, list_files
from ..foundation.errors import UserError
from ..foundation.names import printable
from ..foundation.origin import Origin
from .answers import Answer, answer, open_image
from .models import Models


logger = logging.getLogger(__name__)

MAX_PIXELS = 40_000_000
MAX_FILE_SIZE = "20mb"
MAX_EXAMPLES = 12
# Visitors who wait; whoever comes after is told to come back.
QUEUE_SIZE = 32
# Uploads older than an hour are deleted, looked for every ten minutes; both in seconds.
DELETE_CACHE = (600, 3600)
# No font from elsewhere: the page works without a network, and tells nobody who visits it.
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
HEIGHT = 380  # of an image on the page, in pixels
# Where the report is served. In a sandbox, also when it is opened by itself: a page that can run scripts and load
# nothing, that belongs to no origin, and that does not reach the page around it.
REPORT_ROUTE = "report"
REPORT_POLICY = (
    "sandbox allow-scripts; default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
)
REPORT_FRAME = (
    f'<iframe src="{REPORT_ROUTE}" sandbox="allow-scripts" title="Report" '
    'style="border: 0; display: block; height: 85vh; width: 100%"></iframe>'
)


def serve(
    models: Sequence[str],
    *,
    examples: Sequence[str | Path] = (),
    host: str | None = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
    allow_any_model: bool = False,
    max_pixels: int = MAX_PIXELS,
    max_file_size: str = MAX_FILE_SIZE,
    report: str | Path | None = None,
    device: str = "auto",
    revision: str = "main",
    token: str | None = None,
    cache_dir: str | None = None,
    trust_remote_code: bool = False,
) -> gr.Blocks:
    """Serves a page for trying models, from a thread, until `close()` of what is returned; `local_url` says where.

    The page has two endpoints for programs, `/predict` and `/explain`; see "Use via API" at its foot.

    Args:
        models: folders or Hub ids of classifiers, segmenters or detectors; the first is shown first.
        examples: images to click on, or folders of them.
        host: address to listen on; None leaves it to GRADIO_SERVER_NAME, as on a Hub Space.
        port: None takes 7860 or the next one that is free.
        share: also through a tunnel of Gradio's, for anybody who knows its address.
        allow_any_model: visitors may name any model of the Hub; see `Models` for what is kept from them.
        max_pixels, max_file_size: of an image; a larger one is refused before it is decoded.
        report: the folder of a report, for a tab of its own. Whoever reaches the page sees the images in it.
        device, revision, token, cache_dir, trust_remote_code: for loading `models`.

    Raises:
        UserError: no such model or report, or the port is taken.
    """
    report = None if report is None else find_report(Path(report))
    shelf = Models(
        models,
        allow_any_model=allow_any_model,
        device=device,
        origin=Origin(revision, token, cache_dir, trust_remote_code),
    )
    page = build_page(shelf, find_examples(examples), max_pixels, with_report=report is not None)
    page.queue(max_size=QUEUE_SIZE, default_concurrency_limit=1)
    try:
        page.launch(
            server_name=host,
            server_port=port,
            share=share,
            max_file_size=max_file_size,
            prevent_thread_lock=True,
            quiet=True,
            ssr_mode=False,
            footer_links=["api"],
            theme=gr.themes.Default(**FONTS),
        )
    except OSError as error:
        where = f"port {port or 'from 7860 on'} of {host or 'this machine'}"
        raise UserError(f"{where} cannot be used: {error}") from error
    if report is not None:
        headers = {"Content-Security-Policy": REPORT_POLICY, "X-Content-Type-Options": "nosniff"}
        page.app.get(f"/{REPORT_ROUTE}")(lambda: FileResponse(report, media_type="text/html", headers=headers))
    return page


def find_report(folder: Path) -> Path:
    """
    Raises:
        UserError: the folder holds no report.
    """
    path = folder / "report.html"
    if not path.is_file():
        raise UserError(f"--report {folder}: there is no report.html; evaluate, compare and inspect write one")
    return path


def find_examples(places: Sequence[str | Path]) -> list[Path]:
    """Image files among and in `places`, at most `MAX_EXAMPLES`.

    Raises:
        UserError: there is no such file or folder.
    """
    found: list[Path] = []
    for place in map(Path, places):
        if not place.exists():
            raise UserError(f"--examples {place}: no such file or folder")
        files = list_files(place) if place.is_dir() else [place]
        found += [path for path in files if is_image(path)]
    return found[:MAX_EXAMPLES]


def build_page(models: Models, examples: Sequence[Path], max_pixels: int, with_report: bool) -> gr.Blocks:
    """The page, not yet served."""
    title = "Try a PoolFormer" if offers_several(models) else literal(models.names[0])
    with gr.Blocks(title=f"{models.names[0]}: try it", delete_cache=DELETE_CACHE, analytics_enabled=False) as page:
        gr.Markdown(f"# {title}\n")
        if with_report:
            with gr.Tab("Try it"):
                add_trial(models, examples, max_pixels)
            with gr.Tab("Report", elem_id="report"):
                gr.HTML(REPORT_FRAME)
        else:
            add_trial(models, examples, max_pixels)
    return page


def offers_several(models: Models) -> bool:
    return len(models.names) > 1 or models.allow_any_model


def add_trial(models: Models, examples: Sequence[Path], max_pixels: int) -> None:
    """Adds to the page that is being built: an image in, what the model says and a picture out."""

    def read(upload: Any, model: str | None) -> tuple[Any, Any]:
        """What Gradio hands over unprepared: it would decode an image before anybody could look at its size."""
        path = upload.get("path") if isinstance(upload, dict) else None
        if not path:
            raise UserError("There is no image: upload one, paste it or take a picture.")
        return models.get(model), open_image(path, max_pixels)

    @told_to_the_visitor
    def predict(upload: Any, model: str | None) -> list[Any]:
        chosen, image = read(upload, model)
        return outputs(answer(chosen, image))

    def refresh(upload: Any, model: str | None) -> list[Any]:
        """As `predict`, but that without an image there is nothing to complain about."""
        if upload:
            return predict(upload, model)
        return [None, None, gr.update(choices=[], value=None, visible=False), None, ""]

    @told_to_the_visitor
    def show_class(upload: Any, model: str | None, name: str | None) -> list[Any]:
        chosen, image = read(upload, model)
        found = answer(chosen, image, name)
        return [found.picture, literal(found.note)]

    def outputs(found: Answer) -> list[Any]:
        classes = found.choices
        shown = {"choices": classes, "value": classes[0]} if classes else {"choices": [], "value": None}
        return [
            gr.update(value=found.scores or None, visible=bool(found.scores)),
            found.picture,
            gr.update(**shown, visible=len(classes) > 1 and found.picture is not None),
            gr.update(value={"headers": list(found.columns), "data": found.rows}, visible=bool(found.columns)),
            literal(found.note),
        ]

    classifies = models.tasks[models.names[0]].reads in ("class", "classes")
    with gr.Row():
        with gr.Column():
            upload = gr.Image(
                label="Image",
                sources=["upload", "webcam", "clipboard"],
                type="filepath",
                height=HEIGHT,
                elem_id="upload",
            )
            model = gr.Dropdown(
                models.names,
                value=models.names[0],
                label="Model, or any of the Hub as user/name" if models.allow_any_model else "Model",
                allow_custom_value=models.allow_any_model,
                visible=offers_several(models),
                elem_id="model",
            )
            button = gr.Button("Look at it", variant="primary", elem_id="look")
        with gr.Column():
            scores = gr.Label(label="Classes", visible=classifies, elem_id="scores")
            picture = gr.Image(
                label="Where",
                type="pil",
                format="png",
                interactive=False,
                height=HEIGHT,
                buttons=["download", "fullscreen"],
                elem_id="picture",
            )
            note = gr.Markdown(elem_id="note")
            shown = gr.Radio([], label="Show the places that speak for", visible=False, elem_id="classes")
            table = gr.Dataframe(label="Found", interactive=False, visible=not classifies, elem_id="found")
    results = [scores, picture, shown, table, note]
    if examples:
        gr.Examples([[str(path)] for path in examples], inputs=[upload], cache_examples=False)
    # `preprocess=False`: see `read`. Gradio has checked by then that the file is an upload and no other.
    options = {"preprocess": False, "concurrency_id": "model", "concurrency_limit": 1}
    button.click(
        predict,
        [upload, model],
        results,
        api_name="predict",
        api_description="Classes with scores, or numbers, or what was found; a picture; and a note about it.",
        **options,
    )
    gr.on(
        [upload.change, model.input],
        refresh,
        [upload, model],
        results,
        api_visibility="private",
        trigger_mode="always_last",
        **options,
    )
    shown.input(
        show_class,
        [upload, model, shown],
        [picture, note],
        api_name="explain",
        api_description="The heat map of a class of your choice over the image.",
        trigger_mode="always_last",
        **options,
    )


def literal(text: str) -> str:
    """Text that Markdown shows as it is: the name of a class must not become a picture that the browser asks for."""
    return "".join(char if char.isalnum() or char in " ,.-" else f"&#{ord(char)};" for char in printable(text))


def told_to_the_visitor(function: Callable[..., Any]) -> Callable[..., Any]:
    """Shows expected errors as a message on the page; of others, the visitor learns only that there was one."""

    @wraps(function)
    def run(*values: Any) -> Any:
        try:
            return function(*values)
        except UserError as error:
            message = str(error)
        except Exception:
            logger.exception("a visitor's request failed")
            message = "Something went wrong here; whoever runs this page sees what."
        # The message may hold what the visitor typed, and is shown as HTML.
        raise gr.Error(html.escape(message), print_exception=False)

    return run
