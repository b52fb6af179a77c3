import json
import re

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from hf_poolformer.hub.cards import folder_card
from hf_poolformer.hub.metadata import CardError, check_card, check_metadata
from hf_poolformer.hub.rendering import local_names, with_repo_id


RESULTS = {
    "eval_accuracy": 0.9777,
    "eval_top5_accuracy": 1.0,
    "eval_loss": 0.123456,
    "eval_samples": 360,
    "train_loss": 0.5,
    "train_runtime": 31.25,
    "train_samples_per_second": 1200.0,
    "epoch": 30,
    "skipped_images": 0,
}
SETTINGS = {"learning_rate": 4e-3, "num_train_epochs": 30, "seed": 42, "validation_split": "test"}
DIGITS = [str(digit) for digit in range(10)]


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "private" / "my-run"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "poolformer"}))
    (folder / "curves.png").write_bytes(b"png")
    save_file({"weight": torch.zeros(1000, 1500)}, folder / "model.safetensors")
    return folder


def write(folder, *, repo_id=None, license=None, **changes):
    """The card of a folder as a run leaves it, and its metadata."""
    run = {
        "results": RESULTS,
        "settings": SETTINGS,
        "dataset_name": "zalando-datasets/fashion_mnist",
        "base_model": "sail/poolformer_s12",
        "label_names": DIGITS,
        **changes,
    }
    settings = {**run["settings"], "dataset_name": run["dataset_name"], "model_name_or_path": run["base_model"]}
    config = json.loads((folder / "config.json").read_text()) | {"id2label": dict(enumerate(run["label_names"]))}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "all_results.json").write_text(json.dumps(run["results"]))
    (folder / "training_settings.yaml").write_text(yaml.safe_dump(settings))
    text = folder_card(folder, repo_id=repo_id, license=license)
    return text, yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])


def rows(text, heading):
    """Cells of the table lines below a heading."""
    section = text.split(f"{heading}\n", 1)[1].split("\n## ")[0]
    return [re.split(r"(?<!\\)\|", line)[1:-1] for line in section.splitlines() if line.startswith("|")]


def test_metadata_and_results(folder):
    text, data = write(folder, repo_id="me/digits")
    results = data.pop("model-index")
    assert data == {
        "library_name": "transformers",
        "pipeline_tag": "image-classification",
        "license": "apache-2.0",
        "tags": ["image-classification", "vision", "poolformer", "hf-poolformer"],
        "datasets": ["zalando-datasets/fashion_mnist"],
        "metrics": ["accuracy"],
        "base_model": "sail/poolformer_s12",
        "base_model_relation": "finetune",
    }
    (entry,) = results
    assert entry["name"] == "digits"
    (result,) = entry["results"]
    assert result["task"] == {"type": "image-classification", "name": "Image classification"}
    dataset = "zalando-datasets/fashion_mnist"
    assert result["dataset"] == {"name": dataset, "type": dataset, "split": "test"}
    assert [(m["name"], m["value"], m["verified"]) for m in result["metrics"]] == [
        ("Top-1 accuracy", 0.9777, False),
        ("Top-5 accuracy", 1.0, False),
        ("Loss", 0.123456, False),
    ]
    assert ModelCard(text).data.eval_results[0].metric_value == 0.9777
    assert "97.77 %" in text
    assert "1.5 M parameters" in text
    assert "![Training curves](curves.png)" in text
    assert "confusion_matrix.png" not in text
    assert 'pipeline("image-classification", model="me/digits")' in text
    assert "trust_remote_code" not in text
    assert "| `learning_rate` | 0.004 |" in text
    assert "hf-poolformer" in text.split("### Environment")[1]


def test_the_snippets_are_python(folder):
    text, _ = write(folder)
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(snippets) == 2
    for snippet in snippets:
        compile(snippet, "card", "exec")


def test_a_metaformer_needs_its_code(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "metaformer"}))
    text, data = write(folder)
    assert text.count("trust_remote_code=True") == 3
    assert "metaformer" in data["tags"]


def test_local_paths_stay_at_home(folder):
    text, data = write(folder, dataset_name=str(folder), base_model=str(folder / "start"))
    assert "datasets" not in data
    assert "base_model" not in data
    assert str(folder.parent) not in text
    assert "private" not in text
    assert "the local dataset my-run" in text
    assert "fine-tuned from start" in text
    dataset = data["model-index"][0]["results"][0]["dataset"]
    assert (dataset["name"], dataset["type"]) == ("my-run", "imagefolder")


