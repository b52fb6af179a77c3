"""The papers' tables: published figures, counted ones, and the command that puts them side by side."""

import csv
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from hf_poolformer import VARIANTS, PoolFormerForSemanticSegmentation
from hf_poolformer.benchmark import papers, papers_page
from hf_poolformer.benchmark.peer_models import PeerBackbone, WindowMixer, build_peer, with_peer_backbone
from hf_poolformer.commands import table as command
from hf_poolformer.settings.command_line import parse


ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
TABLES = ["classification", "object-detection", "instance-segmentation", "segmentation", "metaformer"]
# Parameters; 1e9 multiply-accumulates of convolutions and matrix products. Exact numbers of parameters are those of
# timm's checkpoints, others are rounded as their authors print them.
COUNTED = {
    ("timm resnet18", 224): (11_689_512, 1.81),
    ("timm resnet50", 224): (25_557_032, 4.09),
    ("timm deit_small_patch16_224", 224): (22_050_664, 4.6),
    ("timm deit_base_patch16_224", 224): (86_567_656, 17.56),
    ("timm resmlp_12_224", 224): (15_350_872, 3.0),
    ("timm resmlp_24_224", 224): (30_020_680, 6.0),
    ("here resmlp_b24", 224): ("115.7", 23.0),
    ("transformers pvt_tiny", 224): ("13.2", 1.9),
    ("transformers pvt_small", 224): ("24.5", 3.8),
    ("transformers pvt_medium", 224): ("44.2", 6.7),
    ("transformers pvt_large", 224): ("61.4", 9.8),
    ("here swin_mixer_t_d24", 256): ("20", 4.0),
    ("here swin_mixer_t_d6", 256): ("23", 4.0),
    ("here swin_mixer_b_d24", 224): ("61", 10.4),
    ("ours poolformer_s12", 224): (11_915_176, 1.812),
    ("ours poolformer_m48", 224): (73_473_448, 11.533),
    ("ours caformer_s18_384", 384): ("26.3", 13.4),
    ("ours randformer_s12", 224): (12_127_010, 1.888),
}


# The large ones take seconds.
LARGE = (
    "pvt_small",
    "pvt_medium",
    "pvt_large",
    "resmlp_24_224",
    "swin_mixer_b_d24",
    "m48",
    "base_patch16_224",
    "_384",
)
CASES = [
    pytest.param(*case, marks=pytest.mark.slow) if case[0].endswith(LARGE) else pytest.param(*case) for case in COUNTED
]


@pytest.mark.parametrize(("build", "pixels"), CASES)
def test_counted_figures_are_the_official_ones(build, pixels):
    wanted, macs = COUNTED[build, pixels]
    parameters, counted_macs = papers.counted(build, pixels, None)
    if isinstance(wanted, str):
        assert f"{parameters / 1e6:.{len(wanted.partition('.')[2])}f}" == wanted
    else:
        assert parameters == wanted
    assert counted_macs == pytest.approx(macs, rel=0.03)


# The published facts


def test_the_tables_are_the_papers():
    assert papers.table_names() == TABLES
    rows = {name: papers.published_table(name).rows for name in TABLES}
    assert {name: len(found) for name, found in rows.items()} == {
        "classification": 31,
        "object-detection": 6,
        "instance-segmentation": 6,
        "segmentation": 14,
        "metaformer": 97,
    }
    ours = {row.name for name in papers.CLASSIFIERS for row in rows[name] if row.is_ours}
    assert ours == {
        name for name, v in VARIANTS.items() if v.num_labels == 1000 and not v.family.startswith("metaformer_")
    }


@pytest.mark.parametrize("name", TABLES)
def test_every_published_figure_is_there_and_has_a_source(name):
    made = papers.published_table(name)
    for row in made.rows:
        assert papers.source_of(row)["url"].startswith("https://")
        assert all(isinstance(score, float) and 15 < score < 100 for score in row.scores.values()), row
        assert row.published["parameters"] > 0
        assert (row.published["macs"] is not None) == made.has_macs
        if row.is_ours and made.has_macs:
            assert row.pixels == VARIANTS[row.name].image_size
            assert row.scores == {"top1": VARIANTS[row.name].top1}


@pytest.mark.parametrize(
    ("here", "published", "part"),
    [
        (11.69, 12, None),  # rounds to 12
        (59.88, 59, 0.0149),
        (11.53, 11.6, None),  # less than 1 %
        (61.6, 63.6, -0.0314),
        (13.24, None, None),
    ],
)
def test_what_counts_as_a_difference(here, published, part):
    found = papers.difference(here, published)
    assert found == (part if part is None else pytest.approx(part, abs=1e-4))


