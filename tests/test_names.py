"""Names that hold anything are shown and stored; names that nobody knows are refused, with what was meant."""

import csv
import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest

from hf_poolformer import MetaFormerConfig, PoolFormerConfig
from hf_poolformer.commands import CommandParser
from hf_poolformer.evaluation.pictures import write_confusion_matrix
from hf_poolformer.explanation.explainer import find_class
from hf_poolformer.foundation import figures
from hf_poolformer.foundation.errors import UserError
from hf_poolformer.foundation.files import best_effort
from hf_poolformer.foundation.names import near_names, printable
from hf_poolformer.hub import contents
from hf_poolformer.hub.rendering import plain_markdown
from hf_poolformer.prediction.tables import table
from hf_poolformer.settings.command_line import parse
from hf_poolformer.settings.training import TrainingSettings
from hf_poolformer.training import reports
from hf_poolformer.training.initialisation import check_overrides


# What a folder may be called, and what of that is shown.
STRANGE = {
    "caf\udce9": r"caf\xe9",
    "two\nlines": r"two\nlines",
    "tab\there": r"tab\there",
    "\u202egnp.cat": r"\u202egnp.cat",
    "nul\x00": r"nul\x00",
    "half\ud83d": r"half\ud83d",
    r"x$\foo$": r"x$\foo$",
    "_under": "_under",
    "שלום": "שלום",
    "👩\u200d🔬": "👩\u200d🔬",
    "long" * 80: "long" * 80,
}


@pytest.mark.parametrize(("name", "shown"), STRANGE.items(), ids=ascii)
def test_names_become_printable(name, shown):
    assert printable(name) == shown == printable(shown)
    shown.encode()
    assert len(printable(name, 7)) <= 7


def test_figures_take_every_name(tmp_path):
    names = list(STRANGE)
    write_confusion_matrix(tmp_path / "matrix.png", np.eye(len(names), dtype=int), names)
    figure, _ = figures.new_figure((4, 4))
    figures.add_legend(figure, [("red", name) for name in names], columns=3)
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(shown) == len(names) and "_under" in shown and r"x$\foo$" in shown
    figures.save_figure(figure, tmp_path / "legend.png")
    assert (tmp_path / "matrix.png").stat().st_size and (tmp_path / "legend.png").stat().st_size


def test_skipped_files_are_listed_whatever_they_are_called(tmp_path):
    reports.note_skipped(tmp_path, 3, [f"{name}: broken" for name in STRANGE])
    rows = list(csv.reader((tmp_path / reports.SKIPPED).open(encoding="utf-8")))
    assert rows == [["3", f"{shown}: broken"] for shown in STRANGE.values()]


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_tables_take_every_name(tmp_path, suffix):
    with table(tmp_path / f"t.{suffix}", ("path", "label", "labels", "error")) as write:
        write([{"path": name, "label": name, "labels": [name], "error": None} for name in STRANGE])
        write([{"path": "x", "label": None, "labels": None, "error": "broken"}])
    if suffix == "jsonl":
        lines = (tmp_path / "t.jsonl").read_text(encoding="utf-8").splitlines()
        assert json.loads(lines[0])["label"] == r"caf\xe9" and len(lines) == len(STRANGE) + 1
    if suffix == "csv":
        with open(tmp_path / "t.csv", newline="", encoding="utf-8") as file:
            labels = [row["label"] for row in csv.DictReader(file)]
        assert r"nul\x00" in labels and "two\nlines" in labels and len(labels) == len(STRANGE) + 1


@pytest.mark.parametrize(
    "error", [RuntimeError("two\nlines"), UnicodeEncodeError("utf-8", "\udce9", 0, 1, "no"), OSError()]
)
def test_a_failing_decoration_is_a_line(caplog, error):
    with caplog.at_level(logging.WARNING), best_effort("drawing the curves"):
        raise error
    assert caplog.messages[0].startswith("drawing the curves failed") and "\n" not in caplog.messages[0]


def test_whoever_interrupts_a_decoration_is_heard():
    with pytest.raises(KeyboardInterrupt), best_effort("drawing"):
        raise KeyboardInterrupt


def test_names_are_no_markup():
    assert plain_markdown("a|b\n![t](http://x) <img src=x> `c`") == (r"a\|b \!\[t\](http://x) &lt;img src=x&gt; \`c\`")
    assert plain_markdown("caf\udce9") == r"caf\\xe9"


def test_the_page_of_the_app_shows_names_as_text():
    pytest.importorskip("gradio")
    from hf_poolformer.app.interface import literal

    plain = "Grad-CAM for cat, stage 4 of 4. שלום"
    assert literal(plain) == plain
    for name in (
        "![t](http://127.0.0.1:9/t.png)",
        "<img src=x>",
        "$x$",
        "[a](b)",
        "`a`",
        "# a",
        "a\n\n![t](u)",
        "\\!",
    ):
        assert not set("!<>$[]()`#\\\n:/") & set(literal(name).replace("&#", "&"))


