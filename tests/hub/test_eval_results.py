"""`.eval_results/`: what of a card's results the Hub's leaderboards get, under which ids, and what they never get."""

import json
import re

import hub_server
import pytest
import yaml
from hub_server import Commit, Repo
from huggingface_hub import ModelCard, parse_eval_result_entries

from hf_poolformer.foundation.tasks import TASKS
from hf_poolformer.hub import PublishError, publish, publishing
from hf_poolformer.hub.cards import folder_card
from hf_poolformer.hub.eval_results import RESULTS, leave_results, read_results, results_of_card
from hf_poolformer.hub.metadata import HUB_TASKS, CardError, check_card
from hf_poolformer.hub.verification import compare_results


FIGURES = {"eval_accuracy": 0.875, "eval_top5_accuracy": 1.0, "eval_loss": 0.5, "eval_samples": 64}


@pytest.fixture
def run(model_dir):
    """A run's folder, whose card is to be written by `publish`."""
    (model_dir / "README.md").unlink()

    def told(settings=None, results=FIGURES):
        said = {"dataset_name": "cells/photos", "validation_split": "test", **(settings or {})}
        (model_dir / "training_settings.yaml").write_text(yaml.safe_dump(said))
        (model_dir / "all_results.json").write_text(json.dumps(results))
        return model_dir

    return told


@pytest.fixture
def dataset(hub):
    """Puts a dataset on the Hub."""

    def put(benchmark=None, name="cells/photos", private=False):
        files = {"data.parquet": b"PAR1"} | ({"eval.yaml": yaml.safe_dump(benchmark).encode()} if benchmark else {})
        hub.repos["datasets", name] = Repo(private, branches={"main": [Commit("1" * 40, "data", files)]})

    return put