# Peers


@pytest.mark.parametrize("shift", [0, 2])
def test_a_window_mixer_mixes_within_windows_only(shift):
    torch.manual_seed(0)
    mixer = WindowMixer(dim=6, num_heads=3, window=4, shift=shift)
    x = torch.randn(1, 8, 8, 6)
    changed = x.clone()
    changed[0, 1, 1, 0] += 1
    moved = (mixer(changed) != mixer(x)).any(dim=-1)[0]
    # Windows begin at 0 or, padded by 2 before the first row, at -2.
    rows = slice(0, 4) if shift == 0 else slice(0, 2)
    assert moved[rows, rows].all() and moved.sum() == moved[rows, rows].sum()
    # Two channels are a head; the others do not notice.
    assert not (mixer(changed) != mixer(x))[..., 2:].any()


@pytest.mark.parametrize("shift", [0, 3])
def test_a_window_mixer_of_identities_changes_nothing(shift):
    mixer = WindowMixer(dim=8, num_heads=2, window=4, shift=shift)
    with torch.no_grad():
        mixer.mix.weight.copy_(torch.eye(16).repeat(2, 1)[..., None])
        mixer.mix.bias.zero_()
    x = torch.randn(2, 12, 8, 8)
    torch.testing.assert_close(mixer(x), x)


@pytest.mark.parametrize("build", ["here swin_mixer_t_d6", "transformers pvt_tiny"])
def test_what_is_built_here_answers(build):
    row = next(row for row in papers.published_table("classification").rows if row.build == build)
    torch.manual_seed(0)
    step = papers.make_step(build_peer(*build.split()).eval(), papers.random_images(1, row.pixels))
    logits = step()
    assert logits.shape == (1, 1000) and logits.isfinite().all() and logits.std() > 0