def test_a_relative_folder_is_no_hub_id(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    (folder / "train-00000.parquet").write_bytes(b"")
    _, data = write(folder, dataset_name="my-run", base_model=None)
    assert "datasets" not in data
    assert data["model-index"][0]["results"][0]["dataset"] == {"name": "my-run", "type": "parquet", "split": "test"}


def test_secrets_and_unknown_settings_stay_out(folder):
    secret = "hf_" + "s" * 34
    settings = SETTINGS | {"hub_token": secret, "token": secret, "output_dir": "/somewhere/else"}
    text, _ = write(folder, settings=settings, dataset_name=None)
    assert secret not in text
    assert "/somewhere" not in text


def test_from_scratch_on_a_folder(folder):
    text, data = write(folder, base_model=None, dataset_name=None, settings={"train_dir": "/data/leaves"})
    assert "trained from scratch on the local dataset leaves" in text
    assert "base_model" not in data
    assert "/data" not in text


HOSTILE = [
    "a|b",
    "two\nlines",
    "<script>alert(1)</script>",
    "---",
    "{{ 7 * 7 }}",
    "{% raw %}",
    "key: [value",
    "`code`",
    "[link](javascript:x)",
    "ünï \u202e evil",
    "",
    "x" * 5000,
    "no",
    "null",
    "'\"\\",
]


def test_hostile_names(folder):
    accuracies = dict.fromkeys(HOSTILE, 0.5)
    text, data = write(
        folder,
        label_names=HOSTILE,
        results=RESULTS | {"eval_per_class_accuracy": accuracies},
        dataset_name="/data/" + "we|rd: {{name}}\n---\n<b>",
    )
    table = rows(text, "### Per class")[2:]
    assert [len(row) for row in table] == [2] * len(HOSTILE)
    assert table[0][0].strip() == r"a\|b"
    assert table[1][0].strip() == "two lines"
    assert "<script" not in text
    assert "<b>" not in text.split("\n---\n", 1)[1]
    assert "\u202e" not in text
    assert "49" not in table[4][0]
    assert max(map(len, text.splitlines())) < 1000
    assert data["model-index"][0]["results"][0]["dataset"]["name"] == "we|rd: {{name}} --- <b>"


def test_per_class_table(folder):
    accuracies = {name: index / 9 for index, name in enumerate(DIGITS)} | {"3": float("nan")}
    text, _ = write(folder, results=RESULTS | {"eval_per_class_accuracy": accuracies})
    table = rows(text, "### Per class")[2:]
    assert [row[0].strip() for row in table] == DIGITS
    assert table[9][1].strip() == "100.00 %"
    assert table[3][1].strip() == "-"

    many = [f"class {index}" for index in range(200)]
    text, _ = write(folder, label_names=many, results=RESULTS | {"eval_per_class_accuracy": dict.fromkeys(many, 1.0)})
    assert "Per class" not in text


def test_odd_results(folder):
    text, data = write(folder, results={"eval_accuracy": 0.5, "eval_loss": float("nan"), "epoch": None})
    (metric,) = data["model-index"][0]["results"][0]["metrics"]
    assert metric["value"] == 0.5
    assert "nan" not in text

    text, data = write(folder, results={})
    assert "model-index" not in data
    assert "## Results" not in text


def test_top5_of_five_classes_is_not_a_result(folder):
    text, _ = write(folder, label_names=["a", "b", "c"])
    assert "Top-5" not in text


def test_a_bad_card_is_refused(folder):
    with pytest.raises(CardError, match="license 'my own'"):
        write(folder, license="my own")
    with pytest.raises(CardError, match="not a repository id"):
        write(folder, repo_id="a/b/c")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"library_name": None}, "library_name"),
        ({"license": ["mit"]}, "license"),
        ({"tags": "vision"}, "tags"),
        ({"datasets": ["/home/me/images"]}, "/home/me/images"),
        ({"base_model": "a/b/c"}, "base_model"),
        ({"model-index": [{"name": "x", "results": [{}]}]}, "task.type"),
    ],
)
def test_check_metadata(change, message):
    good = {
        "library_name": "transformers",
        "pipeline_tag": "image-classification",
        "license": "mit",
        "tags": ["vision"],
    }
    check_metadata(good)
    with pytest.raises(CardError, match=message):
        check_metadata(good | change)


def test_check_metadata_of_results():
    metric = {"type": "accuracy", "value": 0.5}
    result = {"task": {"type": "image-classification"}, "dataset": {"name": "d", "type": "d"}}
    good = {"library_name": "transformers", "pipeline_tag": "image-classification", "license": "mit"}

    def entry(**change):
        return {**good, "model-index": [{"name": "x", "results": [{**result, "metrics": [{**metric, **change}]}]}]}

    check_metadata(entry(verified=False))
    for change in ({"value": float("nan")}, {"value": "high"}, {"verified": True}, {"type": ""}):
        with pytest.raises(CardError):
            check_metadata(entry(**change))


