"""Two evaluations of the same images: brought together, judged, and shown."""

import json

import numpy as np
import pytest
import torch
from evaluation_rows import answers, rows_of
from PIL import Image

from hf_poolformer.evaluation.rows import KEY
from hf_poolformer.foundation.errors import UserError
from hf_poolformer.foundation.strict_json import to_json
from hf_poolformer.foundation.tasks import CLASSIFICATION, MULTI_LABEL, REGRESSION, TASKS
from hf_poolformer.reports.comparison import Comparison
from hf_poolformer.reports.comparison_page import comparison_lines, comparison_page, wanted_images
from hf_poolformer.reports.page import render
from hf_poolformer.reports.speed import Cost


NAMES = ["cat", "dog", "bird", "fish"]
EVERY_TASK = pytest.mark.parametrize("task", [CLASSIFICATION, MULTI_LABEL, REGRESSION])


def compared(a, b, **options):
    return Comparison(a, b, ("first", "second"), **options)


@EVERY_TASK
def test_labels_in_another_order(task):
    """A model against itself with its outputs swapped: nothing differs."""
    labels, good, _ = answers(task)
    order = torch.tensor([2, 0, 3, 1])
    others = order.argsort()[labels] if labels.ndim == 1 else labels[:, order]
    a = rows_of(labels, good, NAMES, task)
    b = rows_of(others, good[:, order], [NAMES[place] for place in order], task)
    found = compared(a, b)
    assert found.pairs.label_names == NAMES
    assert (found.main.difference, found.main.interval, found.p, found.better) == (0, (0, 0), 1, None)
    assert found.agreement == 1 and not len(found.better_on("A")) and not len(found.better_on("B"))
    assert found.pairs.changes.max() < 1e-6  # softmax sums in another order
    assert "A and B have the same" in comparison_lines(found)[2]


def test_the_figures_are_those_of_the_evaluations():
    labels, good, middling = answers(CLASSIFICATION)
    found = compared(rows_of(labels, middling, NAMES), rows_of(labels, good, NAMES))
    right = [(logits.argmax(1) == labels).numpy() for logits in (middling, good)]
    assert (found.main.a, found.main.b) == pytest.approx([part.mean() for part in right])
    table = found.table
    assert (table.both, table.only_a) == ((right[0] & right[1]).sum(), (right[0] & ~right[1]).sum())
    assert (table.only_b, table.neither) == ((~right[0] & right[1]).sum(), (~right[0] & ~right[1]).sum())
    assert found.better == "B" and found.p == found.test.p < 1e-4
    assert found.agreement == pytest.approx((good.argmax(1) == middling.argmax(1)).double().mean().item())
    # B's gains, the clearest first, and of all images with the same verdict the most different answers.
    gained = found.better_on("B")
    assert sorted(gained) == sorted(np.flatnonzero(right[1] & ~right[0]))
    losses = found.pairs.a.losses - found.pairs.b.losses
    assert (np.diff(losses[gained]) <= 0).all()
    assert not set(found.apart) & {*gained, *found.better_on("A")}
    mistake = found.mistakes[0]
    true, said = NAMES.index(mistake.label), NAMES.index(mistake.prediction)
    counts = [((labels == true) & (logits.argmax(1) == said)).sum().item() for logits in (middling, good)]
    assert [mistake.a, mistake.b] == counts
    lines = comparison_lines(found)
    assert lines[2].startswith("B is better: its top-1 accuracy is") and "McNemar's test" in lines[2]


@pytest.mark.parametrize(
    ("task", "said"), [(MULTI_LABEL, "mean average precision"), (REGRESSION, "mean absolute error")]
)
def test_other_tasks_are_judged_by_their_first_figure(task, said):
    labels, good, middling = answers(task)
    found = compared(rows_of(labels, good, NAMES, task), rows_of(labels, middling, NAMES, task))
    assert found.better == "A" and found.p < 0.05
    assert f"A is better: its {said} is" in comparison_lines(found)[2]
    data = found.data()
    assert [row["label"] for row in data["per_label"]] == NAMES
    figure = TASKS[task].per_class[-1 if task == MULTI_LABEL else 0]
    key = next(key for key in data["per_label"][0] if key.startswith("eval_per"))
    assert figure.key and data["per_label"][0][key]["interval"] is not None
    assert (data["table"] is None) == (task == REGRESSION)