@pytest.fixture
def send(online, hub_token, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    def run(folder, **options):
        return publish(folder, "me/x", endpoint=online.url, **{"verify": False, **options})

    return run


def published(hub):
    return parse_eval_result_entries(yaml.safe_load(hub.files("me/x")[RESULTS]))


BENCHMARK = {
    "name": "Cells",
    "tasks": [
        {"id": "cells_test", "config": "default", "split": "test"},
        {"id": "cells_validation", "config": "default", "split": "validation"},
        {"id": "cells_rare", "config": "rare", "split": "test"},
    ],
}


@pytest.mark.parametrize(
    ("settings", "task"),
    [
        ({}, "cells_test"),
        ({"validation_split": "validation"}, "cells_validation"),
        ({"dataset_config_name": "rare"}, "cells_rare"),
    ],
)
def test_a_benchmark_s_own_task_gets_the_first_figure_of_the_card(hub, run, dataset, send, settings, task):
    dataset(BENCHMARK)
    done = send(run(settings))
    (entry,) = published(hub)
    assert (entry.dataset_id, entry.task_id, entry.value) == ("cells/photos", task, 0.875)
    assert entry.verify_token is None and b"erif" not in hub.files("me/x")[RESULTS]
    told = {
        result.metric_type: result for result in ModelCard(hub.files("me/x")["README.md"].decode()).data.eval_results
    }
    assert told["accuracy"].metric_value == entry.value
    assert [note for note in done.notes if "results on" in note] == []


def test_what_is_published_again_replaces_what_was_there(hub, run, dataset, send):
    dataset(BENCHMARK)
    send(run())
    hub.repos["models", "me/x"].branches["main"][-1].files[".eval_results/somebody-else.yaml"] = b"[]\n"
    send(run(results={**FIGURES, "eval_accuracy": 0.9375}))
    assert [entry.value for entry in published(hub)] == [0.9375]
    send(run({"dataset_name": None, "train_dir": "photos"}))
    assert RESULTS not in hub.files("me/x"), "figures of another dataset would be taken for this model's"
    assert ".eval_results/somebody-else.yaml" in hub.files("me/x")


def test_a_dataset_that_is_no_benchmark_is_told_of(hub, run, dataset, send):
    dataset()
    done = send(run())
    assert [(entry.task_id, entry.value) for entry in published(hub)] == [("default", 0.875)]
    assert any("is no benchmark" in note for note in done.notes)


@pytest.mark.parametrize(
    ("settings", "on_the_hub", "reason"),
    [
        ({"dataset_name": None, "train_dir": "/data/cells"}, {}, "no dataset on the Hub"),
        ({"dataset_name": "mnist"}, {"name": "mnist"}, "no dataset on the Hub"),
        ({"validation_split": None}, {}, "not of one of its splits"),
        ({}, {"name": "cells/others"}, "no such dataset"),
        ({}, {"private": True}, "private"),
        ({"validation_split": "train"}, {"benchmark": BENCHMARK}, "no task for the configuration default"),
        ({}, {"benchmark": {"tasks": [{"id": "a"}, {"id": "b"}]}}, r"several tasks \(a, b\)"),
        ({}, {"benchmark": {"tasks": "all"}}, "cannot be read"),
    ],
)
def test_what_has_no_place_there_stays_in_the_card(hub, run, dataset, send, settings, on_the_hub, reason):
    dataset(**on_the_hub)
    done = send(run(settings))
    assert RESULTS not in hub.files("me/x")
    assert "model-index" in hub.files("me/x")["README.md"].decode()
    (note,) = [note for note in done.notes if "results on" in note]
    assert re.search(reason, note), note


def test_a_private_model_may_name_a_private_dataset(hub, run, dataset, send):
    dataset(private=True)
    send(run(), private=True)
    assert [entry.dataset_id for entry in published(hub)] == ["cells/photos"]


def test_the_hub_cannot_be_asked_then_nothing_is_sent(hub, run, dataset, send):
    dataset()
    hub.fail("GET", "/api/datasets/")
    with pytest.raises(PublishError, match="503"):
        send(run())
    assert ("models", "me/x") not in hub.repos


def test_excluded_by_the_user(hub, run, dataset, send):
    dataset(BENCHMARK)
    send(run(), exclude=[".eval_results/*"])
    assert [name for name in hub.files("me/x") if name.startswith(".eval")] == []


def test_files_of_others_go_up_if_the_hub_can_read_them(hub, run, send):
    folder = run({"dataset_name": None, "train_dir": "photos"})
    (folder / ".eval_results").mkdir()
    other = folder / ".eval_results" / "other.yaml"
    other.write_text("- dataset: {id: some/benchmark, task_id: default}\n  value: 0.5\n  verifyToken: eyJhbGciOi\n")
    send(folder)
    assert hub.files("me/x")[".eval_results/other.yaml"] == other.read_bytes()
    for text, reason in {
        "- value: 0.5\n": "no list of results",
        "- dataset: {id: ../x, task_id: default}\n  value: 1\n": "not the id of a dataset",
        "- dataset: {id: some/benchmark, task_id: a b}\n  value: 1\n": "not the id of a task",
        "[": "no list of results",
    }.items():
        other.write_text(text)
        with pytest.raises(PublishError, match=rf"other\.yaml.*{reason}"):
            send(folder)


def test_no_token_gets_into_them(run, send, hub_token, hub):
    folder = run({"dataset_name": None, "train_dir": "photos"})
    (folder / ".eval_results").mkdir()
    (folder / ".eval_results" / "other.yaml").write_text(
        f"- dataset: {{id: some/benchmark, task_id: default}}\n  value: 0.5\n  notes: {'hf_' + 'o' * 34}\n"
    )
    with pytest.raises(PublishError, match="Hub token"):
        send(folder)
    assert hub.requests == []


# Tasks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.figures])
def test_every_task_gives_the_hub_its_first_figure(run, name):
    task = TASKS[name]
    results = {figure.key: 0.25 + index / 8 for index, figure in enumerate(task.figures)}
    folder = run({"task": name}, results)
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {str(index): f"c{index}" for index in range(12)}
    (folder / "config.json").write_text(json.dumps(config))
    (measured,), left_out = results_of_card(folder_card(folder, repo_id="me/x"))
    assert left_out == []
    assert (measured.entry.value, measured.split) == (0.25, "test")
    assert measured.entry.notes.startswith(task.figures[0].name)


def test_a_split_that_the_run_found_itself_is_one(run):
    folder = run({"validation_split": None}, {**FIGURES, "evaluated_split": "validation"})
    ((measured,), _) = results_of_card(folder_card(folder))
    assert measured.split == "validation"


def test_only_the_commit_of_a_dataset_is_a_revision(run):
    for said, told in ((None, None), ("main", None), ("a" * 40, "a" * 40)):
        ((measured,), _) = results_of_card(folder_card(run({"dataset_revision": said})))
        assert measured.entry.dataset_revision == told


def test_several_splits_of_a_card_written_by_hand(hub, run, dataset, send):
    dataset(BENCHMARK)
    folder = run()
    results = [
        {
            "task": {"type": "image-classification"},
            "dataset": {"type": "cells/photos", "name": "Cells", "split": split},
            "metrics": [{"type": "accuracy", "value": value}],
            "source": {"url": "https://example.org/log", "name": "log"},
        }
        for split, value in (("test", 0.5), ("validation", 0.75))
    ]
    data = yaml.safe_dump({"license": "mit", "model-index": [{"name": "x", "results": results}]})
    (folder / "README.md").write_text(f"---\n{data}---\n\n# x\n")
    send(folder)
    found = {entry.task_id: (entry.value, entry.source_url, entry.source_name) for entry in published(hub)}
    log = ("https://example.org/log", "log")
    assert found == {"cells_test": (0.5, *log), "cells_validation": (0.75, *log)}


# In a folder, and read back -----------------------------------------------------------------------------------


def test_a_run_leaves_them_beside_its_card(run):
    folder = run()
    leave_results(folder, folder_card(folder))
    (entry,) = read_results((folder / RESULTS).read_text(), RESULTS)
    assert (entry.dataset_id, entry.task_id, entry.value) == ("cells/photos", "default", 0.875)
    leave_results(folder, folder_card(run({"dataset_name": None, "train_dir": "photos"})))
    assert not (folder / RESULTS).exists()


def test_another_value_than_the_card_s_is_noticed(run, tmp_path):
    folder = run()
    card = folder_card(folder)
    (folder / "README.md").write_text(card)
    leave_results(folder, card)
    assert "with the values of the card" in compare_results(folder)
    text = (folder / RESULTS).read_text()
    for wrong in (text.replace("0.875", "0.975"), text + "  verifyToken: mine\n", "- value: 1\n"):
        (folder / RESULTS).write_text(wrong)
        with pytest.raises(PublishError):
            compare_results(folder)


def test_published_and_verified(run, dataset, send, monkeypatch):
    dataset(BENCHMARK)
    # A process that loads the model: test_publishing.py has that.
    monkeypatch.setattr(publishing, "compare_answers", lambda *folders: "not looked at here")
    done = send(run(), verify=True)
    assert any(RESULTS in note and note.startswith("verified") for note in done.notes)


# Ids of tasks in cards ----------------------------------------------------------------------------------------


def test_our_tasks_and_those_that_libraries_know_are_tasks_of_the_hub():
    from datasets.utils.metadata import known_task_ids

    assert {task.pipeline_tag for task in TASKS.values()} <= HUB_TASKS
    assert {name for name in known_task_ids if name.startswith(("image-", "object-", "zero-shot-"))} - HUB_TASKS <= {
        "image-to-text"
    }


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"pipeline_tag": "image_classification"}, "'image_classification' is no task .* did you mean image-class"),
        ({"pipeline_tag": "cells"}, "huggingface.co/tasks"),
        ({"model-index": ("multi-label-image-classification", "cells")}, "is no task of the Hub"),
        ({"model-index": ("image-classification", "/home/me/cells")}, "not the id of a dataset"),
    ],
)
def test_an_unknown_task_or_dataset_is_refused_before_anything_is_sent(hub, model_dir, send, data, message):
    if "model-index" in data:
        task, name = data["model-index"]
        result = {"task": {"type": task}, "dataset": {"type": name, "name": "x"}}
        data = {"model-index": [{"name": "x", "results": [{**result, "metrics": [{"type": "a", "value": 1.0}]}]}]}
    card = f"---\n{yaml.safe_dump({'license': 'mit', **data})}---\n\n# x\n"
    with pytest.raises(CardError, match=message):
        check_card(card)
    (model_dir / "README.md").write_text(card)
    with pytest.raises(PublishError, match=message):
        send(model_dir)
    assert hub.requests == []
    assert hub_server.TOKEN not in card