@pytest.mark.parametrize(("library", "name"), [("timm", "resnet18"), ("transformers", "pvt_tiny")])
def test_a_peer_s_feature_maps_fit_our_heads(library, name):
    with torch.device("meta"):
        backbone = PeerBackbone(library, name)
        maps = backbone(torch.empty(1, 3, 224, 224)).feature_maps
        assert [x.shape[1:] for x in maps] == [
            (channels, 224 // stride, 224 // stride)
            for channels, stride in zip(backbone.channels, (4, 8, 16, 32), strict=True)
        ]
        model = with_peer_backbone(PoolFormerForSemanticSegmentation, library, name, 150)
        assert model(torch.empty(1, 3, 224, 224)).logits.shape == (1, 150, 56, 56)


# The page


@pytest.mark.parametrize("name", ["object-detection", "instance-segmentation", "segmentation"])
def test_dense_tables_are_counted_as_published_and_as_committed(name):
    made = papers.count_table(name)
    wrong = {row.model for row in made.rows if papers.is_marked(row)}
    assert wrong == ({"PoolFormer-S24"} if name == "segmentation" else set())  # a slip of the paper
    assert papers_page.render_table(made) in (DOCS / "papers.md").read_text()


def test_the_committed_classifiers_are_counted_as_they_are_here():
    for name in papers.CLASSIFIERS:
        with (DOCS / "papers" / f"{name}.csv").open(newline="") as file:
            committed = list(csv.DictReader(file))
        rows = papers.published_table(name).rows
        assert [line["built_from"] for line in committed] == [row.build for row in rows]
        for line, row in zip(committed, rows, strict=True):
            assert line["top1"] == str(row.scores["top1"])
            if (row.build, row.pixels) in COUNTED and not row.build.endswith(LARGE):
                parameters, macs = papers.counted(row.build, row.pixels, None)
                assert (int(line["parameters"]), float(line["gmacs"])) == (parameters, pytest.approx(macs, abs=1e-4))


@pytest.mark.slow
def test_the_command_writes_the_committed_page(tmp_path, capsys):
    shutil.copy(DOCS / "papers.md", tmp_path)
    shutil.copytree(DOCS / "papers", tmp_path / "papers")
    assert command.main(["--output_dir", str(tmp_path)]) == 0
    for path in [DOCS / "papers.md", *(DOCS / "papers").glob("*.csv")]:
        assert (tmp_path / path.relative_to(DOCS)).read_text() == path.read_text(), path.name


def test_training_commands_are_ones_that_train_takes():
    commands = {
        papers.training_command(row, name): row
        for name in TABLES
        for row in papers.published_table(name).rows
        if row.is_ours
    }
    without = {row.name for text, row in commands.items() if not text}
    assert without and all("in21ft1k" in name and "384" not in name for name in without)
    assert len(commands) > 50
    for text, row in commands.items():
        if not text:
            continue
        accelerate, launch, script, *flags = text.split()
        assert (accelerate, launch) == ("accelerate", "launch") and (ROOT / script).is_file()
        if "metaformer-384" in flags:  # its checkpoint is looked at, and is not there
            at = flags.index("--model_name_or_path")
            flags[at : at + 2] = ["--config_name", row.name]
        settings = parse(flags)
        assert row.name in settings.output_dir


# The command


@pytest.fixture
def two_rows(monkeypatch):
    """One table of two small models, on small images."""
    group = {"mixer": "convolution", "source": "poolformer_2"}
    tables = {
        "classification": {
            "title": "Two models",
            "about": "Made up.",
            "columns": ["model", "build", "pixels", "parameters", "macs", "top1"],
            "groups": [
                {"family": "A", **group, "rows": [["A-1", "timm resnet18", 64, 12, 1.8, 70.6]]},
                {"family": "B", **group, "mixer": "pooling", "rows": [["B-1", "ours poolformer_s12", 64, 12, 1.8]]},
            ],
        }
    }
    made = {"sources": papers.facts()["sources"], "tables": tables}
    monkeypatch.setattr(papers, "facts", lambda: made)


def test_files_round_trip_and_what_a_person_wrote_stays(two_rows, tmp_path, capsys):
    arguments = ["--output_dir", str(tmp_path), "--device", "cpu", "--batch_size", "1", "--rounds", "1"]
    assert command.main([*arguments, "--measure"]) == 0
    page = tmp_path / "papers.md"
    files = {path.name for path in (tmp_path / "papers").iterdir()}
    assert files == {
        "classification.csv",
        "classification-macs.png",
        "classification-parameters.png",
        "measurement.json",
    }
    assert str(page) in capsys.readouterr().out
    with (tmp_path / "papers" / "classification.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    made = papers.count_table("classification")
    assert [int(row["parameters"]) for row in rows] == [row.parameters for row in made.rows]
    assert rows[1]["train"].startswith(
        "accelerate launch scripts/train.py --recipe paper --config_name poolformer_s12"
    )
    assert rows[0]["train"] == ""
    assert all(float(row["images_per_second"]) > 0 and row["note"] == "" for row in rows)
    assert "| **B-1** |" in page.read_text() and "images/s" in page.read_text()
    measured = json.loads((tmp_path / "papers" / "measurement.json").read_text())
    assert measured["classification"]["batch_size"] == 1 and measured["classification"]["dtype"] == "float32"
    assert f"**Measured** on {measured['classification']['date']}" in page.read_text()

    # Counting again keeps the measurement and what a person wrote below.
    page.write_text(page.read_text() + "\n## Tried\n\nMine.\n")
    before = page.read_text()
    assert command.main(arguments) == 0
    assert page.read_text() == before
    with (tmp_path / "papers" / "classification.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == rows


def test_without_timm(two_rows, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert command.main(["--output_dir", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert err == "error: timm is not installed: pip install 'hf-poolformer[benchmark]'\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tables", "segmentatoin"], "unknown table: segmentatoin; did you mean segmentation?"),
        (["--tables", "ablation"], "unknown table: ablation; there are classification, "),
        (
            ["--measure", "segmentation"],
            "unknown table to measure: segmentation; there are classification, metaformer.",
        ),
        (
            ["--tables", "segmentation", "--measure"],
            "--measure classification is not among the --tables segmentation.",
        ),
        (["--batch_size", "0"], "--batch_size must be at least 1, not 0."),
    ],
)
def test_mistakes(arguments, message, tmp_path, capsys):
    assert command.main([*arguments, "--output_dir", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message}") and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_ctrl_c_leaves_nothing_half_written(two_rows, tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(papers, "counted", interrupted)
    assert command.main(["--output_dir", str(tmp_path / "out")]) == 130
    assert not (tmp_path / "out").exists()


def test_a_model_that_does_not_fit_gets_a_note(two_rows, tmp_path, monkeypatch):
    build = papers.build_classifier

    def build_or_fail(name):
        if name.startswith("timm"):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return build(name)

    monkeypatch.setattr(papers, "build_classifier", build_or_fail)
    arguments = ["--output_dir", str(tmp_path), "--device", "cpu", "--batch_size", "1", "--rounds", "1"]
    assert command.main([*arguments, "--measure"]) == 0
    with (tmp_path / "papers" / "classification.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert first["note"] == "out of memory" and first["images_per_second"] == ""
    assert second["note"] == "" and float(second["images_per_second"]) > 0