def test_emissions_only_if_measured(folder):
    measured = RESULTS | {"energy_kwh": 0.5, "co2_eq_g": 190.0, "co2_country": "Germany", "device": "NVIDIA H100"}
    text, data = write(folder, results=measured)
    assert data["co2_eq_emissions"] == {
        "emissions": 190.0,
        "source": "CodeCarbon",
        "training_type": "fine-tuning",
        "geographical_location": "Germany",
        "hardware_used": "NVIDIA H100",
    }
    assert "0.5 kWh" in text
    assert "190 g of CO₂" in text
    assert "- device: NVIDIA H100" in text
    text, data = write(folder)
    assert "co2_eq_emissions" not in data
    assert "Emissions" not in text


def test_pictures_to_try_it_on(folder):
    (folder / "examples").mkdir()
    for name in ("cell_1.png", "a b.jpg", "notes.txt"):
        (folder / "examples" / name).write_bytes(b"")
    _, data = write(folder, repo_id="me/cells")
    assert data["widget"] == [
        {"src": "https://huggingface.co/me/cells/resolve/main/examples/a%20b.jpg", "example_title": "a b"},
        {"src": "https://huggingface.co/me/cells/resolve/main/examples/cell_1.png", "example_title": "cell 1"},
    ]
    _, data = write(folder)
    assert "widget" not in data, "nobody knows where they will lie"


def test_the_card_of_a_folder(folder):
    """From what a run left there; without that, it claims nothing."""
    (folder / "config.json").write_text(json.dumps({"model_type": "metaformer", "id2label": {"0": "a", "1": "b"}}))
    text = folder_card(folder, repo_id="me/x", license="mit")
    assert "with 2 classes, 1.5 M parameters." in text
    assert "is not recorded here" in text
    assert "from scratch" not in text
    assert "## Results" not in text
    (folder / "all_results.json").write_text(json.dumps(RESULTS))
    (folder / "training_settings.yaml").write_text("model_name_or_path: sail/poolformer_s12\ntrain_dir: /data/cells\n")
    text = folder_card(folder, repo_id="me/x")
    assert "fine-tuned from" in text
    assert "the local dataset cells" in text
    assert "97.77 %" in text


def test_the_repository_s_name_in_a_card(folder):
    before, _ = write(folder)
    expected, _ = write(folder, repo_id="me/digits")
    for place in (folder, folder.parent / "renamed since"):
        assert with_repo_id(before, local_names(place, before), "me/digits") == expected


@pytest.mark.parametrize("name", ["$1", r"a\1b", "x y", 'q"q', "ünï"])
def test_odd_names_of_folders_and_repositories(folder, name):
    text = f'# {name}\n\n```python\npipeline("image-classification", model="{name}")\n```\n"{name}"\n'
    assert with_repo_id(text, [name], "me/x-1.0_b").count("me/x-1.0_b") == 1
    assert with_repo_id(text, ["other"], "me/x") == text


@pytest.mark.parametrize("text", ["", "# no metadata\n", "---\ntags: [a]\n---\n", "---\r\nlicense: mit\r\n---\r\n# x"])
def test_a_card_by_hand_may_say_little(text):
    check_card(text)
    check_card(text, "dataset")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("---\nlicense: [\n---\n", "no YAML"),
        ("---\n- a\n---\n", "no mapping"),
        ("---\nlicense: mine\n---\n", "mine"),
    ],
)
def test_a_card_by_hand_may_not_be_wrong(text, message):
    for repo_type in ("model", "dataset"):
        with pytest.raises(CardError, match=message):
            check_card(text, repo_type)


def test_figures_have_their_intervals(folder):
    intervals = {
        "eval_accuracy": [0.95661, 0.9887],
        "eval_loss": [0.1, None],  # of a run whose bootstrap had no answer
        "eval_mcc": [0.9, 0.97],
        "eval_per_class_accuracy": {"0": [0.25, 0.75], "1": None},
    }
    results = RESULTS | {"eval_mcc": 0.95, "eval_confidence_intervals": intervals}
    results["eval_per_class_accuracy"] = {"0": 0.5, "1": None}
    text, _ = write(folder, results=results)
    table = {name.strip(): value.strip() for name, value in rows(text, "## Results")[2:6]}
    assert table["Top-1 accuracy"] == "97.77 % (95.66 to 98.87 %)"
    assert table["Matthews correlation"] == "0.95 (0.9 to 0.97)"
    assert table["Loss"] == "0.1235" and table["Top-5 accuracy"] == "100.00 %"
    assert "95 % confidence interval" in text
    per_class = rows(text, "### Per class")
    assert [cell.strip() for cell in per_class[2]] == ["0", "50.00 % (25.00 to 75.00 %)"]
    assert per_class[3][1].strip() == per_class[9][1].strip() == "-"
    assert "interval" not in write(folder)[0]