def test_images_of_one_model_only_are_left_out_and_counted():
    labels, good, middling = answers(CLASSIFICATION, 60)
    paths = [f"photos/{place}.png" for place in range(60)]
    a = rows_of(labels[2:], good[2:], NAMES, paths=paths[2:])
    b = rows_of(labels[:57], middling[:57], NAMES, paths=paths[:57])
    found = compared(a, b)
    assert (len(found.pairs), found.pairs.missing_a, found.pairs.missing_b) == (55, 2, 3)
    assert (found.pairs.labels == labels[2:57].numpy()).all()
    assert (found.pairs.b.predicted == middling[2:57].argmax(1).numpy()).all()
    assert "Left out: 2 images that only B has answered." in comparison_lines(found)
    assert "Left out: 3 images that only A has answered." in comparison_lines(found)


def test_data_that_has_moved_is_known_by_position_and_name():
    labels, good, middling = answers(CLASSIFICATION, 30)
    paths = [f"/here/photos/{place}.png" for place in range(30)]
    moved = [path.replace("/here", "/mnt/there") for path in paths]
    a, b = rows_of(labels, good, NAMES, paths=paths), rows_of(labels, middling, NAMES, paths=moved)
    assert len(compared(a, b).pairs) == 30
    with pytest.raises(UserError, match=r"were shown other images: of 30 of A and 30 of B none .*/here/photos/0.png"):
        compared(a, rows_of(labels, middling, NAMES, paths=[f"else/{path}.jpg" for path in range(30)]))


def test_what_cannot_be_compared():
    labels, good, _ = answers(CLASSIFICATION, 40)
    a = rows_of(labels, good, NAMES)
    with pytest.raises(UserError, match="know other labels, 4 and 4: only A knows fish; only B knows frog"):
        compared(a, rows_of(labels, good, ["cat", "dog", "bird", "frog"]))
    with pytest.raises(UserError, match="know other labels, 4 and 5: only B knows whale"):
        compared(a, rows_of(labels, torch.cat([good, good[:, :1]], 1), [*NAMES, "whale"]))
    with pytest.raises(
        UserError, match=r"measured against other labels: those of 1 of 40 images differ, of photos/7\.png"
    ):
        corrected = labels.clone()
        corrected[7] = (labels[7] + 1) % 4
        compared(a, rows_of(corrected, good, NAMES))
    several, logits, _ = answers(MULTI_LABEL, 40)
    with pytest.raises(UserError, match="answer other questions: A is for image-classification, B for multi-label"):
        compared(a, rows_of(several, logits, NAMES, MULTI_LABEL))


def test_classes_without_names_are_taken_in_their_order():
    labels, good, _ = answers(CLASSIFICATION, 40)
    unnamed = rows_of(labels, good, [f"LABEL_{place}" for place in range(4)])
    assert compared(rows_of(labels, good, NAMES), unnamed).agreement == 1
    assert compared(unnamed, rows_of(labels, good, NAMES)).pairs.label_names == NAMES


@EVERY_TASK
def test_the_page_and_the_data(task):
    """Hostile names do nothing, and the figures can be had as data."""
    names = ["<script>alert(1)</script>", 'a"b\n\x00', "\u202eevil", "x" * 10_000]
    labels, good, middling = answers(task, 60)
    a, b = rows_of(labels, good, names, task), rows_of(labels, middling, names, task)
    cost = Cost("onnx, int8", None, 1_000_000, (32, 32), 16, 0.5, 0.02, "<b>CPU</b>")
    speedy = Cost("PyTorch, float32", 1234, 5_000_000, (32, 32), 16, 0.25, 0.02, "CPU")
    found = Comparison(a, b, ("<i>one</i>", "two\n"), (cost, speedy))
    places = wanted_images(found)
    assert places and set(places) <= set(range(60))
    html = render(comparison_page(found, {place: Image.new("RGB", (40, 30)) for place in places[1:]}))
    assert "<script>alert" not in html and "<i>one" not in html and "<b>CPU" not in html and "\u202e" not in html
    assert "&lt;script&gt;alert(1)" in html and "B is 2.00 times as fast as A" in html
    data = json.loads(to_json(found.data()))
    assert data["speed_ratio"] == 2 and data["a"]["bytes"] == 1_000_000
    table = found.images()
    assert table.num_rows == 60 and json.loads(table.schema.metadata[KEY.encode()])["label_names"] == names
    values = np.array(table["b_answers" if task == REGRESSION else "b_probabilities"].to_pylist())
    assert values == pytest.approx(found.pairs.b.values)


def test_a_single_image_and_one_class():
    """Nothing to resample, and nothing to tell: no figure is made up."""
    a = rows_of(torch.tensor([0]), torch.tensor([[2.0, 1.0]]), ["yes", "no"])
    found = compared(a, a)
    assert (found.p, found.better, found.agreement) == (1, None, 1)
    assert render(comparison_page(found, {}))
    assert to_json(found.data())