# Names that nobody knows -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "known", "meant"),
    [
        ("ouput", ["output_dir", "output", "top_k"], "output"),
        ("licence", ["license", "private"], "license"),
        ("epochs", ["eval_epochs", "num_train_epochs"], "num_train_epochs"),
        ("lr", ["lora", "learning_rate"], "learning_rate"),
        ("batch-size", ["per_device_train_batch_size"], "per_device_train_batch_size"),
        ("bs", ["batch_size", "per_device_train_batch_size"], "batch_size"),
        ("Workers", ["num_workers"], "num_workers"),
        ("qqq", ["num_workers"], None),
    ],
)
def test_what_may_have_been_meant(name, known, meant):
    assert (near_names(name, known) or [None])[0] == meant


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["--ouput", "x"], "--output"),
        (["--output", "x", "--topk", "3"], "--top_k"),
        (["--output", "x", "sub", "--bs", "3"], "--batch_size"),
    ],
)
def test_commands_name_the_flag_that_was_meant(argv, hint):
    parser = CommandParser(prog="command")
    parser.add_argument("--output", required=True)
    parser.add_argument("--top_k")
    if "sub" in argv:
        parser.add_subparsers().add_parser("sub").add_argument("--batch_size")
    with pytest.raises(UserError, match=rf"did you mean {hint}"):
        parser.parse_args(argv)


REQUIRED = ["--recipe", "demo", "--train_dir", "images", "--output_dir", "run"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: null", "--learning_rate has no value"),
        ("seed:", "--seed has no value"),
        ("lr: 1", "did you mean learning_rate"),
        ("dataset_name: [a, b]", "takes one value"),
        ("output_dir: {a: 1}", "takes one value"),
        ("? [1]\n: 2", "not valid YAML"),
    ],
)
def test_settings_without_value_or_sense_are_told(tmp_path, text, message):
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        parse([*REQUIRED, "--config_file", str(tmp_path / "s.yaml")])


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("", "seed", 42),
        ("recipe:", "recipe", "demo"),
        ("image_size: null", "image_size", None),
        ("per_device_train_batch_size: auto", "per_device_train_batch_size", "auto"),
        ("learning_rate: auto", "learning_rate", "auto"),
        ("checkpointing_steps: no", "checkpointing_steps", "no"),
        ("mixed_precision: no", "mixed_precision", "no"),
        ("streaming: no", "streaming", False),
        ("report_to: [tensorboard, wandb]", "report_to", "tensorboard,wandb"),
    ],
)
def test_what_yaml_makes_of_words_is_understood(tmp_path, text, name, value):
    (tmp_path / "s.yaml").write_text(text)
    assert getattr(parse([*REQUIRED, "--config_file", str(tmp_path / "s.yaml")]), name) == value


@pytest.mark.parametrize("metric", ["accurate", "eval_acc", "miou", ""])
def test_a_metric_that_no_evaluation_gives_is_refused_before_the_run(metric):
    with pytest.raises(UserError, match="--metric_for_best_model"):
        TrainingSettings.from_recipe("demo", train_dir="images", output_dir="run", metric_for_best_model=metric)
    for task in ("semantic-segmentation", "object-detection"):
        with pytest.raises(UserError, match="--metric_for_best_model"):
            TrainingSettings.from_recipe(
                "demo", task=task, dataset_name="x", output_dir="run", metric_for_best_model="eval_mask_map"
            )


@pytest.mark.parametrize(
    ("overrides", "config", "message"),
    [
        ({"depht": [1]}, PoolFormerConfig, "did you mean depths"),
        ({"hidden_size": 8}, MetaFormerConfig(), "did you mean hidden_sizes"),
        ({"to_dict": 1}, PoolFormerConfig, "unknown key"),
        ({"num_labels": 3}, PoolFormerConfig, "those of the data"),
        ({"id2label": {}}, MetaFormerConfig(), "those of the data"),
        ({"token_mixers": ["attention"] * 4}, PoolFormerConfig, "a constant of poolformer"),
    ],
)
def test_overrides_of_nothing_are_refused(overrides, config, message):
    with pytest.raises(UserError, match=message):
        check_overrides(overrides, config, "model")


def test_overrides_of_something_are_taken():
    for config in (MetaFormerConfig, MetaFormerConfig()):
        check_overrides({"depths": [1], "token_mixers": ["pooling"], "out_features": ["stage1"]}, config, "model")
    check_overrides({"pool_size": 5, "token_mixers": ["pooling"] * 4}, PoolFormerConfig, "model")


CLASSES = SimpleNamespace(num_labels=4, id2label=dict(enumerate(["3", "tabby, tabby cat", "1", "dog"])))


@pytest.mark.parametrize(
    ("wanted", "index"),
    [(3, 3), (1, 1), (np.int64(2), 2), ("3", 0), ("1", 2), ("2", 2), ("0", 0), ("tabby cat", 1), ("DOG", 3)],
)
def test_numbers_are_numbers_and_texts_are_names_first(wanted, index):
    assert find_class(CLASSES, wanted) == index


@pytest.mark.parametrize("wanted", [4, -1, "4", "-1", True, "doog", 1.0])
def test_classes_that_there_are_not_are_refused(wanted):
    with pytest.raises(UserError, match="the model has no class"):
        find_class(CLASSES, wanted)


# Files in other encodings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "cp1252"])
def test_a_card_in_another_encoding_is_named(tmp_path, encoding):
    card = contents.Contents("model", {"README.md": "# Café\n".encode(encoding)})
    with pytest.raises(contents.PublishError, match=r"README.md is not UTF-8.*iconv"):
        contents.text_of_card(card)