@pytest.mark.parametrize("metric", ["eval_f1_macro", "f1_macro"])
def test_the_metric_that_matters_comes_first(folder, metric):
    results = RESULTS | {"eval_f1_macro": 0.61, "eval_balanced_accuracy": 0.6}
    text, data = write(folder, results=results, settings=SETTINGS | {"metric_for_best_model": metric})
    assert data["metrics"] == ["f1"] and data["model-index"][0]["results"][0]["metrics"][0]["type"] == "f1"
    assert [row[0].strip() for row in rows(text, "## Results")[2:5]] == [
        "Macro F1",
        "Top-1 accuracy",
        "Balanced accuracy",
    ]
    assert write(folder, results=results)[1]["metrics"] == ["accuracy"]


def test_per_class_figures_have_a_column_each(folder):
    per_class = {
        "eval_per_class_precision": {"cat": None, "dog": 0.5},
        "eval_per_class_accuracy": {"cat": 0.0, "dog": 1.0},
        "eval_per_class_f1": {"cat": 0.0, "dog": 2 / 3},
        "eval_per_class_samples": {"cat": 40, "dog": 10240},
    }
    text, _ = write(folder, label_names=["cat", "dog"], results=RESULTS | per_class)
    table = [[cell.strip() for cell in row] for row in rows(text, "### Per class")]
    assert table[0] == ["class", "precision", "recall", "F1", "images"]
    assert table[2] == ["cat", "-", "0.00 %", "0.00 %", "40"]
    assert table[3] == ["dog", "50.00 %", "100.00 %", "66.67 %", "10240"]


def test_several_labels(folder):
    config = {"model_type": "poolformer", "architectures": ["PoolFormerForImageClassification"]}
    (folder / "config.json").write_text(json.dumps(config | {"problem_type": "multi_label_classification"}))
    (folder / "label_figures.png").write_bytes(b"png")
    results = {
        "eval_average_precision": 0.812,
        "eval_f1_macro": 0.7,
        "eval_exact_match": 0.5,
        "eval_loss": 0.25,
        "eval_samples": 50,
        "eval_per_class_recall": {"red": 0.5, "round": 0.75},
        "eval_per_class_average_precision": {"red": 0.6, "round": None},
    }
    text, data = write(folder, label_names=["red", "round"], results=results)
    assert data["pipeline_tag"] == "image-classification" and data["metrics"] == ["mean_average_precision"]
    (result,) = data["model-index"][0]["results"]
    assert result["task"] == {"type": "image-classification", "name": "Multi-label image classification"}
    assert "Mean average precision | 0.812 |" in text and "multi-label image classifier with 2 labels" in text
    assert [cell.strip() for cell in rows(text, "### Per label")[0]] == ["label", "recall", "average precision"]
    assert "![Precision, recall and F1 of each label](label_figures.png)" in text and "Top-1" not in text


def test_numbers(folder):
    config = {"model_type": "poolformer", "architectures": ["PoolFormerForImageClassification"]}
    (folder / "config.json").write_text(json.dumps(config | {"problem_type": "regression"}))
    (folder / "scatter.png").write_bytes(b"png")
    results = {"eval_mae": 1234.5678, "eval_rmse": 20000.4, "eval_r2": -0.5, "eval_loss": 400016000.2}
    results |= {"eval_samples": 50, "eval_per_target_mae": {"weight": 1234.5678}}
    results["eval_confidence_intervals"] = {"eval_mae": [1100.2, 1400.9]}
    text, data = write(folder, label_names=["weight"], results=results)
    table = {name.strip(): value.strip() for name, value in rows(text, "## Results")[2:6]}
    assert table == {
        "Mean absolute error": "1235 (1100 to 1401)",
        "Root mean square error": "20000",
        "R²": "-0.5",
        "Mean square error": "400016000",
    }
    metrics = data["model-index"][0]["results"][0]["metrics"]
    assert [metric["type"] for metric in metrics] == ["mae", "rmse", "r_squared", "loss"]
    assert "image regressor with 1 number, 1.5 M parameters" in text and "### Per number" in text
    assert "![Predicted against true](scatter.png)" in text
